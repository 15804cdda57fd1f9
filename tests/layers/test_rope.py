"""RoPE turns by position and nothing else; YaRN slows some pairs and leaves the others."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, assert_rejects, configs, small

from dsv3lib import ModelConfig, YarnScaling
from dsv3lib.layers.rope import RotaryEmbedding, apply_rope, rope_frequencies, yarn_ramp
from dsv3lib.rope_settings import LinearScaling

FP64 = torch.zeros(0, dtype=torch.float64)
FP32 = torch.zeros(0)


def turned(config: ModelConfig, x: torch.Tensor, position: int, turn=apply_rope) -> torch.Tensor:
    table = RotaryEmbedding(config).table(position + 1, FP64)
    return turn(x[None], table[position:])[0]


# ---- relative ---------------------------------------------------------------------------------------------


def check_relative(turn, config: ModelConfig, seed: int, i: int, j: int, shift: int) -> None:
    """⟨R_i q, R_j k⟩ depends on i − j alone."""
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, config.qk_rope_head_dim, dtype=torch.float64, generator=generator)
    here = turned(config, q, i, turn) @ turned(config, k, j, turn)
    there = turned(config, q, i + shift, turn) @ turned(config, k, j + shift, turn)
    torch.testing.assert_close(here, there, rtol=0, atol=1e-9)


def not_relative(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Cosine without sine: a scaling, not a turn."""
    return (x.unflatten(-1, (-1, 2)) * turns.real[..., None]).flatten(-2)


RELATIVE = {
    "config": configs(max_layers=1),
    "seed": SEEDS,
    "i": st.integers(0, 100),
    "j": st.integers(0, 100),
    "shift": st.integers(1, 1000),
}


@given(**RELATIVE)
def test_products_depend_only_on_the_distance(
    config: ModelConfig, seed: int, i: int, j: int, shift: int
) -> None:
    check_relative(apply_rope, config, seed, i, j, shift)


def test_the_check_rejects_a_scaling() -> None:
    assert_rejects(lambda **case: check_relative(not_relative, **case), **RELATIVE)


@given(config=configs(yarn=False, max_layers=1), seed=SEEDS, position=st.integers(0, 200))
def test_neighbours_are_turned_by_their_pair_s_angle(config: ModelConfig, seed: int, position: int) -> None:
    rope = config.qk_rope_head_dim
    x = torch.randn(rope, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = torch.empty_like(x)
    for i in range(0, rope, 2):
        angle = position * config.rope_theta ** (-i / rope)
        cos, sin = math.cos(angle), math.sin(angle)
        expected[i] = x[i] * cos - x[i + 1] * sin
        expected[i + 1] = x[i] * sin + x[i + 1] * cos
    torch.testing.assert_close(turned(config, x, position), expected, rtol=0, atol=1e-12)


def test_position_zero_is_left_alone() -> None:
    x = torch.randn(4, dtype=torch.float64)
    assert torch.equal(turned(small(), x, 0), x)


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
@pytest.mark.parametrize("width", [8, 9])
def test_slices_at_odd_places_can_be_turned(offset: int, width: int) -> None:
    wide = torch.randn(3, 5, width + offset)
    turns = RotaryEmbedding(small()).table(5, wide)
    piece = wide[..., offset : offset + 4]
    torch.testing.assert_close(apply_rope(piece, turns), apply_rope(piece.clone(), turns))


def test_small_dtypes_are_turned_in_fp32_and_come_back() -> None:
    x = torch.randn(7, 4).bfloat16()
    turns = RotaryEmbedding(small()).table(7, x)
    assert turns.dtype == torch.complex64
    y = apply_rope(x, turns)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, apply_rope(x.float(), turns).bfloat16())


# ---- the table --------------------------------------------------------------------------------------------


def test_angles_hold_at_the_far_end_of_v3_s_context() -> None:
    """In FP32 the angle itself, 163,839 rad, would be off by up to 0.008."""
    cfg = ModelConfig.preset("v3-671b")
    last = cfg.max_position_embeddings - 1
    turn = RotaryEmbedding(cfg).table(last + 1, FP32)[last, 0]
    assert abs(turn.real.item() - math.cos(last)) < 1e-6 and abs(turn.imag.item() - math.sin(last)) < 1e-6


def test_the_table_grows_and_keeps_what_it_said() -> None:
    rope = RotaryEmbedding(small())
    early = rope.table(5, FP32).clone()
    assert rope.table(400, FP32).shape == (400, 2)
    assert torch.equal(rope.table(5, FP32), early)
    assert rope.table(5, FP64).dtype == torch.complex128


