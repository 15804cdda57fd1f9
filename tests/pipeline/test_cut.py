"""The cut of a model into stages, against every cut that there is."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3lib import ModelConfig
from dsv3lib.errors import ConfigError
from dsv3lib.pipeline import schedule
from dsv3lib.pipeline.cut import borders, least_largest, stage_costs
from dsv3lib.pipeline.runtime.layout import parts_of_ranks

costs_and_stages = st.lists(st.floats(0.01, 100), min_size=1, max_size=9).flatmap(
    lambda costs: st.tuples(st.just(costs), st.integers(1, len(costs)))
)


def every_cut(count, stages):
    return [[0, *inner, count] for inner in combinations(range(1, count), stages - 1)]


def loads(costs, cut, mirrored):
    """(largest load of a rank, largest stage)."""
    of_stage = stage_costs(costs, cut)
    pairs = [a + b for a, b in zip(of_stage, of_stage[::-1], strict=True)]
    return (max(pairs), max(of_stage)) if mirrored else (max(of_stage), max(of_stage))


@given(drawn=costs_and_stages)
def test_the_largest_stage_is_as_small_as_in_any_cut(drawn):
    costs, stages = drawn
    best = min(loads(costs, cut, False)[0] for cut in every_cut(len(costs), stages))
    cut = borders(costs, stages)
    assert loads(costs, cut, False)[0] == pytest.approx(best) == pytest.approx(least_largest(costs, stages))
    assert len(cut) == stages + 1 and all(a < b for a, b in zip(cut, cut[1:], strict=False))


@given(drawn=costs_and_stages)
def test_the_fullest_rank_is_as_small_as_in_any_cut_where_it_holds_both_ends(drawn):
    costs, stages = drawn
    if stages % 2:
        with pytest.raises(ConfigError, match="even"):
            borders(costs, stages, mirrored=True)
        return
    found = loads(costs, borders(costs, stages, mirrored=True), True)
    every = [loads(costs, cut, True) for cut in every_cut(len(costs), stages)]
    load = min(every)[0]
    stage = min(stage for rank, stage in every if rank <= load * (1 + 1e-12))
    assert found == (pytest.approx(load), pytest.approx(stage))


def test_both_ends_on_one_rank_count_together():
    costs = [3.0, 1, 1, 1, 1, 1, 1, 4.0]  # a heavy embedding and a heavier head
    apart, together = borders(costs, 4), borders(costs, 4, mirrored=True)
    assert loads(costs, apart, True)[0] > 7 and loads(costs, together, True) == (7, 4)


@pytest.mark.parametrize("stages", [0, 4])
def test_too_many_stages_are_refused(stages):
    with pytest.raises(ConfigError, match=f"stages: {stages}"):
        borders([1.0, 2.0, 3.0], stages)


def test_measured_costs_move_the_cut():
    config = ModelConfig.preset("nano").replace(num_hidden_layers=7)
    plan = schedule("1f1b", 4, 4)
    slow_first = parts_of_ranks(config, plan, costs=[9.0, 1, 1, 1, 1, 1, 1, 1])
    slow_head = parts_of_ranks(config, plan, costs=[1.0, 1, 1, 1, 1, 1, 1, 9])
    assert slow_first[0][0].blocks == (0,) and slow_head[3][0].blocks == ()
    both_ways = parts_of_ranks(config, schedule("dualpipe", 4, 8), costs=[5.0, 1, 1, 1, 1, 1, 1, 5])
    assert both_ways[0][0].blocks == (0,) and both_ways[0][1].blocks == () and both_ways[0][1].last
    with pytest.raises(ConfigError, match="costs: 3"):
        parts_of_ranks(config, plan, costs=[1.0, 2.0, 3.0])
