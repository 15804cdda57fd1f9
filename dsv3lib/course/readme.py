"""The README's table of lessons, written from the syllabus, so that a lesson more is a row in one place."""

from __future__ import annotations

from pathlib import Path

from dsv3lib.course.overview import IN_PREPARATION
from dsv3lib.course.syllabus import LESSONS
from dsv3lib.errors import CourseError
from dsv3lib.files import write_whole

BEGIN, END = "<!-- lessons: written by `make notebooks` -->", "<!-- end of lessons -->"


def table(notebooks: Path) -> str:
    """Return the table as Markdown: a row a lesson; one that is not in the folder is in preparation.

    Args:
        notebooks: the folder that holds the executed lessons.
    """
    lines = ["| | lesson | the idea | minutes |", "|---|---|---|---|"]
    for one in LESSONS:
        name, there = one.stem[3:], (notebooks / f"{one.stem}.ipynb").is_file()
        words = f"[{name}](notebooks/{one.stem}.ipynb)" if there else name
        lines.append(f"| {one.number} | {words} | {one.idea} | {one.minutes if there else IN_PREPARATION} |")
    return "\n".join(lines)


def updated(text: str, notebooks: Path) -> str:
    """Return a README with its table as it should be.

    Raises:
        CourseError: the two lines that the table stands between are missing.
    """
    head, found, rest = text.partition(BEGIN)
    _, also, tail = rest.partition(END)
    if not found or not also:
        raise CourseError(f"the README has no lines {BEGIN!r} and {END!r} for the table of lessons to stand between")
    return f"{head}{BEGIN}\n{table(notebooks)}\n{END}{tail}"


def update(root: Path) -> None:
    """Write the table into the README of a project folder, if it has one."""
    path = root / "README.md"
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        new = updated(text, root / "notebooks")
        if new != text:
            write_whole(path, new)
