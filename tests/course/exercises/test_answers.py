"""Every exercise: its solution and other natural ways pass; each natural slip is rejected and named."""

from __future__ import annotations

import pytest

from dsv3lib.course.exercises import ALL
from dsv3lib.course.judge import judge
from dsv3lib.course.task import Exercise

BY_ID = {one.id: one for one in ALL}
LEAST = 5
"""Ways to be right beside the solution, and ways to be wrong, in the lessons that have the pattern."""
RIGHT = [(one.id, n) for one in ALL for n in range(len(one.also_right))]
WRONG = [(one.id, n) for one in ALL for n in range(len(one.wrong))]


@pytest.mark.parametrize("key", BY_ID)
def test_the_solution_is_right(key: str) -> None:
    verdict = judge(BY_ID[key], BY_ID[key].solution)
    assert verdict.state == "right", verdict.text


@pytest.mark.parametrize(("key", "number"), RIGHT, ids=lambda value: str(value))
def test_another_way_to_the_right_answer_passes(key: str, number: int) -> None:
    way = BY_ID[key].also_right[number]
    verdict = judge(BY_ID[key], way.function)
    assert verdict.state == "right", f"{way.how}: {verdict.text} {verdict.line}"


@pytest.mark.parametrize(("key", "number"), WRONG, ids=lambda value: str(value))
def test_a_slip_is_named(key: str, number: int) -> None:
    slip = BY_ID[key].wrong[number]
    verdict = judge(BY_ID[key], slip.function)
    assert verdict.state == "wrong", slip.why
    assert slip.says in verdict.text, f"{slip.why}: {verdict.text}"


@pytest.mark.parametrize("lesson", ["mla", "routing"])
def test_enough_ways_were_tried_and_no_two_slips_get_the_same_words(lesson: str) -> None:
    for one in (one for one in ALL if one.lesson == lesson):
        assert len(one.also_right) >= LEAST and len(one.wrong) >= LEAST, one.id
        assert all(slip.says for slip in one.wrong), one.id
        assert _distinct(one), one.id


def _distinct(one: Exercise) -> bool:
    said = [judge(one, slip.function).text for slip in one.wrong]
    # What is built on the way differs by its shape, and the sentence says which.
    return len(set(said)) == len(said)
