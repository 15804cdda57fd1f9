"""The two layouts of rotary dimensions, interleaved pairs and split halves, and the way between them.

The released checkpoint, and so every layer here, takes neighbours as pairs: (x_0, x_1), (x_2, x_3), …
(GPT-J's layout). Many ports take x_i with x_{i + R/2} instead (GPT-NeoX's and transformers' ``rotate_half``). It is
the same rotation of the same numbers in another order. A score is a sum over all dimensions, so it does not change
where queries and keys agree; what is cached does. A key that one layout wrote and the other reads is garbage.
"""

from __future__ import annotations

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from ..errors import InputError


def to_halves(x: Float[Tensor, "*batch rope"]) -> Float[Tensor, "*batch rope"]:
    """Interleaved to split: x_0, x_2, x_4, …, then x_1, x_3, x_5, …

    Args:
        x: rotary dimensions last, neighbours are pairs.

    Raises:
        InputError: an odd number of dimensions has no pairs.
    """
    _require_pairs(x)
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def to_pairs(x: Float[Tensor, "*batch rope"]) -> Float[Tensor, "*batch rope"]:
    """Split to interleaved: the inverse of ``to_halves``.

    Args:
        x: rotary dimensions last, x_i and x_{i + R/2} are a pair.

    Raises:
        InputError: an odd number of dimensions has no pairs.
    """
    _require_pairs(x)
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def apply_rope_to_halves(
    x: Float[Tensor, "*batch rope"], turns: Complex[Tensor, "*turns half"]
) -> Float[Tensor, "*batch rope"]:
    """RoPE(·) of Eqs. 3 and 8 on the split layout: equal to ``to_halves(apply_rope(to_pairs(x), turns))``.

    Args:
        x: x_i and x_{i + R/2} are a pair. turns: as ``apply_rope`` takes them.

    Raises:
        InputError: an odd number of dimensions has no pairs.
    """
    _require_pairs(x)
    first, second = x.chunk(2, -1)
    cos, sin = turns.real, turns.imag
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1).to(x.dtype)


def _require_pairs(x: Tensor) -> None:
    if x.ndim == 0 or x.shape[-1] % 2:
        raise InputError(
            f"x: has {x.shape[-1] if x.ndim else 'no'} rotary dimensions, expected an even number: a rotation takes "
            "them in pairs"
        )