def test_positions_are_looked_up_row_by_row() -> None:
    rope = RotaryEmbedding(small())
    positions = torch.tensor([[0, 3], [7, 1]])
    assert torch.equal(rope(positions, 8, FP32), rope.table(8, FP32)[positions])


def test_a_table_made_in_inference_mode_serves_training() -> None:
    rope = RotaryEmbedding(small())
    with torch.inference_mode():
        rope.table(4, FP32)
    x = torch.randn(4, 4, requires_grad=True)
    apply_rope(x, rope.table(4, FP32)).sum().backward()
    assert x.grad is not None


# ---- YaRN -------------------------------------------------------------------------------------------------


def test_v3_s_ramp_runs_from_pair_10_to_pair_23() -> None:
    cfg = ModelConfig.preset("v3-671b")
    ramp = yarn_ramp(cfg.rope_scaling, 64, cfg.rope_theta)
    assert ramp.shape == (32,)
    assert not ramp[:11].any() and (ramp[23:] == 1).all()
    assert 0 < ramp[11] and ramp[22] < 1
    assert torch.allclose(ramp[10:24].diff(), torch.tensor(1 / 13, dtype=torch.float64))


def test_v3_s_factor_on_cos_and_sin_is_one() -> None:
    assert rope_frequencies(ModelConfig.preset("v3-671b"))[1] == 1.0


def test_v3_keeps_fast_pairs_and_slows_the_slow_ones_forty_times() -> None:
    cfg = ModelConfig.preset("v3-671b")
    stretched, _ = rope_frequencies(cfg)
    plain, _ = rope_frequencies(cfg.replace(rope_scaling=None))
    assert torch.equal(stretched[:11], plain[:11])
    torch.testing.assert_close(stretched[23:] * 40, plain[23:], rtol=1e-14, atol=0)
    assert (stretched[11:23] < plain[11:23]).all() and (stretched[11:23] > plain[11:23] / 40).all()


def test_mscale_s_ratio_scales_cos_and_sin() -> None:
    yarn = YarnScaling(factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=0.5)
    cfg = small(rope_scaling=yarn)
    expected = (0.1 * math.log(40) + 1) / (0.05 * math.log(40) + 1)
    assert rope_frequencies(cfg)[1] == pytest.approx(expected)
    assert RotaryEmbedding(cfg).table(9, FP64).abs().sub(expected).abs().max() < 1e-12


@given(
    rope=st.integers(1, 40),
    theta=st.sampled_from([100.0, 1e4, 1e6]),
    original=st.integers(16, 8192),
    fast=st.floats(2, 64),
)
def test_factor_one_is_plain_rope(rope: int, theta: float, original: int, fast: float) -> None:
    yarn = YarnScaling(1.0, original, beta_fast=fast, mscale_all_dim=1.0)
    cfg = small(qk_rope_head_dim=2 * rope, rope_theta=theta, rope_scaling=yarn, max_position_embeddings=16)
    plain = cfg.replace(rope_scaling=None)
    torch.testing.assert_close(rope_frequencies(cfg)[0], rope_frequencies(plain)[0], rtol=1e-14, atol=0)
    assert rope_frequencies(cfg)[1] == 1.0 and cfg.softmax_scale == plain.softmax_scale


@given(config=configs(yarn=True, max_layers=1))
def test_no_pair_turns_faster_than_before_nor_slower_than_the_factor(config: ModelConfig) -> None:
    stretched, _ = rope_frequencies(config)
    plain, _ = rope_frequencies(config.replace(rope_scaling=None))
    ramp = yarn_ramp(config.rope_scaling, config.qk_rope_head_dim, config.rope_theta)
    assert (ramp.diff() >= 0).all() and ((ramp >= 0) & (ramp <= 1)).all()
    assert (stretched <= plain).all()
    assert (stretched * config.rope_scaling.factor >= plain * (1 - 1e-12)).all()


@given(pairs=st.integers(1, 40), theta=st.sampled_from([100.0, 1e4, 1e6]), factor=st.floats(1.0, 64.0))
def test_position_interpolation_slows_every_pair_and_changes_nothing_else(
    pairs: int, theta: float, factor: float
) -> None:
    plain = small(qk_rope_head_dim=2 * pairs, rope_theta=theta)
    stretched = plain.replace(rope_scaling=LinearScaling(factor))
    frequencies, magnitude = rope_frequencies(stretched)
    torch.testing.assert_close(frequencies * factor, rope_frequencies(plain)[0], rtol=1e-14, atol=0)
    assert magnitude == 1.0 and stretched.softmax_scale == plain.softmax_scale
