"""Decoupled rotary position embedding, and YaRN, which stretches it to long contexts.

RoPE turns pairs of dimensions by an angle that grows with the position, so that the product of a turned
query and a turned key depends only on their distance. A turn cannot pass through MLA's latent (it would sit
between two matrices that absorption multiplies past each other), so V3 gives each query 64 extra dimensions
and all heads together one extra 64-dimensional key, and turns only those (paper §2.1.1, Eqs. 3 and 8).

A pair (x_2i, x_2i+1) is read as one complex number and the turn is one complex multiplication. Neighbours
are pairs, as in the released checkpoint.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from ..config import ModelConfig
from ..rope_settings import LinearScaling, YarnScaling


def yarn_ramp(scaling: YarnScaling, dim: int, theta: float) -> Float[Tensor, " half"]:
    """How much of each frequency is interpolated: 0 keeps it, 1 divides it by ``factor`` ("YaRN by parts").

    A dimension that turns more than ``beta_fast`` times over the original length already tells positions
    apart and stays; one that turns less than ``beta_slow`` times would meet angles it never saw, and is slowed.

    Args:
        scaling: YaRN's settings. dim: rotary dimensions. theta: RoPE's base.

    Returns:
        FP64, one value per pair. V3: 0 up to pair 10, 1 from pair 23.
    """

    def pair_that_turns(times: float) -> float:
        return (
            dim
            * math.log(scaling.original_max_position_embeddings / (times * 2 * math.pi))
            / (2 * math.log(theta))
        )

    low = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(scaling.beta_slow)), dim - 1)
    width = max(high - low, 0.001)  # one step where both ends fall on the same pair
    return ((torch.arange(dim // 2, dtype=torch.float64) - low) / width).clamp(0, 1)


def rope_frequencies(config: ModelConfig) -> tuple[Float[Tensor, " half"], float]:
    """The angle per position of each pair, θ^(-2i/R), and the factor on cos and sin.

    YaRN has two corrections. This factor, mscale / mscale_all_dim, is 1.0 for V3; the other multiplies the
    softmax scale (``ModelConfig.softmax_scale``).

    Returns:
        Frequencies in radians per position, FP64, on the CPU; and the factor.
    """
    dim = config.qk_rope_head_dim
    frequencies = config.rope_theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies, 1.0
    if isinstance(scaling, LinearScaling):
        return frequencies / scaling.factor, 1.0
    ramp = yarn_ramp(scaling, dim, config.rope_theta)
    frequencies = frequencies * (1 - ramp) + frequencies / scaling.factor * ramp
    return frequencies, scaling.attention_factor


class RotaryEmbedding(nn.Module):
    """The table of turns, one complex number per position and pair; grown as positions are asked for.

    It holds no parameter and is not part of a checkpoint.

    Differs from the released code: angles are computed in FP64. In FP32 the fastest pair is off by 0.01 rad at
    position 160,000.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self._table: Tensor | None = None

    def table(self, length: int, like: Tensor) -> Complex[Tensor, "length half"]:
        """Turns for positions 0 to ``length`` - 1 on the device of ``like``, in its precision (at least FP32)."""
        dtype = torch.complex128 if like.dtype == torch.float64 else torch.complex64
        held = self._table
        if held is None or held.shape[0] < length or held.dtype != dtype or held.device != like.device:
            rows = max(
                length,
                256,
                0 if held is None else min(2 * held.shape[0], self.config.max_position_embeddings),
            )
            with torch.inference_mode(False):  # a table made while generating must serve training too
                frequencies, magnitude = rope_frequencies(self.config)
                angles = torch.arange(rows, dtype=torch.float64, device="cpu")[:, None] * frequencies
                held = torch.polar(torch.full_like(angles, magnitude), angles).to(
                    device=like.device, dtype=dtype
                )
            self._table = held
        return held[:length]

    def forward(
        self, positions: Int[Tensor, "B T"], length: int, like: Tensor
    ) -> Complex[Tensor, "B T half"]:
        """The turns of given positions, each below ``length``."""
        return self.table(length, like)[positions]


def apply_rope(
    x: Float[Tensor, "*batch rope"], turns: Complex[Tensor, "*turns half"]
) -> Float[Tensor, "*batch rope"]:
    """Turn each pair (x_2i, x_2i+1) by its angle (RoPE(·) in Eqs. 3 and 8).

    Args:
        x: neighbours are pairs. turns: broadcast against x read as complex numbers.
    """
    real = x if x.dtype == torch.float64 else x.float()
    real = real.reshape(*x.shape[:-1], -1, 2)
    if real.storage_offset() % 2 or any(step % 2 for step in real.stride()[:-1]):
        # Sliced off at an odd place, where torch reads no complex numbers, forward or backward.
        (a, b), cos, sin = real.unbind(-1), turns.real, turns.imag
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)
    return torch.view_as_real(torch.view_as_complex(real) * turns).flatten(-2).to(x.dtype)
