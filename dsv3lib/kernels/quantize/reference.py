"""The quantisers in plain PyTorch: what the kernels of ``quantize.py`` must equal to the last bit.

One operation after another in FP32, each rounded as IEEE says; a whole pass over memory for each.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ...errors import KernelError
from ...numerics import E4M3_MAX, TILE

E5M6_MAX = 65024.0  # (2 - 2^-6) · 2^15
LEAST_SCALE = 2.0**-126  # FP32's smallest normal number: below it neither a scale nor its inverse is exact

Format = Literal["e4m3", "e5m6"]


class BothWays(NamedTuple):
    """A matrix quantised along its rows, and transposed along its columns.

    Args:
        values: E4M3 [M, K].
        scales: FP32, one a tile or block of ``values``.
        values_t: E4M3 [K, M], M padded with zeros to a multiple of 128 for tiles.
        scales_t: those of ``values_t``.
    """

    values: Tensor
    scales: Tensor
    values_t: Tensor
    scales_t: Tensor


def quantize_tiles_ref(
    x: Float[Tensor, "*M K"], power_of_two: bool = False, format: Format = "e4m3"
) -> tuple[Float[Tensor, "*M K"], Float[Tensor, "*M tiles"]]:
    """``quantize_tiles``."""
    tiles = x.float().unflatten(-1, (x.shape[-1] // TILE, TILE))
    scales, inverse = scale_and_inverse_ref(_amax(tiles, (-1,)), power_of_two, format)
    scaled = (tiles * inverse[..., None]).flatten(-2)
    return to_e5m6_ref(scaled) if format == "e5m6" else scaled.to(torch.float8_e4m3fn), scales


def quantize_tiles_both_ref(x: Float[Tensor, "M K"], power_of_two: bool = False) -> BothWays:
    """``quantize_tiles_both``: two passes, the second over a transposed, padded copy."""
    transposed = F.pad(x, (0, 0, 0, -x.shape[0] % TILE)).t()
    return BothWays(*quantize_tiles_ref(x, power_of_two), *quantize_tiles_ref(transposed, power_of_two))


def quantize_blocks_ref(
    w: Float[Tensor, "N K"], block: int = TILE, power_of_two: bool = False
) -> tuple[Float[Tensor, "N K"], Float[Tensor, "rows cols"]]:
    """``quantize_blocks``."""
    rows, cols = -(-w.shape[0] // block), -(-w.shape[1] // block)
    padded = F.pad(w.float(), (0, cols * block - w.shape[1], 0, rows * block - w.shape[0]))
    scales, inverse = scale_and_inverse_ref(_amax(padded.view(rows, block, cols, block), (1, 3)), power_of_two, "e4m3")
    return (w.float() * _spread(inverse, w.shape, block)).to(torch.float8_e4m3fn), scales


def dequantize_ref(
    values: Tensor, scales: Float[Tensor, "*s"], block: int = TILE, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*M K"]:
    """``dequantize``."""
    if scale_height(values, scales, block) == 1:
        return (values.float() * scales.repeat_interleave(block, -1)[..., : values.shape[-1]]).to(dtype)
    return (values.float() * _spread(scales, values.shape, block)).to(dtype)


def to_e5m6_ref(x: Float[Tensor, "*M"]) -> Float[Tensor, "*M"]:
    """FP32 to the nearest value of E5M6, ties to even, as FP16; for |x| up to 65024 · (1 + 2^-8).

    FP32 has 17 bits of mantissa more. Adding half of the last kept bit (less one where that bit is even) and
    cutting off rounds to nearest even, and carries into the exponent where it must. Below 2^-14 neighbours lie
    2^-20 apart, as FP32's do from 8 to 16: adding 8 and taking it away rounds there.
    """
    bits = x.view(torch.int32)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0xFFFF + ((size >> 17) & 1)) & ~0x1FFFF).view(torch.float32)
    rounded = torch.where(x.abs() < 2.0**-14, (x.abs() + 8.0) - 8.0, normal)
    return torch.where(x.isnan(), x, rounded.copysign(x)).half()


def _amax(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    if not x.numel():  # torch takes no maximum of nothing
        return x.new_zeros([n for i, n in enumerate(x.shape) if i not in {d % x.ndim for d in dims}])
    return x.abs().amax(dims)


def scale_and_inverse_ref(amax: Tensor, power_of_two: bool, format: Format) -> tuple[Tensor, Tensor]:
    """Scales of tiles whose largest sizes are ``amax``, and their inverses, both FP32."""
    limit = E5M6_MAX if format == "e5m6" else E4M3_MAX
    if power_of_two:
        # limit = mantissa · 2^exponent: a larger mantissa needs the next power, which the carry makes.
        mantissa, exponent = (0x7E0000, 15) if format == "e5m6" else (0x600000, 8)
        biased = ((amax.view(torch.int32) + (0x7FFFFF - mantissa)) >> 23) - exponent
        scale = (biased.clamp(min=1) << 23).view(torch.float32)
    else:
        # Times the inverse: on a GPU torch itself replaces a division by a number so, on a CPU it does not.
        scale = (amax * (1 / limit)).clamp(min=LEAST_SCALE)
    scale = torch.where(amax == 0, 1.0, scale)
    scale = torch.where(amax.isfinite(), scale, float("nan"))
    return scale, torch.ones_like(scale) / scale


def _spread(scales: Tensor, shape: torch.Size, block: int) -> Tensor:
    return scales.repeat_interleave(block, 0)[: shape[0]].repeat_interleave(block, 1)[:, : shape[1]]


def scale_height(values: Tensor, scales: Tensor, block: int) -> int:
    """Rows of values that share a row of scales: 1 for tiles, ``block`` for blocks."""
    cols = -(-values.shape[-1] // block)
    if scales.shape == (*values.shape[:-1], cols):
        return 1
    if values.ndim == 2 and scales.shape == (-(-values.shape[0] // block), cols):
        return block
    raise KernelError(
        f"dequantize: scales {tuple(scales.shape)} fit neither 1x{block} tiles nor {block}x{block} blocks "
        f"of values {tuple(values.shape)}"
    )
