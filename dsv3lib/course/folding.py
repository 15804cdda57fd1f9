"""An answer folds itself: whatever a cell shows that answers a question nobody has answered yet.

``setup`` calls :func:`watch`. From then on a cell that holds ``reveal("mla.p1", …)``, or a line
``# answers mla.p1``, is looked at before it runs: where no prediction was made for ``mla.p1``, all that the cell
displays and prints is gathered into one folded block, so that neither the page of a reader nor *Run All* gives the
answer away. With a prediction made, the cell shows what it shows.
"""

from __future__ import annotations

import html
import re
import sys
from collections.abc import Mapping
from typing import Any, TextIO

from IPython.core.displaypub import DisplayPublisher
from IPython.core.interactiveshell import InteractiveShell

from dsv3lib.course import card
from dsv3lib.course.record import learner

_ANSWERS = re.compile(r"""(?m)^[^#\n]*\breveal\(\s*["']([\w.]+)["']|^\s*#\s*answers\s+([\w.]+)""")
_SUMMARY = "What happened: predict first, then run this cell again (or unfold)"
_MARK = "_dsv3_folds_answers"

Shown = tuple[dict[str, Any], dict[str, Any]]


def answered_keys(source: str) -> list[str]:
    """Return the predictions that a cell's code answers, as in ``["mla.p1"]``."""
    return [first or second for first, second in _ANSWERS.findall(source)]


def folded(shown: list[dict[str, Any]]) -> dict[str, str]:
    """Return one folded bundle of what a cell displayed.

    Args:
        shown: the data of each display, in order: MIME type → content.
    """
    blocks = "".join(_as_html(data) for data in shown)
    plain = "\n".join(str(data.get("text/plain", "")).rstrip("\n") for data in shown)
    head = f'<summary style="cursor:pointer">{html.escape(_SUMMARY)}</summary>'
    return {
        "text/html": f'<details class="dsv3-answer" style="margin:.3em 0">{head}{blocks}</details>',
        "text/plain": f"{_SUMMARY}\n{plain}",
    }


def watch(shell: InteractiveShell | None) -> None:
    """Fold the answers of a kernel's cells from now on; calling it again changes nothing.

    Args:
        shell: the kernel's shell, or None outside a notebook, where there is nothing to fold.
    """
    if shell is None or getattr(shell, _MARK, None) is not None:
        return
    folder = _Folder(shell)
    setattr(shell, _MARK, folder)
    shell.events.register("pre_run_cell", folder.before)
    shell.events.register("post_run_cell", folder.after)


class _Folder:
    """Takes a cell's displays and prints aside while it runs, and gives them back folded."""

    def __init__(self, shell: InteractiveShell) -> None:
        self.shell = shell
        self.shown: list[dict[str, Any]] | None = None
        self._publisher: Any = None
        self._stdout: TextIO | None = None

    def before(self, info: Any) -> None:
        kept = learner().read()["predictions"]
        keys = answered_keys(info.raw_cell or "")
        if not keys or all("answer" in kept.get(key, {}) for key in keys):
            return
        self.shown = []
        self._publisher, self._stdout = self.shell.display_pub, sys.stdout
        self.shell.display_pub = _Gathering(self.shown, parent=self.shell)
        sys.stdout = _Printed(self.shown)

    def after(self, result: Any) -> None:
        if self.shown is None:
            return
        shown, self.shown = self.shown, None
        self.shell.display_pub, sys.stdout = self._publisher, self._stdout
        failed = result is not None and result.error_in_exec is not None
        if failed:  # what was shown before an error helps to find it
            for data in shown:
                self.shell.display_pub.publish(data)
        elif shown:
            self.shell.display_pub.publish(folded(shown))


class _Gathering(DisplayPublisher):
    """Keeps what is displayed instead of sending it."""

    def __init__(self, shown: list[dict[str, Any]], **options: Any) -> None:
        super().__init__(**options)
        self._shown = shown

    def publish(self, data: Mapping[str, Any], metadata: Any = None, **_options: Any) -> None:
        self._shown.append(dict(data))

    def clear_output(self, wait: bool = False) -> None:
        self._shown.clear()


class _Printed:
    """Keeps what is printed, in its place between the displays."""

    encoding = "utf-8"

    def __init__(self, shown: list[dict[str, Any]]) -> None:
        self._shown = shown

    def write(self, text: str) -> int:
        if self._shown and set(self._shown[-1]) == {"text/plain"}:
            self._shown[-1]["text/plain"] += text
        else:
            self._shown.append({"text/plain": text})
        return len(text)

    def flush(self) -> None:
        """Nothing waits to be written."""

    def isatty(self) -> bool:
        """It is no terminal."""
        return False


def _as_html(data: Mapping[str, Any]) -> str:
    if "text/html" in data:
        return str(data["text/html"])
    if "image/png" in data:
        alt = html.escape(str(data.get("text/plain", "a figure")))
        return f'<img alt="{alt}" src="data:image/png;base64,{data["image/png"]}">'
    return card.code(str(data.get("text/plain", "")).rstrip("\n"))
