"""How far a learner has come, over all lessons."""

from __future__ import annotations

from dsv3lib.course import card
from dsv3lib.course.exercises import of_lesson
from dsv3lib.course.record import learner
from dsv3lib.course.syllabus import LESSONS, Lesson

_HEAD = ["lesson", "minutes", "exercises", "", "predictions"]


def progress() -> None:
    """Display what is solved, tried and predicted, lesson by lesson, and where it is kept."""
    kept = learner().read()
    rows = [_row(lesson, kept) for lesson in LESSONS if of_lesson(lesson.short)]
    solved, tried, total = _sum(kept)
    title = f"Your progress: {solved} of {total} exercises solved, {tried} tried"
    widths = [max(len(row[i]) for row in [_HEAD, *rows]) for i in range(len(_HEAD))]
    plain = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    card.show(card.card("plain", title, card.table(_HEAD, rows)), "\n".join([title, *plain]))


def _row(lesson: Lesson, kept: dict) -> list[str]:
    marks = ""
    solved = 0
    for one in of_lesson(lesson.short):
        state = kept["exercises"].get(one.id, {}).get("state")
        marks += {"right": "■", "wrong": "◪"}.get(state, "□")
        solved += state == "right"
    made = sum(key.startswith(f"{lesson.short}.p") for key in kept["predictions"])
    count = len(of_lesson(lesson.short))
    return [lesson.stem, str(lesson.minutes), f"{solved} of {count} solved", marks, str(made)]


def _sum(kept: dict) -> tuple[int, int, int]:
    ids = [one.id for lesson in LESSONS for one in of_lesson(lesson.short)]
    states = [kept["exercises"].get(key, {}).get("state") for key in ids]
    return states.count("right"), states.count("wrong"), len(ids)
