"""The two phases of a context extension, and the four ways to stretch RoPE."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import small, unchecked

from dsv3lib import ModelConfig
from dsv3lib.errors import ConfigError
from dsv3lib.layers.rope import rope_frequencies
from dsv3lib.training.loop.context_extension import METHODS, Phase, extended_config, phases


def test_v3_s_own_schedule_comes_out() -> None:
    """§4.3: 1,000 steps of 1,920 x 32K, then 1,000 of 480 x 128K."""
    assert phases(4096, 131_072, 1000, 1920 * 32_768) == (
        Phase(32_768, 1000, 1920),
        Phase(131_072, 1000, 480),
    )


@given(
    trained=st.integers(1, 5000),
    times=st.integers(2, 64),
    steps=st.integers(1, 9),
    tokens=st.integers(1, 10**6),
)
def test_lengths_rise_to_the_target_and_tokens_a_step_stay(
    trained: int, times: int, steps: int, tokens: int
) -> None:
    target = trained * times
    found = phases(trained, target, steps, tokens)
    lengths = [phase.length for phase in found]
    assert lengths == sorted(set(lengths)) and lengths[-1] == target and lengths[0] > trained
    assert len(found) == (1 if times == 2 else 2)
    for phase in found:
        assert phase.steps == steps
        assert phase.batch_size == 1 or tokens - phase.length < phase.batch_size * phase.length <= tokens


@pytest.mark.parametrize(
    ("trained", "target", "steps", "tokens", "says"),
    [
        (64, 64, 1, 1, "more than the trained length"),
        (64, 32, 1, 1, "extend: 32"),
        (64, 128, 0, 1, "steps"),
        (64, 128, 1, 0, "tokens a step"),
    ],
)
def test_what_cannot_be_scheduled_is_refused(
    trained: int, target: int, steps: int, tokens: int, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        phases(trained, target, steps, tokens)


def stretched(method: str, factor: float = 8.0) -> tuple[ModelConfig, torch.Tensor, torch.Tensor]:
    plain = small(qk_rope_head_dim=16, max_position_embeddings=64)
    config = extended_config(plain, method, 64, 512, factor)
    return config, rope_frequencies(config)[0], rope_frequencies(plain)[0]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_reads_the_target_and_goes_through_a_file(method: str) -> None:
    config, _, _ = stretched(method)
    assert config.max_position_embeddings == 512
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_each_method_does_to_the_frequencies_what_it_says() -> None:
    _, now, before = stretched("none")
    assert torch.equal(now, before)
    _, now, before = stretched("interpolation")
    torch.testing.assert_close(now * 8, before)
    _, now, before = stretched("ntk")
    assert now[0] == before[0]
    torch.testing.assert_close(now[-1] * 8, before[-1])
    assert ((before / now).diff() > 0).all()
    config, now, before = stretched("yarn")
    assert now[0] == before[0]
    torch.testing.assert_close(now[-1] * 8, before[-1])
    plain = config.replace(rope_scaling=None).softmax_scale
    assert config.softmax_scale / plain == pytest.approx((0.1 * math.log(8) + 1) ** 2)
    for method in ("none", "interpolation", "ntk"):
        assert stretched(method)[0].softmax_scale == plain


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": "dynamic"}, "expected one of yarn, interpolation, ntk, none"),
        ({"factor": 0.5}, "yarn factor: 0.5, expected a number >= 1"),
        ({"factor": 4.0}, r"at most factor x trained length \(4 x 64 = 256\)"),
        ({"dims": 2, "method": "ntk"}, "more than 2"),
    ],
)
def test_what_cannot_be_extended_is_refused(changes: dict, says: str) -> None:
    given_ = {"method": "yarn", "factor": 8.0, "dims": 4} | changes
    plain = small(qk_rope_head_dim=given_["dims"])
    with unchecked(), pytest.raises(ConfigError, match=says):
        extended_config(plain, given_["method"], 64, 512, given_["factor"])


def test_a_model_is_not_stretched_twice() -> None:
    config, _, _ = stretched("yarn")
    with pytest.raises(ConfigError, match="stretched already"):
        extended_config(config, "yarn", 512, 1024, 2.0)
