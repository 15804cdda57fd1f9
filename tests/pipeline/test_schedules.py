"""Each schedule: valid for every admissible size, refused for every other; its actions in their exact order."""

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import unchecked

from dsv3lib.errors import ConfigError, ScheduleError
from dsv3lib.pipeline import SCHEDULES, Action, pair, schedule, simulate, validate
from dsv3lib.pipeline.schedules.dualpipe import dualpipe


@st.composite
def sizes(draw, name: str, most: int = 64) -> tuple[int, int]:
    """Stages and micro-batches that a schedule admits."""
    kind = SCHEDULES[name]
    stages = draw(st.integers(1, most // 2)) * 2 if kind.even else draw(st.integers(1, most))
    extra = draw(st.integers(0, 12))
    if kind.even:
        return stages, 2 * stages + 2 * extra
    microbatches = max(1, kind.least * stages + extra)
    return stages, microbatches


@pytest.mark.parametrize("name", [n for n in SCHEDULES if n != "dualpipe"])
@settings(max_examples=5)
@given(data=st.data())
def test_every_size_is_valid(name, data):
    stages, microbatches = data.draw(sizes(name, 16))
    made = schedule(name, stages, microbatches)
    validate(made)
    assert made.microbatches == microbatches == sum(route.microbatches for route in made.routes)


@settings(max_examples=8)
@given(size=sizes("dualpipe"))
@example(size=(64, 128))
def test_dualpipe_is_valid_at_any_even_size_and_peaks_at_one_more_than_the_ranks(size):
    stages, microbatches = size
    with unchecked():  # a hundred thousand calls; the other tests check the annotations
        made = schedule("dualpipe", stages, microbatches)
        validate(made)
        simulated = simulate(made)
        assert simulated.peak_activations == [stages + 1] * stages == simulated.peak_live("I")
        assert simulated.bubble == [(stages // 2 - 1) * 2] * stages


def test_rank_0_of_dualpipe_in_the_order_of_the_eight_steps():
    row = schedule("dualpipe", 4, 12).rows()[0]
    assert row == (
        "F0.0 F0.1 F0.2 F1.0 I1.0 W1.0 F1.1 "
        "[F0.3 & B1.1] [F1.2 & B0.0] [F0.4 & B1.2] [F1.3 & B0.1] [F0.5 & B1.3] [F1.4 & B0.2] "
        "B1.4 [F1.5 & B0.3] B1.5 I0.4 W0.4 I0.5 W0.5"
    )


def test_a_middle_rank_of_dualpipe_does_not_overlap_its_first_pair():
    row = schedule("dualpipe", 4, 12).rows()[1]
    assert row.startswith("F0.0 F1.0 F0.1 F1.1 F0.2 B1.0 [F1.2 & B0.0] [F0.3 & B1.1]")


def test_the_second_half_mirrors_the_first():
    actions = schedule("dualpipe", 8, 24).actions

    def mirrored(action: Action) -> str:
        return re.sub(r"([FBIW])([01])", lambda found: found[1] + str(1 - int(found[2])), str(action))

    for rank in range(4):
        assert [mirrored(action) for action in actions[rank]] == [str(action) for action in actions[7 - rank]]


def test_1f1b_and_zb1p_by_hand():
    one = schedule("1f1b", 2, 3).rows()
    assert one == ["F0.0 F0.1 B0.0 F0.2 B0.1 B0.2", "F0.0 B0.0 F0.1 B0.1 F0.2 B0.2"]
    assert schedule("zb1p", 2, 3).rows()[1] == "F0.0 I0.0 F0.1 I0.1 W0.0 F0.2 I0.2 W0.1 W0.2"


@pytest.mark.parametrize("text", ["F0.3", "B1.2", "I1.2", "W1.2", "[F0.7 & B1.3]"])
def test_an_action_is_its_text(text):
    assert str(Action.parse(text)) == text


def test_a_pair_has_two_parts_and_the_forward_ones_numbers():
    both = pair(Action("F", 0, 7), Action("B", 1, 3))
    assert (both.kind, both.direction, both.microbatch, both.chunk) == ("FB", 0, 7, 0)
    assert [part.kind for part in both.singles()] == ["F", "B"]


@pytest.mark.parametrize("text", ["", "F0", "X0.1", "[F0.1]", "[B0.1 & F0.2]", "[F0.1 & W0.2]", "F-1.0"])
def test_what_is_no_action(text):
    with pytest.raises(ScheduleError):
        Action.parse(text)


@pytest.mark.parametrize(
    "name, stages, microbatches, word",
    [
        ("dualpipe", 7, 20, "stages: 7, expected an even"),
        ("dualpipe", 8, 21, "microbatches: 21, expected an even"),
        ("dualpipe", 8, 14, "at least 16"),
        ("dualpipev", 4, 7, "at least 8"),
        ("zbv", 4, 7, "at least 8"),
        ("interleaved", 4, 3, "at least 4"),
        ("1f1b", 0, 3, "stages: 0"),
        ("gpipe", 2, 0, "microbatches: 0"),
        ("pipedream", 2, 4, "there is no schedule 'pipedream'; there are gpipe, 1f1b"),
    ],
)
def test_sizes_that_no_schedule_has(name, stages, microbatches, word):
    with pytest.raises(ConfigError, match=word.replace("(", r"\(")):
        schedule(name, stages, microbatches)


def test_whole_backwards_in_step_6_are_still_valid_and_cost_a_longer_bubble():
    whole = dualpipe(8, 20, split_step_6=False)
    validate(whole)
    assert (simulate(whole).bubble, simulate(dualpipe(8, 20)).bubble) == ([10] * 8, [6] * 8)
