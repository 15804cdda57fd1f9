"""YaRN against arithmetic of forty digits and against transformers, over random parameters and positions."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from mpmath import mp, mpf
from strategies import assert_rejects, small
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

from dsv3lib import ModelConfig, YarnScaling
from dsv3lib.layers.rope import RotaryEmbedding, rope_frequencies

LONGEST = 163_840
FP32 = torch.zeros(0)
FP64 = torch.zeros(0, dtype=torch.float64)
DIGITS = 40
EPSILON_32, EPSILON_64 = 2.0**-23, 2.0**-52


@st.composite
def stretched(draw: st.DrawFn, both_mscales: bool = False) -> ModelConfig:
    """A configuration with any rotary part and any YaRN."""
    weights = [0.707, 1.0] if both_mscales else [0.0, 0.707, 1.0]
    original = draw(st.integers(64, 16_384))
    factor = draw(st.floats(1.0, 64.0, allow_nan=False))
    yarn = YarnScaling(
        factor, original, beta_fast=draw(st.floats(4.0, 64.0)), beta_slow=draw(st.floats(0.25, 3.0)),
        mscale=draw(st.sampled_from(weights)), mscale_all_dim=draw(st.sampled_from(weights)),
    )  # fmt: skip
    return small(
        qk_rope_head_dim=2 * draw(st.integers(1, 64)), rope_theta=draw(st.sampled_from([500.0, 1e4, 1e6])),
        rope_scaling=yarn, max_position_embeddings=max(1, min(LONGEST, int(factor * original))),
    )  # fmt: skip


def exact_frequencies(config: ModelConfig) -> tuple[list[mpf], mpf]:
    """YaRN by parts as its paper has it, pair by pair, in forty digits; and the factor on cos and sin."""
    yarn, dims, theta = config.rope_scaling, config.qk_rope_head_dim, mpf(config.rope_theta)

    def place(turns: float) -> mpf:
        """The pair, counted as a fraction, that turns so often over the original length."""
        once = mpf(yarn.original_max_position_embeddings) / (mpf(turns) * 2 * mp.pi)
        return dims * mp.log(once) / (2 * mp.log(theta))

    low = max(mp.floor(place(yarn.beta_fast)), mpf(0))
    high = min(mp.ceil(place(yarn.beta_slow)), mpf(dims - 1))
    width = max(high - low, mpf("0.001"))
    found = []
    for pair in range(dims // 2):
        slowed = min(max((pair - low) / width, mpf(0)), mpf(1))
        plain = theta ** (-mpf(2 * pair) / dims)
        found.append(plain * (1 - slowed) + plain / mpf(yarn.factor) * slowed)

    def temperature(weight: float) -> mpf:
        return 1 + mpf(weight) / 10 * mp.log(mpf(yarn.factor)) if yarn.factor > 1 else mpf(1)

    return found, temperature(yarn.mscale) / temperature(yarn.mscale_all_dim)


def check_exact(config: ModelConfig, share: float, frequencies_of=rope_frequencies) -> None:
    """Frequencies, and the turn at a place anywhere in the context, are what FP64 can say of the exact ones."""
    with mp.workdps(DIGITS):
        exact, magnitude = exact_frequencies(config)
        ours, factor = frequencies_of(config)
        assert abs(factor - magnitude) <= 4 * EPSILON_64 * magnitude
        for a, b in zip(ours.tolist(), exact, strict=True):
            assert abs(mpf(a) - b) <= 32 * EPSILON_64 * b
        position = int(share * (config.max_position_embeddings - 1))
        row = RotaryEmbedding(config).table(position + 1, FP64)[position].tolist()
        for turn, frequency in zip(row, exact, strict=True):
            angle = position * frequency
            allowed = float(magnitude) * (40 * EPSILON_64 * float(angle) + 4 * EPSILON_64)
            assert abs(mpf(turn.real) - magnitude * mp.cos(angle)) <= allowed
            assert abs(mpf(turn.imag) - magnitude * mp.sin(angle)) <= allowed


SHARES = st.floats(0.0, 1.0)


@given(config=stretched(), share=SHARES)
@example(config=ModelConfig.preset("v3-671b"), share=1.0)
def test_frequencies_and_turns_are_exact_in_fp64(config: ModelConfig, share: float) -> None:
    check_exact(config, share)


def in_fp32(config: ModelConfig) -> tuple[torch.Tensor, float]:
    frequencies, factor = rope_frequencies(config)
    return frequencies.float().double(), factor


def ends_not_rounded(config: ModelConfig) -> tuple[torch.Tensor, float]:
    """``truncate: false`` of other code: the ramp begins and ends between two pairs."""
    yarn, dims = config.rope_scaling, config.qk_rope_head_dim
    once = [yarn.original_max_position_embeddings / (turns * 2 * math.pi) for turns in (yarn.beta_fast, yarn.beta_slow)]
    ends = [dims * math.log(tokens) / (2 * math.log(config.rope_theta)) for tokens in once]
    low, high = max(ends[0], 0), min(ends[1], dims - 1)
    ramp = ((torch.arange(dims // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    plain, factor = rope_frequencies(config.replace(rope_scaling=None)), rope_frequencies(config)[1]
    return plain[0] * (1 - ramp) + plain[0] / yarn.factor * ramp, factor


def interpolated(config: ModelConfig) -> tuple[torch.Tensor, float]:
    """Position interpolation called YaRN: every pair is slowed."""
    plain, _ = rope_frequencies(config.replace(rope_scaling=None))
    return plain / config.rope_scaling.factor, rope_frequencies(config)[1]


@pytest.mark.parametrize("wrong", [in_fp32, ends_not_rounded, interpolated])
def test_the_check_rejects(wrong) -> None:
    def check(config: ModelConfig, share: float) -> None:
        check_exact(config, share, wrong)

    assert_rejects(check, config=stretched(), share=SHARES)


def test_position_zero_is_not_enough() -> None:
    """Any frequencies pass there; the same wrong ones are far off at the end of the context."""
    config = ModelConfig.preset("v3-671b")
    right, wrong = rope_frequencies(config)[0], interpolated(config)[0]
    gap = [float(((position * right).cos() - (position * wrong).cos()).abs().max()) for position in (0, LONGEST - 1)]
    assert gap[0] == 0.0 and gap[1] > 1.0


# ---- transformers -----------------------------------------------------------------------------------------------


def theirs(config: ModelConfig, positions: torch.Tensor) -> torch.Tensor:
    """transformers' turns as complex numbers, [positions, R/2]."""
    rotary = DeepseekV3RotaryEmbedding(DeepseekV3Config(**config.to_dict()))
    cos, sin = rotary(torch.zeros(1, 1), positions[None])
    half = config.qk_rope_head_dim // 2
    return torch.complex(cos[0, :, :half], sin[0, :, :half])


