"""The simulator against a slow clock, the paper's figures, and costs that make no sense."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pipeline_clock import clockwork
from strategies import unchecked

from dsv3lib.errors import ConfigError
from dsv3lib.pipeline import SCHEDULES, schedule, simulate
from dsv3lib.pipeline.simulation import run_events

TIMES = st.integers(1, 4).map(lambda n: 2 * n)  # even: a chunk of half the size takes half


@given(
    name=st.sampled_from([*SCHEDULES]), stages=st.sampled_from([2, 4]), more=st.integers(0, 3),
    F=TIMES, inputs=TIMES, W=TIMES, FB=TIMES,
)  # fmt: skip
def test_it_agrees_with_a_clock(name, stages, more, F, inputs, W, FB):
    made = schedule(name, stages, 2 * stages + (0 if name == "interleaved" else 2 * more))
    B, FB = inputs + W, FB + W
    simulated = simulate(made, F=F, B=B, W=W, FB=FB)
    makespan, idle, starts = clockwork(made, {"F": F, "B": B, "I": inputs, "W": W, "FB": FB})
    assert (simulated.makespan, simulated.bubble) == (makespan, idle)
    assert {(event.rank, str(event.action)): event.start for event in simulated.timeline} == starts


@given(name=st.sampled_from([*SCHEDULES]), F=TIMES, B=TIMES, W=TIMES)
def test_no_name_decides_anything(name, F, B, W):
    made = schedule(name, 4, 8)
    renamed = made.copy("nobody knows me")
    costs = {"F": F, "B": B + W, "W": W}
    assert simulate(made, **costs).timeline == simulate(renamed, **costs).timeline
    assert simulate(made, **costs).peak_activations == simulate(renamed, **costs).peak_activations


def test_the_figures_of_the_paper():
    names = ("1f1b", "zb1p", "dualpipe")
    found = {name: simulate(schedule(name, 8, 20), F=1, B=2, W=1, FB=3) for name in names}
    assert {name: set(one.bubble) for name, one in found.items()} == {
        "1f1b": {21},
        "zb1p": {7},
        "dualpipe": {6},
    }
    assert [one.parameter_copies for one in found.values()] == [1, 1, 2]
    assert [max(one.peak_activations) for one in found.values()] == [8, 8, 9]
    assert found["dualpipe"].peak_activations == [9] * 8


def test_fractions_stay_exact():
    third = Fraction(1, 3)
    assert simulate(schedule("zb1p", 8, 20), F=third, B=2 * third, W=third).bubble == [7 * third] * 8
    assert simulate(schedule("zbv", 4, 8), F=third, B=2 * third, W=third).bubble == [third * 3 / 2] * 4


def test_live_activations_over_time():
    simulated = simulate(schedule("1f1b", 2, 3))
    assert simulated.live()[1] == [(1, 1), (4, 0), (4, 1), (7, 0), (7, 1), (10, 0)]
    zb = simulate(schedule("zb1p", 4, 8))
    assert (zb.peak_activations, zb.peak_live("I")) == ([4, 4, 4, 4], [4, 3, 2, 1])


def test_communication_delays_the_next_rank_and_what_is_not_overlapped_holds_the_sender():
    made = schedule("gpipe", 2, 1)
    assert simulate(made, communication=5).makespan == 1 + 5 + 1 + 2 + 5 + 2
    assert simulate(made, communication=5).bubble == [13, 13]
    both = [simulate(schedule("gpipe", 2, 4), communication=5, overlap=share) for share in (1, 0)]
    starts = [[event.start for event in one.by_rank[0][:4]] for one in both]
    assert starts == [[0, 1, 2, 3], [0, 6, 12, 18]]
    assert simulate(schedule("zbv", 1, 4), communication=9).bubble == [
        0
    ]  # both arms on one rank: nothing is sent


def test_any_duration_for_any_action():
    made = schedule("1f1b", 2, 2)
    events = run_events(made, lambda rank, action: 10 if rank == 1 and action.kind == "F" else 1)
    assert max(event.end for event in events) == 1 + 10 + 1 + 10 + 1 + 1


@pytest.mark.parametrize(
    "costs, word",
    [
        ({"F": -1}, "F: -1, expected a finite number >= 0"),
        ({"B": float("nan")}, "B: nan"),
        ({"W": float("inf")}, "W: inf"),
        ({"FB": "3"}, "FB: '3'"),
        ({"F": None}, "F: None"),
        ({"W": 3}, "W: 3, expected at most B"),
        ({"communication": -0.5}, "communication: -0.5"),
        ({"overlap": 1.5}, "overlap: 1.5, expected at most 1"),
        ({"F": True}, "F: True"),
    ],
)
def test_costs_that_make_no_sense(costs, word):
    with unchecked(), pytest.raises(ConfigError, match=word):
        simulate(schedule("1f1b", 2, 2), **costs)
