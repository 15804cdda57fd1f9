"""Formulas and simulation: equal where the formulas hold, and seen to differ where they do not."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3lib.errors import ConfigError
from dsv3lib.pipeline import SCHEDULES, Costs, schedule, simulate
from dsv3lib.pipeline.closed_form import CLOSED_FORMS, closed_form, compare
from dsv3lib.pipeline.derivation import derive

EXACT = st.integers(1, 12).map(lambda n: Fraction(n, 4))


@pytest.mark.parametrize("name", [*CLOSED_FORMS])
@pytest.mark.parametrize("stages", [2, 4, 8, 16])
def test_bubble_activations_and_parameters(name, stages):
    simulated = simulate(schedule(name, stages, 2 * stages))
    form = closed_form(name)
    assert set(simulated.bubble) == {form.bubble(stages, Costs())}
    assert max(simulated.peak_activations) == form.activations(stages, 2 * stages)
    assert simulated.parameter_copies == form.parameters


@given(F=EXACT, share=st.integers(0, 4), stages=st.sampled_from([2, 4, 8]), more=st.integers(0, 5))
def test_the_papers_formulas_are_exact_with_inputs_as_long_as_f_and_w_no_longer(F, share, stages, more):
    W = F * share / 4
    costs = Costs(F=F, B=F + W, W=W)
    for name in ("1f1b", "zb1p", "dualpipe", "dualpipev"):
        result = compare(name, stages, 2 * stages + 2 * more, costs)
        assert result.formula == result.worst == result.least and result.agrees == "on every rank"


def test_where_the_formulas_do_not_hold():
    long_weights = compare("dualpipe", 8, 20, Costs(F=1, B=2.2, W=1.2))
    assert (round(long_weights.formula, 9), round(long_weights.worst, 9)) == (5.4, 6.0)
    assert long_weights.agrees == "no"
    short_pairs = compare("dualpipe", 8, 20, Costs(FB=2.5))
    assert (short_pairs.formula, short_pairs.worst, short_pairs.least) == (4.5, 4.5, 3.5)
    assert short_pairs.agrees == "on the worst rank"
    few = compare("zb1p", 8, 4)
    assert (few.formula, few.worst, few.agrees) == (7, 11, "no")


@pytest.mark.parametrize("name", [*SCHEDULES])
@pytest.mark.parametrize("rank", [0, 3])
def test_a_derivation_is_the_simulated_idle_time(name, rank):
    costs = Costs(F=1, B=1.75, W=0.75)
    made = schedule(name, 8, 16)
    derived = derive(made, rank, costs)
    assert derived.total.value == simulate(made, 1, 1.75, 0.75).bubble[rank]
    assert sum(gap.length.value for gap in derived.gaps) == derived.total.value
    forward, inputs, weights, pairs = derived.total.counts
    assert forward * 1 + inputs * 1 + weights * 0.75 + pairs * 2.75 == derived.total.value


def test_the_derived_formulas_can_be_read():
    costs = Costs(F=1, B=1.9, W=0.9)
    said = {name: str(derive(schedule(name, 8, 16), 3, costs).total) for name in ("1f1b", "zb1p", "dualpipe")}
    assert said == {
        "1f1b": "7 F + 7 B",
        "zb1p": "7 F + 7 B − 14 W",
        "dualpipe": "3 F&B + 3 F − 6 W",  # the paper's 3 (F&B + B − 3W), where I = B − W takes F
    }


def test_the_gaps_of_a_middle_rank_are_of_three_kinds():
    gaps = derive(schedule("dualpipe", 8, 20), 3, Costs(F=1, B=1.9, W=0.9)).gaps
    assert [(str(gap.before) if gap.before else "end", str(gap.length)) for gap in gaps] == [
        ("F0.0", "3 F"), ("B1.7", "F&B − B"), ("I1.8", "F&B − B"), ("I1.9", "F&B − B"), ("end", "3 B − 6 W"),
    ]  # fmt: skip


def test_an_unknown_schedule():
    with pytest.raises(ConfigError, match="there is no schedule 'pipedream'"):
        closed_form("pipedream")
