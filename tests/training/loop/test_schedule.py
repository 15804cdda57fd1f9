"""Schedules: the paper's curves at the paper's tokens, and at any length."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3lib.errors import TrainingError
from dsv3lib.training.loop.schedule import Schedule, steps_for_seconds, steps_for_tokens
from dsv3lib.training.loop.settings import TrainingConfig


def test_the_papers_schedule_at_the_papers_tokens():
    """One step for each billion tokens; §4.2's corners must be where the paper has them."""
    config = TrainingConfig(steps=14_801, warmup_steps=1, learning_rate=2.2e-4)
    schedule = Schedule(config, 14_801)
    at = lambda billions: billions + 2  # noqa: E731  (the step after so many)
    assert schedule.learning_rate(at(0)) == schedule.learning_rate(at(9_999)) == 2.2e-4
    assert schedule.learning_rate(at(12_150)) == pytest.approx((2.2e-4 + 2.2e-5) / 2, rel=1e-3)
    assert schedule.learning_rate(at(14_301)) == pytest.approx(2.2e-5)
    assert schedule.learning_rate(at(14_632)) == pytest.approx(2.2e-5)
    assert schedule.learning_rate(at(14_634)) == pytest.approx(7.3e-6)
    assert (schedule.mtp_loss_weight(at(9_999)), schedule.mtp_loss_weight(at(10_001))) == (0.3, 0.1)
    assert (schedule.bias_speed(at(14_299)), schedule.bias_speed(at(14_301))) == (config.bias_speed, 0.0)


@given(st.integers(1, 400), st.integers(1, 30), st.integers(1, 64), st.integers(0, 40))
def test_curves_rise_once_and_fall_once(steps, warmup, batch, batch_warmup):
    config = TrainingConfig(
        steps=steps, warmup_steps=warmup, batch_size=batch, batch_warmup_steps=batch_warmup
    )
    schedule = Schedule(config, steps)
    rates = [schedule.learning_rate(s) for s in range(1, steps + 1)]
    peak = min(warmup, steps)
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak - 1 :] == sorted(
        rates[peak - 1 :], reverse=True
    )
    assert max(rates) <= config.learning_rate and min(rates) > 0
    sizes = [schedule.batch_size(s) for s in range(1, steps + 1)]
    assert sizes == sorted(sizes) and sizes[0] >= 1 and sizes[-1] <= batch
    assert steps <= batch_warmup or sizes[-1] == batch


def test_a_length_decided_early_moves_the_shares_and_not_the_rise():
    config = TrainingConfig(minutes=1.0, warmup_steps=10, batch_warmup_steps=10)
    early, late = Schedule(config, 100, decided_after=4), Schedule(config, 100)
    assert [early.share(s) for s in (4, 5, 6)] == [0.0, 0.0, 1 / 96] and late.share(10) == 0.0
    for curve in ("learning_rate", "batch_size"):
        assert [getattr(early, curve)(s) for s in range(1, 12)] == [
            getattr(late, curve)(s) for s in range(1, 12)
        ]
    assert early.learning_rate(100) == late.learning_rate(100) == config.learning_rate * config.tail_ratio


def test_a_slow_machine_decides_before_its_warm_up_is_over(make, monkeypatch):
    trainer = make(minutes=1.0, warmup_steps=20, batch_size_start=4, validation_batches=0)
    monkeypatch.setattr("dsv3lib.training.loop.trainer.time.perf_counter", iter(range(0, 10_000, 4)).__next__)
    records = list(trainer)  # four seconds a step
    assert trainer.schedule.decided_after == 2 and len(records) == 2 + (60 - 8) // 4


def test_nothing_in_the_warm_up_depends_on_the_length_and_nothing_after_it_goes_without():
    config = TrainingConfig(minutes=1.0, warmup_steps=5)
    undecided = Schedule(config, None)
    for total in (6, 1000):
        decided = Schedule(config, total)
        for curve in ("learning_rate", "batch_size", "mtp_loss_weight", "bias_speed"):
            assert [getattr(undecided, curve)(s) for s in range(1, 6)] == [
                getattr(decided, curve)(s) for s in range(1, 6)
            ]
    with pytest.raises(TrainingError, match="must be decided by step 5"):
        undecided.learning_rate(6)


@given(st.integers(1, 100_000), st.integers(1, 20), st.integers(0, 30), st.integers(2, 64))
def test_steps_for_tokens_are_enough_and_not_one_too_many(tokens, batch, batch_warmup, length):
    config = TrainingConfig(tokens=tokens, batch_size=batch, batch_warmup_steps=batch_warmup)
    steps = steps_for_tokens(config, length, tokens)
    sizes = [Schedule(config, None).batch_size(s) * length for s in range(1, steps + 1)]
    assert sum(sizes[:-1]) < tokens <= sum(sizes)


def test_steps_for_seconds_fill_the_time_and_always_leave_one():
    config = TrainingConfig(minutes=1.0, batch_size=8, batch_size_start=8, warmup_steps=5)
    assert steps_for_seconds(config, 5, seconds_left=40.0, seconds_per_sequence=0.5) == 15
    assert steps_for_seconds(config, 5, seconds_left=-3.0, seconds_per_sequence=0.5) == 6
