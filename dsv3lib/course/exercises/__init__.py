"""The exercises, one file a lesson; found by their id."""

from __future__ import annotations

from dsv3lib.course.exercises import mla, routing, start
from dsv3lib.course.task import Exercise
from dsv3lib.errors import CourseError

ALL: tuple[Exercise, ...] = (*start.EXERCISES, *mla.EXERCISES, *routing.EXERCISES)
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