def check_transformers(config: ModelConfig, share: float, of=theirs) -> None:
    """Within what an angle in FP32 allows: it is rounded to position · 2⁻²³, so the tolerance grows with it."""
    last = int(share * (config.max_position_embeddings - 1))
    positions = torch.tensor([0, last // 2, last])
    ours = RotaryEmbedding(config).table(last + 1, FP32)[positions]
    magnitude = rope_frequencies(config)[1]
    off = (ours - of(config, positions)).abs().amax(-1)
    assert (off <= magnitude * (2 * positions * EPSILON_32 + 4 * EPSILON_32)).all(), off


@given(config=stretched(both_mscales=True), share=SHARES)
@example(config=ModelConfig.preset("v3-671b"), share=1.0)
def test_turns_are_transformers_within_fp32_angles(config: ModelConfig, share: float) -> None:
    check_transformers(config, share)


def one_position_on(config: ModelConfig, positions: torch.Tensor) -> torch.Tensor:
    return theirs(config, positions + 1)


def a_little_more_factor(config: ModelConfig, positions: torch.Tensor) -> torch.Tensor:
    yarn = config.rope_scaling
    more = YarnScaling(yarn.factor * 1.01, yarn.original_max_position_embeddings, yarn.beta_fast, yarn.beta_slow)
    return theirs(config.replace(rope_scaling=more), positions)


@pytest.mark.parametrize("wrong", [one_position_on, a_little_more_factor])
def test_transformers_check_rejects(wrong) -> None:
    def check(config: ModelConfig, share: float) -> None:
        check_transformers(config, share, wrong)

    assert_rejects(check, config=stretched(both_mscales=True), share=SHARES)


@pytest.mark.parametrize(("position", "known"), [(4096, 2.4e-5), (LONGEST - 1, 1.6e-3)])
def test_how_far_fp32_angles_are_off_at_v3_s_sizes(position: int, known: float) -> None:
    """The largest over positions near there; transformers' error, for ours is that of FP64."""
    config = ModelConfig.preset("v3-671b")
    positions = torch.arange(position - 4096, position)
    ours = RotaryEmbedding(config).table(position, FP64)[positions]
    off = (ours - theirs(config, positions)).abs().max().item()
    assert known / 4 < off <= 2 * position * EPSILON_32


# ---- the second correction ----------------------------------------------------------------------------------------


def test_v3_s_softmax_scale_has_the_temperature_squared() -> None:
    config = ModelConfig.preset("v3-671b")
    temperature = 0.1 * math.log(40) + 1
    plain = config.replace(rope_scaling=None, max_position_embeddings=4096).softmax_scale
    assert config.softmax_scale / plain == pytest.approx(1.87385, abs=5e-6)
    assert config.softmax_scale == pytest.approx(192**-0.5 * temperature**2) == pytest.approx(0.135234, abs=5e-7)
    assert config.softmax_scale / plain != pytest.approx(temperature, rel=0.1)  # the forgotten square


@given(config=stretched())
def test_the_two_corrections_are_exact(config: ModelConfig) -> None:
    yarn = config.rope_scaling
    with mp.workdps(DIGITS):
        temperature = 1 + mpf(yarn.mscale_all_dim) / 10 * mp.log(mpf(yarn.factor))
        expected = temperature**2 / mp.sqrt(config.qk_nope_head_dim + config.qk_rope_head_dim)
        assert abs(config.softmax_scale - expected) <= 8 * EPSILON_64 * expected
