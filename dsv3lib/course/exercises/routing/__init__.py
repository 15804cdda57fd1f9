"""Exercises of 03_bias_based_routing: choice, groups, update, copies per node; a balance loss, and waiting."""

from __future__ import annotations

from dsv3lib.course.exercises.routing import balance, choice, load

EXERCISES = tuple(
    sorted(
        (*choice.EXERCISES, *balance.EXERCISES, *load.EXERCISES),
        key=lambda one: int(one.id.partition(".")[2]),
    )
)
