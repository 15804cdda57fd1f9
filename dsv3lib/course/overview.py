"""How far a learner has come, over all lessons: a table in a lesson, and the first page of their own copy."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3lib.course import card, pairing, record
from dsv3lib.course.syllabus import LESSONS, Lesson
from dsv3lib.errors import CourseError
from dsv3lib.files import write_whole

PAGE = "Overview.md"
IN_PREPARATION = "in preparation"
_UNBROKEN = "\u00a0"  # a space at which no line is broken
_HEAD = ["lesson", "minutes", "exercises", "", "predictions"]
_MARKS = {"right": "■", "wrong": "◪"}
_ASKED = re.compile(r"""(?m)^exercise\(["']([\w.]+)["']""")
_TITLE = re.compile(r"(?m)^# (?:\d\d · )?(.+)$")
_PREDICTED = re.compile(r"""(?m)^predict\(\s*["']([\w.]+)["']""")

Kept = Mapping[str, Mapping[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Standing:
    """A learner in one lesson.

    Attributes:
        lesson: the lesson. title: what its first line says.
        exercises, predictions: the ids that it asks for; none if it is in preparation.
        states: ``"right"``, ``"wrong"`` or "" for each exercise. predicted: predictions made.
    """

    lesson: Lesson
    title: str
    exercises: tuple[str, ...]
    predictions: tuple[str, ...]
    states: tuple[str, ...]
    predicted: int

    @property
    def written(self) -> bool:
        """Whether the lesson is there."""
        return bool(self.exercises)

    @property
    def solved(self) -> int:
        """Exercises that are right."""
        return self.states.count("right")

    @property
    def marks(self) -> str:
        """A sign for each exercise: solved, tried, open."""
        return "".join(_MARKS.get(state, "□") for state in self.states)

    @property
    def state(self) -> str:
        """In words: done, begun, open, or in preparation."""
        if not self.written:
            return IN_PREPARATION
        if self.solved == len(self.exercises):
            return "done"
        return "begun" if self.predicted or any(self.states) else "open"


def standing(
    one: Lesson, asked: Sequence[str], predictions: Sequence[str], kept: Kept, title: str = ""
) -> Standing:
    """Return how far a learner is in one lesson.

    Args:
        one: the lesson. asked, predictions: what it asks for. kept: the learner's progress file.
        title: the lesson's own; made of its file's name when it is left out.
    """
    states = tuple(str(kept["exercises"].get(key, {}).get("state", "")) for key in asked)
    made = sum("answer" in kept["predictions"].get(key, {}) for key in predictions)
    title = title or one.stem[3:].replace("_", " ")
    return Standing(one, title, tuple(asked), tuple(predictions), states, made)


def standings(lessons: Path, kept: Kept) -> list[Standing]:
    """Return how far a learner is in every lesson of the course, from the lessons' own text.

    Args:
        lessons: the folder that holds the notebooks. kept: the learner's progress file.
    """
    return [_of_file(one, lessons / f"{one.stem}.ipynb", kept) for one in LESSONS]


def _of_file(one: Lesson, path: Path, kept: Kept) -> Standing:
    """The standing in a lesson on disk; in preparation if it is not there."""
    if not path.is_file():
        return standing(one, [], [], kept)
    book = pairing.read_notebook(path)
    code = "\n".join(cell.source for cell in book.cells if cell.cell_type == "code")
    words = "\n".join(cell.source for cell in book.cells[:1])
    title = _TITLE.search(words)
    return standing(
        one, _ASKED.findall(code), _PREDICTED.findall(code), kept, title.group(1) if title else ""
    )


def progress() -> None:
    """Display what is solved, tried and predicted, lesson by lesson."""
    from dsv3lib.course.exercises import of_lesson

    kept = record.learner().read()
    made = [key for key, entry in kept["predictions"].items() if "answer" in entry]
    rows, states = [], []
    for one in LESSONS:
        ids = [each.id for each in of_lesson(one.short)]
        now = standing(one, ids, [key for key in made if key.startswith(f"{one.short}.p")], kept)
        states += now.states
        solved = f"{now.solved} of {len(ids)} solved" if now.written else IN_PREPARATION
        rows.append(
            [one.stem, str(one.minutes), solved, now.marks, str(now.predicted) if now.written else ""]
        )
    total = f"{states.count('right')} of {len(states)} exercises solved, {states.count('wrong')} tried"
    title = f"Your progress: {total}"
    widths = [max(len(row[i]) for row in [_HEAD, *rows]) for i in range(len(_HEAD))]
    plain = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    card.show(card.card("plain", title, card.table(_HEAD, rows)), "\n".join([title, *plain]))


def page(now: Sequence[Standing]) -> str:
    """Return the first page of a learner's copy, as Markdown."""
    there = [one for one in now if one.written]
    following = next((one for one in there if one.state != "done"), None)
    solved, asked = sum(one.solved for one in there), sum(len(one.exercises) for one in there)
    lines = ["# DeepSeek-V3, built by you", "", f"{solved} of {asked} exercises solved.", ""]
    if following is not None:
        verb = "Go on with" if following.state == "begun" else "Next"
        lines += [f"**{verb}: {_link(following)}**, {following.lesson.idea}.", ""]
    elif there:
        lines += ["**All that is written is done.**", ""]
    lines += ["| | lesson | minutes | exercises | predictions | |", "|---|---|---|---|---|---|"]
    lines += [_line(one) for one in now]
    return "\n".join([*lines, "", _HELP])


_HELP = """\
■ solved · ◪ tried · □ open

- Run a cell with Shift+Enter. Predict before you run the cell that shows the answer.
- Cells with `...` are yours to write. *Run All* never stops at one: later cells go on with the reference meanwhile.
- These are your own copies. A newer lesson is merged in when you start again, with all that you wrote.
- In a terminal: `dsv3 lab --reset 01` begins a lesson anew (your copy is set aside, not lost), `dsv3 progress` shows
  this table, `dsv3 progress --export me.json` writes a file to hand in.

This page is written anew whenever you answer something; close it and open it again to see it.
"""


def _line(one: Standing) -> str:
    lesson = one.lesson
    if not one.written:
        state = IN_PREPARATION.replace(" ", _UNBROKEN)
        return f"| {lesson.number} | {one.title}: {lesson.idea} | {lesson.minutes} | | | {state} |"
    exercises = f"{one.marks} {one.solved} of {len(one.exercises)}".replace(" ", _UNBROKEN)
    predictions = f"{one.predicted} of {len(one.predictions)}" if one.predictions else ""
    said = lesson.idea.lower().startswith(one.title.lower())
    words = _link(one) if said else f"{_link(one)}: {lesson.idea}"
    return f"| {lesson.number} | {words} | {lesson.minutes} | {exercises} | {predictions} | {one.state} |"


def _link(one: Standing) -> str:
    return f"[{one.title}]({one.lesson.stem}.ipynb)"


def write(folder: Path) -> None:
    """Write the first page of a learner's folder.

    Args:
        folder: the learner's; its hidden folder holds the lessons as they were copied, and the progress file.

    Raises:
        SaveError: it cannot be written.
    """
    hidden = folder / record.HIDDEN
    kept = record.Record(hidden / record.FILE).read()
    write_whole(folder / PAGE, page(standings(hidden / "base", kept)))


def refresh(progress_file: Path) -> None:
    """Write the first page anew after something was answered, if the progress file lies in a learner's folder."""
    if progress_file.name != record.FILE or progress_file.parent.name != record.HIDDEN:
        return
    try:
        write(progress_file.parent.parent)
    except (OSError, CourseError):  # the page is a convenience: the answer itself is kept
        return
