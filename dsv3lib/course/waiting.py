"""A progress bar for whatever a learner waits for longer than a few seconds.

    with bar("training", total=200) as step:
        for batch in batches:
            …
            step(note=f"loss {loss:.3f}")

The bar itself is a widget and leaves nothing that differs between runs in the notebook: no time, no note.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dsv3lib.course import card
from dsv3lib.errors import CourseError

_REDRAW_SECONDS = 0.1
_TERMINAL_WIDTH = 30


@contextmanager
def bar(label: str, total: int) -> Iterator[Callable[..., None]]:
    """Show a bar while the block runs.

    Args:
        label: what is being waited for, as in ``"training"``.
        total: how many steps there are.

    Yields:
        ``step(done=1, note="")``: counts ``done`` steps on and shows a few words beside the bar.

    Raises:
        CourseError: total is below 1.
    """
    if total < 1:
        raise CourseError(f"a bar of {total} steps; at least 1 is needed")
    draw = _widget_bar(label, total) if card.in_notebook() else _terminal_bar(label, total)
    started, count, drawn = time.monotonic(), 0, 0.0

    def step(done: int = 1, note: str = "") -> None:
        nonlocal count, drawn
        count = min(total, count + done)
        now = time.monotonic()
        if now - drawn >= _REDRAW_SECONDS or count == total:
            drawn = now
            draw(count, _timing(now - started, count, total), note)

    draw(0, "", "")
    finished = False
    try:
        yield step
        finished = True
    finally:
        note = "done" if finished else "stopped"
        draw(total if finished else count, f"{time.monotonic() - started:.0f} s", note)


def _timing(elapsed: float, count: int, total: int) -> str:
    left = elapsed / count * (total - count) if count else 0.0
    return f"{elapsed:.0f} s, about {left:.0f} s left"


def _widget_bar(label: str, total: int) -> Callable[[int, str, str], None]:
    import ipywidgets

    progress = ipywidgets.IntProgress(
        max=total, description=label, style={"description_width": "initial"}, bar_style="info"
    )
    words = ipywidgets.HTML()
    box = ipywidgets.HBox([progress, words])
    box.add_class("dsv3-bar")
    plain = f"{label} | {total} steps"
    card.show(card.words(plain), plain, card.view_of(box))

    def draw(count: int, timing: str, note: str) -> None:
        progress.value = count
        text = " · ".join(part for part in (f"{count} of {total}", timing, note) if part)
        words.value = f"<span>{card.inline(text)}</span>"
        if note in ("done", "stopped"):
            progress.bar_style = "success" if note == "done" else "warning"

    return draw


def _terminal_bar(label: str, total: int) -> Callable[[int, str, str], None]:
    def draw(count: int, timing: str, note: str) -> None:
        filled = "#" * (_TERMINAL_WIDTH * count // total)
        end = "\n" if note in ("done", "stopped") else ""
        line = f"\r{label} [{filled:<{_TERMINAL_WIDTH}}] {count}/{total} {timing} {note}"
        print(line, end=end, file=sys.stderr, flush=True)

    return draw
