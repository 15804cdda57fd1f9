"""The validator accepts what can run and names what cannot: every way to spoil a schedule that we thought of."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3lib.errors import ScheduleError
from dsv3lib.pipeline import SCHEDULES, Action, Schedule, schedule, simulate, validate
from dsv3lib.pipeline.actions import straight


def by_hand(*rows: str, microbatches: int = 2) -> Schedule:
    split = [[text for text in row.replace("[", " [").split(" ") if text] for row in rows]
    return Schedule.by_hand(split, straight(len(rows), microbatches))


def said(spoiled: Schedule) -> str:
    with pytest.raises(ScheduleError) as caught:
        validate(spoiled)
    return str(caught.value)


def test_a_schedule_by_hand():
    validate(by_hand("F0.0 F0.1 B0.0 B0.1", "F0.0 B0.0 F0.1 I0.1 W0.1"))


@pytest.mark.parametrize(
    "rows, words",
    [
        (("F0.0 F0.1 B0.0 B0.1", "F0.0 B0.0 B0.1"), "rank 1 of 'by hand': F0.1 is missing"),
        (("F0.0 F0.1 B0.0 B0.1", "F0.0 B0.0 F0.1"), "F0.1 has no backward"),
        (("F0.0 F0.1 B0.0 B0.1", "F0.0 B0.0 F0.1 I0.1"), "W0.1, the weights' part, is missing"),
        (("F0.0 F0.1 B0.0 B0.1", "F0.0 B0.0 F0.1 W0.1 I0.1"), "W0.1 stands before I0.1"),
        (("F0.0 F0.1 B0.0 B0.1", "B0.0 F0.0 F0.1 B0.1"), "B0.0 stands before its forward"),
        (("F0.0 F0.1 B0.0 B0.1", "F0.0 F0.0 B0.0 F0.1 B0.1"), "F0.0 stands there twice"),
        (("F0.0 F0.1 B0.0 B0.1", "F0.0 B0.0 F0.1 B0.1 W0.1"), "W0.1 does a part of it again"),
        (("F0.0 F0.1 B0.0 B0.1", "F0.0 B0.0 F0.2 B0.2"), r"micro-batch 2, expected one in \[0, 2\)"),
        (("F0.0 F0.1 B0.0 B0.1", "F0.0 B0.0 F1.1 B1.1"), "no direction or chunk 1 here"),
        (("F0.1 F0.0 B0.0 B0.1", "F0.0 F0.1 B0.0 B0.1"), "same order"),
    ],
)
def test_what_is_wrong_is_named(rows, words):
    with pytest.raises(ScheduleError, match=words):
        validate(by_hand(*rows))


def test_a_deadlock_names_the_actions_that_wait_for_each_other():
    message = said(by_hand("F0.0 B0.0 F0.1 B0.1", "F0.0 F0.1 B0.0 B0.1"))
    assert "rank 0 waits at B0.0 for rank 1's B0.0" in message
    assert "rank 1 waits at F0.1 for rank 0's F0.1" in message


def test_the_simulator_refuses_a_deadlock_too():
    with pytest.raises(ScheduleError, match="rank 1 waits at F0.1"):
        simulate(by_hand("F0.0 B0.0 F0.1 B0.1", "F0.0 F0.1 B0.0 B0.1"))


def test_a_pair_that_needs_itself_on_the_last_rank():
    one = Schedule.by_hand([["[F0.0 & B0.0]"]], straight(1, 1))
    assert "for a part of itself" in said(one)


def test_kinds_and_pairs_made_wrongly():
    rows = schedule("1f1b", 1, 1)
    spoiled = rows.copy()
    spoiled.actions[0][0] = Action("FB", 0, 0)
    assert "has 0 parts" in said(spoiled)
    spoiled.actions[0][0] = Action("FB", 0, 0, (Action("B", 0, 0), Action("F", 0, 0)))
    assert "a forward F and a whole backward B" in said(spoiled)
    spoiled = rows.copy()
    spoiled.actions.append([])
    assert "2 ranks, expected 1" in said(spoiled)


@given(data=st.data(), name=st.sampled_from([*SCHEDULES]))
def test_an_action_lost_or_doubled_is_noticed_in_any_schedule(data, name):
    spoiled = schedule(name, 4, 8)
    row = spoiled.actions[data.draw(st.integers(0, 3))]
    place = data.draw(st.integers(0, len(row) - 1))
    lost = row[place]
    if data.draw(st.booleans()):
        del row[place]
    else:
        row.insert(data.draw(st.integers(0, len(row))), lost)
    message = said(spoiled)
    assert any(f"{single.direction}.{single.microbatch}" in message for single in lost.singles())


@given(data=st.data(), name=st.sampled_from([*SCHEDULES]))
def test_two_actions_swapped_either_run_or_are_named(data, name):
    rank, spot = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 12))
    spoiled = schedule(name, 4, 8).swapped(rank, spot, spot + data.draw(st.integers(1, 3)))
    try:
        validate(spoiled)
    except ScheduleError as error:
        assert any(str(action) in str(error) for row in spoiled.actions for action in row)
    else:
        assert simulate(spoiled).makespan >= simulate(schedule(name, 4, 8)).makespan - 3
