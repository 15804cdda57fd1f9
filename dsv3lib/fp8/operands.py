"""Operands of FP8 products: a matrix in E4M3 and the scales that its values are multiplied by.

An FP8 matrix instruction sums along a row of either operand, so each of a linear layer's three products wants its two
operands laid out, and scaled, along *its* sum: inputs and gradients in tiles of 1 x 128 along the row for one
product, along the tokens for another; weights in blocks of 128 x 128, which serve both ways (paper §3.3.2, Figure
7a). Widths that do not divide by 128 end with a shorter tile: V3's own 576 rows of ``kv_a_proj_with_mqa`` ask for
that. Tokens are filled up with zeros, which add nothing to a sum.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ..kernels.quantize.reference import TILE
from ..kernels.quantize.tiles_and_blocks import dequantize, quantize_blocks, quantize_tiles
from .formats import coarsen

Scaling = Literal["tile", "block", "tensor"]
ALIGNED = 16  # bytes: a GPU's copy engine reads rows that begin on such borders


class Operand(NamedTuple):
    """One side of a product.

    Args:
        values: E4M3 [rows, K], or a stack [E, rows, K].
        scales: FP32 [rows, ceil(K/128)], or one a block [ceil(rows/128), ceil(K/128)].
    """

    values: Tensor
    scales: Tensor


def along_rows(
    x: Float[Tensor, "M K"], scaling: Scaling = "tile", mantissa_bits: int = 3, power_of_two: bool = False
) -> Operand:
    """Quantise for a sum over K.

    Args:
        x: high precision. scaling: a scale per 1 x 128 tile, per 128 x 128 block, or one for the whole.
        mantissa_bits: fewer than E4M3's three make a coarser format. power_of_two: round tiles' scales up to one.
    """
    if scaling == "tile":
        values, scales = quantize_tiles(F.pad(x, (0, -x.shape[1] % TILE)), power_of_two)
        values = _cut(values, x.shape[1])
    else:
        values, scales = _blocks(x, scaling)
        scales = scales.repeat_interleave(TILE, 0)[: x.shape[0]]
    return Operand(coarsen(values, mantissa_bits), scales)


def along_columns(
    x: Float[Tensor, "M K"], scaling: Scaling = "tile", mantissa_bits: int = 3, power_of_two: bool = False
) -> Operand:
    """Quantise xᵀ for a sum over M, from the same high-precision values.

    Returns:
        values [K, P], P the next multiple of 128 from M; beyond M stand zeros. scales [K, P/128].
    """
    padded = F.pad(x, (0, 0, 0, -x.shape[0] % TILE))
    if scaling == "tile":
        values, scales = quantize_tiles(padded.t().contiguous(), power_of_two)
    else:
        values, scales = _blocks(padded, scaling)
        values, scales = turned(values), scales.t().repeat_interleave(TILE, 0)[: x.shape[1]]
    return Operand(coarsen(values, mantissa_bits), scales)


def weight_blocks(
    w: Float[Tensor, "*stack O I"], scaling: Scaling = "block", mantissa_bits: int = 3
) -> Operand:
    """Quantise a weight, or a stack of the experts' weights, in 128 x 128 blocks (or one scale a matrix)."""
    if w.ndim == 2:
        values, scales = _blocks(w, scaling)
    elif scaling == "tensor":
        pairs = [_blocks(one, scaling) for one in w]
        values, scales = (torch.stack(part) for part in zip(*pairs, strict=True))
    else:  # no block may belong to two experts
        rows = F.pad(w, (0, 0, 0, -w.shape[1] % TILE))
        values, scales = quantize_blocks(rows.flatten(0, 1))
        values = values.unflatten(0, rows.shape[:2])[:, : w.shape[1]]
        scales = scales.unflatten(0, (w.shape[0], -1))
    return Operand(coarsen(values, mantissa_bits), scales)


def transposed(weight: Operand) -> Operand:
    """The same weight for the product that sums over its rows: a square block's transpose has the block's scale."""
    return Operand(turned(weight.values), weight.scales.mT)


def turned(values: Float[Tensor, "*stack M K"]) -> Float[Tensor, "*stack K M"]:
    """E4M3 values transposed in memory."""
    return values.view(torch.uint8).mT.contiguous().view(values.dtype)


def restored(x: Operand, dtype: torch.dtype = torch.float32) -> Float[Tensor, "M K"]:
    """values · scales: what the products see of a matrix in tiles along its rows."""
    return dequantize(x.values, x.scales, dtype=dtype)


class Groups(NamedTuple):
    """The experts' rows with each group filled up to whole tiles, so that no scale belongs to two experts.

    Args:
        place: of each row, its place among the filled-up ones, Int64 [N]. counts: rows of each group then, Int64 [E].
        rows: of all groups together; on a GPU, where counts stay on the device, the most that they can be.
    """

    place: Tensor
    counts: Tensor
    rows: int

    @classmethod
    def of(cls, counts: Int[Tensor, " E"], n: int) -> Groups:
        """The groups of ``n`` rows of which each expert has ``counts``."""
        full = (counts + TILE - 1) // TILE * TILE
        expert = torch.repeat_interleave(
            torch.arange(len(counts), device=counts.device), counts, output_size=n
        )
        shift = full.cumsum(0) - full - (counts.cumsum(0) - counts)
        place = torch.arange(n, device=counts.device) + shift[expert]
        if counts.device.type == "cpu":
            rows = int(full.sum())
        else:
            rows = (n + len(counts) * (TILE - 1)) // TILE * TILE
        return cls(place, full, rows)

    def spread(self, x: Float[Tensor, "N K"]) -> Float[Tensor, "P K"]:
        """Rows at their places, zeros between."""
        return x.new_zeros(self.rows, x.shape[1]).index_copy_(0, self.place, x)


def aligned(values: Float[Tensor, "M K"]) -> Float[Tensor, "M K"]:
    """The same values in rows that a GPU's copy engine can read: each begins on a border of 16 bytes."""
    k = values.shape[-1]
    if k % ALIGNED == 0 and values.is_contiguous():
        return values
    return F.pad(values.view(torch.uint8), (0, -k % ALIGNED))[..., :k].view(values.dtype)


def _cut(values: Tensor, k: int) -> Tensor:
    """The first k columns, without the memory of the rest."""
    return values if values.shape[1] == k else values[:, :k].contiguous()


def _blocks(x: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor]:
    if scaling == "block":
        return quantize_blocks(x)
    values, scale = quantize_blocks(x, max(x.shape))
    return values, scale.expand(-(-x.shape[0] // TILE), -(-x.shape[1] // TILE))
