"""The exercises, one file a lesson, named by the lesson's short name; found by their id."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from dsv3lib.course.syllabus import LESSONS
from dsv3lib.course.task import Exercise
from dsv3lib.errors import CourseError


def _of_file(short: str) -> tuple[Exercise, ...]:
    """The exercises of one file of this folder, or none where a lesson is not written yet."""
    name = f"{__name__}.{short}"
    return import_module(name).EXERCISES if find_spec(name) is not None else ()


ALL: tuple[Exercise, ...] = tuple(one for lesson in LESSONS for one in _of_file(lesson.short))
"""Every exercise of the course, in order."""


def find(key: str) -> Exercise:
    """Return an exercise by its id.

    Raises:
        CourseError: there is none of that id.
    """
    for one in ALL:
        if one.id == key:
            return one
    raise CourseError(f"there is no exercise {key!r}; there are {', '.join(one.id for one in ALL)}")


def of_lesson(short: str) -> tuple[Exercise, ...]:
    """Return the exercises of a lesson by its short name, as in ``"mla"``; none if it has none."""
    return tuple(one for one in ALL if one.lesson == short)
