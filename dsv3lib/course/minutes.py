"""How long a lesson takes: one function, of its words, its code and its exercises' own minutes.

    python -m dsv3lib.course.minutes           every lesson, with the parts
    python -m dsv3lib.course.minutes 02        one

What a title and the syllabus say is what comes out here, rounded up to five; the tests hold both to it.
"""

from __future__ import annotations

import ast
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nbformat import NotebookNode

from dsv3lib.course import pairing
from dsv3lib.course.exercises import of_lesson
from dsv3lib.course.syllabus import lesson
from dsv3lib.course.task import Exercise
from dsv3lib.errors import CourseError

WORDS_A_MINUTE = 180
"""Explanations of mathematics are read more slowly than a story."""

LINES_A_MINUTE = 15
"""Code that is read and understood, and run."""

FIGURE_MINUTES = 0.5
PREDICTION_MINUTES = 0.75
LONGEST = 75
"""A lesson that takes longer is cut in two, with a stop between."""

_STEP = 5
_FIGURE = re.compile(r"\b(?:style\.show|show|live|symbols|at_scale|setup)\(|\.widget\(|\btable\(")
_PREDICTION = re.compile(r"(?m)^\s*predict\(")
_MARKUP = re.compile(r"<!--.*?-->|<[^>]+>|\]\([^)]*\)|[#*`$\\{}|]", re.DOTALL)
_STATED = re.compile(r"About (\d+) minutes")


@dataclass(frozen=True)
class Effort:
    """A lesson's minutes by what they are spent on."""

    reading: float
    code: float
    figures: float
    predictions: float
    exercises: float

    @property
    def total(self) -> int:
        """All of them, rounded up to five."""
        whole = self.reading + self.code + self.figures + self.predictions + self.exercises
        return _STEP * math.ceil(whole / _STEP)


def effort(book: NotebookNode, asked: Sequence[Exercise]) -> Effort:
    """Return what a lesson takes.

    Args:
        book: its cells; outputs do not count. A cell that is tagged ``folded`` is an appendix and counts nothing.
        asked: its exercises.
    """
    read = [cell for cell in book.cells if "folded" not in cell.metadata.get("tags", [])]
    prose = "\n".join(cell.source for cell in read if cell.cell_type == "markdown")
    code = [cell.source for cell in read if cell.cell_type == "code"]
    return Effort(
        reading=len(_MARKUP.sub(" ", prose).split()) / WORDS_A_MINUTE,
        code=sum(map(_lines, code)) / LINES_A_MINUTE,
        figures=FIGURE_MINUTES * sum(len(_FIGURE.findall(source)) for source in code),
        predictions=PREDICTION_MINUTES * sum(len(_PREDICTION.findall(source)) for source in code),
        exercises=float(sum(one.minutes for one in asked)),
    )


def stated(book: NotebookNode) -> int:
    """Return the minutes that a lesson's first cell says.

    Raises:
        CourseError: it says none.
    """
    found = _STATED.search(book.cells[0].source if book.cells else "")
    if found is None:
        raise CourseError("the first cell does not say 'About N minutes'")
    return int(found.group(1))


def minutes_problems(book: NotebookNode, stem: str) -> list[str]:
    """A lesson whose title or syllabus row says other minutes than it takes, or that takes too many."""
    taken = effort(book, of_lesson(lesson(stem).short)).total
    said = {"its first cell says": stated(book), "the syllabus says": lesson(stem).minutes}
    found = [
        f"{stem} takes {taken} minutes, {where} {value}" for where, value in said.items() if value != taken
    ]
    if taken > LONGEST:
        found.append(f"{stem} takes {taken} minutes, at most {LONGEST}: cut it in two, with a stop between")
    return found


def _lines(source: str) -> int:
    """Lines that hold code: no blank ones, no comments, no imports, no question's text."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return len(source.splitlines())
    skipped: set[int] = set()
    for node in ast.walk(tree):
        spoken = isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("predict", "reveal")
        if isinstance(node, ast.Import | ast.ImportFrom) or spoken:
            skipped.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(source.splitlines(), start=1)
    return sum(
        1 for at, line in lines if at not in skipped and line.strip() and not line.strip().startswith("#")
    )


def main(arguments: Sequence[str]) -> int:
    """Print each lesson's minutes and what they are made of."""
    folder = Path(__file__).resolve().parents[2] / "notebooks" / "source"
    for path in sorted(folder.glob("[0-9][0-9]_*.py")):
        if arguments and not path.name.startswith(tuple(arguments)):
            continue
        book = pairing.read_source(path)
        took = effort(book, of_lesson(lesson(path.stem).short))
        parts = ", ".join(f"{name} {value:.0f}" for name, value in vars(took).items())
        print(f"{path.stem}: {took.total} minutes ({parts}); it says {stated(book)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
