"""The number of drafts that is chosen: the best one for the costs and the acceptance at hand, and cheaply found."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from speculating import NEVER, chain_model, prompts

from dsv3lib.errors import InputError
from dsv3lib.inference.acceptance import Round, SpeculationStatistics
from dsv3lib.inference.draft_count import (
    LOSES_AT_MOST,
    AdaptiveCount,
    FixedCount,
    count_of,
    tokens_of_a_round,
)


class World:
    """A machine whose passes cost what a table says, and text whose drafts stand with given probabilities.

    Args:
        seconds: of a round with m drafts. stands: of draft k, if all before it stood.
    """

    def __init__(self, seconds, stands, seed=0, noise=0.0):
        self.seconds, self.stands, self.time, self.noise = seconds, stands, 0.0, noise
        self.random, self.tokens, self.chosen = random.Random(seed), 0, []

    def clock(self):
        return self.time

    def run(self, count, rounds):
        for _ in range(rounds):
            m = count.next()
            self.chosen.append(m)
            self.time += self.seconds[m] * (1 + self.noise * self.random.random())
            accepted = 0
            while accepted < m and self.random.random() < self.stands[accepted]:
                accepted += 1
            self.tokens += accepted + 1
            count.saw(Round([[7] * m], [accepted], [[7] * (accepted + 1)]))

    def rate(self, m):
        return tokens_of_a_round(self.stands[:m]) / self.seconds[m]

    @property
    def best(self):
        return max(range(len(self.seconds)), key=self.rate)


@settings(max_examples=20)
@given(
    steps=st.lists(st.floats(0.02, 0.9), min_size=3, max_size=3),
    stands=st.lists(st.floats(0.1, 0.95), min_size=3, max_size=3),
    seed=st.integers(0, 99),
)
def test_it_comes_within_a_tenth_of_the_best_number_and_of_plain_decoding(steps, stands, seed):
    seconds = [1.0]
    for step in steps:
        seconds.append(seconds[-1] + step)
    world = World(seconds, stands, seed, noise=0.1)
    world.run(AdaptiveCount(3, clock=world.clock), 1000)
    got = world.tokens / world.time
    assert got > 0.9 * world.rate(world.best) / 1.05
    assert got > 0.95 / 1.05  # plain decoding: one token in 1 to 1.1 seconds


@pytest.mark.parametrize(
    "seconds, stands, best",
    [
        ([1.0, 2.0, 3.0], [0.6, 0.5], 0),  # a pass over two tokens costs two passes: drafts never pay
        ([1.0, 1.05, 1.1], [0.8, 0.8], 2),
        ([1.0, 1.05, 1.9], [0.8, 0.3], 1),
    ],
)
def test_most_rounds_have_the_best_number(seconds, stands, best):
    world = World(seconds, stands)
    assert world.best == best
    world.run(AdaptiveCount(2, clock=world.clock), 1000)
    assert world.chosen.count(best) > 900 and {0, 1} <= set(world.chosen)


def test_it_notices_when_drafts_begin_to_pay_and_when_they_stop():
    world = World([1.0, 1.2, 1.4], [0.05, 0.05])
    count = AdaptiveCount(2, clock=world.clock)
    world.run(count, 400)
    assert world.chosen[-100:].count(0) > 80
    world.stands = [0.95, 0.95]
    world.run(count, 1500)
    assert world.chosen[-300:].count(2) > 270
    world.stands = [0.05, 0.05]
    world.run(count, 400)
    assert world.chosen[-100:].count(0) > 80


@pytest.mark.parametrize(("stands", "best"), [([0.1, 0.1], 0), ([0.9, 0.9], 2)])
@pytest.mark.parametrize("seed", range(5))
def test_a_machine_that_is_quick_and_slow_by_turns_misleads_nobody(stands, best, seed):
    """Costs are compared with those of the moment: else what was tried in a quick second looks cheap in a slow one."""
    world, draw = World([1.0, 1.4, 1.7], stands, seed), random.Random(seed)
    count, lost = AdaptiveCount(2, clock=world.clock), 0.0
    for _ in range(40):
        factor = draw.uniform(1.0, 1.8)
        world.seconds = [factor * s for s in (1.0, 1.4, 1.7)]
        for _ in range(25):
            world.run(count, 1)
            m = world.chosen[-1]
            lost += world.seconds[m] - tokens_of_a_round(stands[:m]) / world.rate(best)
    assert world.chosen.count(best) > 600 and lost < 0.05 * world.time


def test_trials_lose_no_more_than_their_share():
    """With costs and acceptance that never move, all that is lost is lost in trials."""
    world = World([1.0, 3.0, 5.0], [0.0, 0.0])
    world.run(AdaptiveCount(2, clock=world.clock), 3000)
    assert 2 not in world.chosen
    lost = world.time - world.tokens * world.seconds[0]
    start = 3 * 2.0  # one draft is tried, whatever it costs; two could not win then
    assert 0 < lost - start <= LOSES_AT_MOST * world.time


def test_the_next_text_begins_with_what_the_last_one_taught():
    model = torch.nn.Identity()
    world = World([1.0, 1.2, 3.0], [0.9, 0.1])
    first = count_of("auto", 2, model, "a kind")
    first._clock = world.clock
    world.run(first, 200)
    world.chosen.clear()
    for kind, known in (("a kind", True), ("another kind", False)):
        again = count_of("auto", 2, model, kind)
        again._clock = world.clock
        assert again is not first
        world.run(again, 20)
        if known:
            assert world.chosen[-20:].count(1) >= 16
        else:
            assert set(world.chosen[-20:]) == {0, 1, 2}
    rates = [first.tokens_a_second(m) for m in range(3)]
    assert [count_of("auto", 2, model, "a kind").tokens_a_second(m) for m in range(3)] != rates  # it went on apart
    assert count_of("auto", 2).tokens_a_second(0) == 0 and count_of(2, 1, model, "a kind").next() == 2


def test_a_guess_that_is_not_made_counts_as_one_that_fell():
    """Prompt lookup often finds nothing; a few finds that stand must not look like an acceptance of 1."""
    count = AdaptiveCount(1, clock=lambda: 0.0)
    for i in range(200):
        count.next()
        count._now = 1
        found = i % 4 == 0
        count.saw(Round([[7]] if found else [[]], [int(found)], [[7, 7] if found else [7]]))
    assert 0.1 < count.acceptance()[0] < 0.4


@given(st.lists(st.floats(0, 1), max_size=6))
def test_tokens_of_a_round_are_the_sum_over_how_many_stood(acceptance):
    expected, reached = 0.0, 1.0
    for k, a in enumerate(acceptance):
        expected += (k + 1) * reached * (1 - a)
        reached *= a
    expected += (len(acceptance) + 1) * reached
    assert tokens_of_a_round(acceptance) == pytest.approx(expected)


@pytest.mark.parametrize("drafter", ["mtp", "lookup"])
def test_generation_with_auto_writes_the_same_text(drafter):
    model, ids, statistics = chain_model(1, 0.1), prompts(3, 5), SpeculationStatistics()
    out = model.generate(
        ids, 40, speculative=True, draft_tokens="auto", drafter=drafter, stop_tokens=NEVER, statistics=statistics
    )
    assert torch.equal(out, model.generate(ids, 40, stop_tokens=NEVER))
    assert sum(statistics.drafted) > 0 and statistics.tokens == 3 * 39


def test_words_and_numbers():
    assert isinstance(count_of("auto", 1), AdaptiveCount) and count_of("auto", 4).most == 5
    assert count_of(None, 3).next() == 3 and count_of(2, 3).next() == 2 and isinstance(count_of(2, 3), FixedCount)
    with pytest.raises(InputError, match="draft_tokens: 'many', expected a number from 1 on, or \"auto\""):
        count_of("many", 1)
    with pytest.raises(InputError, match="draft_tokens: -1, expected at least 1"):
        count_of(-1, 1)
