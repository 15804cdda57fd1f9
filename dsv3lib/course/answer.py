"""The learner's side of an exercise: its task, the check, hints one at a time, the reference beside the answer."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from dsv3lib.course import card
from dsv3lib.course.exercises import find
from dsv3lib.course.judge import Verdict, judge
from dsv3lib.course.record import learner
from dsv3lib.course.task import Exercise

_TITLES = {"right": "Right", "wrong": "Not yet", "open": "Open"}
_TONES = {"right": "good", "wrong": "bad", "open": "open"}
_GOES_ON = "The cells below go on with the reference meanwhile."


def exercise(key: str) -> None:
    """Display the task of an exercise: what to write, its specification and picture, difficulty, minutes."""
    asked = find(key)
    title = f"Exercise {asked.id} · {asked.title}"
    effort = f"{asked.rating} · {asked.minutes} minutes"
    blocks, plain = [card.words(effort), card.words(asked.prompt)], [f"{title} | {effort}", asked.prompt]
    if asked.spec:
        head = ["name", "shape or type", "what it is"]
        rows = [[f"`{name}`", f"`{kind}`", meaning] for name, kind, meaning in asked.spec]
        blocks.append(card.table(head, rows))
        plain += [f"  {name}: {kind}: {meaning}" for name, kind, meaning in asked.spec]
    if asked.picture is not None:
        from dsv3lib.viz import style

        shown = style.bundle(*asked.picture())
        blocks.append(shown["text/html"])
        plain.append(shown["text/plain"])
    card.show(card.card("plain", title, *blocks), "\n".join(plain))


def check(key: str, answer: Any = None) -> Callable[..., Any]:
    """Judge an answer by what it does, say in words what is wrong, and return the function to go on with.

    Never raises for anything the answer does. An answer that is not there yet (None, ``...``, an empty
    body) is shown as open, and *Run All* goes on::

        cache_bytes = check("mla.1", cache_bytes)      # the learner's own if it is right, else the reference

    Args:
        key: the exercise, as in ``"mla.1"``.
        answer: the learner's function, not called.

    Returns:
        The learner's function if it is right, else the reference.

    Raises:
        CourseError: there is no such exercise.
    """
    asked = find(key)
    verdict = judge(asked, answer)
    trouble = _keep(asked, verdict)
    html_text, plain = _verdict_card(asked, verdict, trouble)
    right = verdict.state == "right"
    beside = _beside(asked, answer) if right else ""
    page = html_text + (beside or _reference(asked, is_open=False))
    card.show(page, plain, _widget(asked, html_text + beside, right))
    return answer if right else asked.solution


def hint(key: str) -> None:
    """Display the next hint of an exercise; when all have been given, display them all."""
    asked = find(key)
    given = _next_hint(asked)
    plain = "\n".join(_hint_line(asked, number) for number in range(given))
    card.show(_hint_card(asked, given), plain)


def solution(key: str) -> None:
    """Display the reference of an exercise, folded: Tab to it, Enter unfolds it."""
    asked = find(key)
    _mark_shown(asked)
    title = f"Exercise {asked.id}, reference"
    card.show(_reference(asked, is_open=False), f"{title}\n{asked.solution_source()}")


def _verdict_card(asked: Exercise, verdict: Verdict, trouble: str) -> tuple[str, str]:
    title = f"{_TITLES[verdict.state]} · exercise {asked.id} · {asked.title}"
    blocks = [card.words(verdict.text)]
    plain = [f"{title} | {verdict.text}"]
    if verdict.line:
        blocks.append(card.words("It happened here:") + card.code(verdict.line))
        plain.append(f"It happened here: {verdict.line}")
    if verdict.printed:
        blocks.append(card.words("Your function printed:") + card.code(verdict.printed))
        plain.append(f"Your function printed: {verdict.printed}")
    if verdict.state != "right":
        blocks.append(card.words(_GOES_ON))
        plain.append(_GOES_ON)
    if trouble:
        blocks.append(card.words(trouble))
        plain.append(trouble)
    return card.card(_TONES[verdict.state], title, *blocks), "\n".join(plain)


def _keep(asked: Exercise, verdict: Verdict) -> str:
    """Keep the outcome; a right answer stays right, whatever is tried after it."""
    record = learner()
    entry = record.entry("exercises", asked.id)
    if verdict.state == "open":
        return ""
    solved = verdict.state == "right" or entry.get("state") == "right"
    return record.update(
        "exercises", asked.id, state="right" if solved else "wrong", tries=int(entry.get("tries", 0)) + 1
    )


def _next_hint(asked: Exercise) -> int:
    record = learner()
    given = min(int(record.entry("exercises", asked.id).get("hints", 0)) + 1, len(asked.hints))
    record.update("exercises", asked.id, hints=given)
    return given


def _mark_shown(asked: Exercise) -> None:
    learner().update("exercises", asked.id, solution_shown=True)


def _hint_line(asked: Exercise, number: int) -> str:
    return f"Hint {number + 1} of {len(asked.hints)} | {asked.hints[number]}"


def _hint_card(asked: Exercise, given: int) -> str:
    lines = "".join(card.words(_hint_line(asked, number).replace(" | ", ": ")) for number in range(given))
    return card.card("plain", f"Exercise {asked.id}", lines)


def _reference(asked: Exercise, is_open: bool) -> str:
    folded = card.fold(
        "The reference (write yours first)", card.code(asked.solution_source()), is_open=is_open
    )
    return card.card("plain", f"Exercise {asked.id}", folded)


def _beside(asked: Exercise, answer: Any) -> str:
    """The learner's function and the reference, side by side where there is room."""
    try:
        own = textwrap.dedent(inspect.getsource(answer))
    except (OSError, TypeError):  # typed in where Python keeps no source
        return _reference(asked, is_open=True)
    return card.card(
        "plain",
        f"Exercise {asked.id}",
        card.columns(("yours", own), ("the reference", asked.solution_source())),
    )


def _widget(asked: Exercise, verdict_html: str, right: bool) -> dict[str, Any]:
    """The verdict with its buttons: a hint, and to skip; once right, nothing is left to ask for."""
    import ipywidgets

    hint_button = ipywidgets.Button(description="Hint", tooltip=f"Show the next hint for exercise {asked.id}")
    skip_button = ipywidgets.Button(
        description="Skip: show the reference", tooltip=f"Show the reference of exercise {asked.id}"
    )
    skip_button.layout.width = "auto"
    hints, shown = ipywidgets.HTML(), ipywidgets.HTML()

    def on_hint(_button: Any) -> None:
        given = _next_hint(asked)
        hints.value = _hint_card(asked, given)
        if given == len(asked.hints):
            hint_button.description, hint_button.disabled = "No more hints", True

    def on_skip(_button: Any) -> None:
        _mark_shown(asked)
        shown.value = _reference(asked, is_open=True)

    hint_button.on_click(on_hint)
    skip_button.on_click(on_skip)
    buttons = [] if right else [ipywidgets.HBox([hint_button, skip_button]), hints, shown]
    box = ipywidgets.VBox([ipywidgets.HTML(verdict_html), *buttons])
    box.add_class("dsv3-check")
    return card.view_of(box)
