"""FP8 with one scale a tile: 1 x 128 for activations, 128 x 128 for weights (paper §3.3.2, Figure 7a).

E4M3 reaches from 2^-9 to 448. One scale for a whole tensor is set by its largest value, and everything a few
hundred times smaller falls to zero; one scale for each 128 values confines an outlier to its own tile. The
scale returned is what a stored value is *multiplied* by, as ``weight_scale_inv`` is in the released files,
despite its name.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..errors import KernelError

TILE = 128  # elements that share a scale along the inner dimension; V3's N_C
E4M3_MAX = 448.0


def quantize_tiles(x: Float[Tensor, "*M K"]) -> tuple[Tensor, Float[Tensor, "*M tiles"]]:
    """Quantise to E4M3 with one scale per 1 x 128 tile, amax / 448 (an all-zero tile gets 1).

    Args:
        x: FP32, BF16 or FP16; K divides by 128.

    Returns:
        values: float8_e4m3fn, the shape of x. scales: FP32 [..., K/128]; x ≈ values · scale.

    Raises:
        KernelError: K does not divide by 128.
    """
    if x.shape[-1] % TILE:
        raise KernelError(
            f"quantize_tiles: the last dimension is {x.shape[-1]}, expected a multiple of {TILE}"
        )
    tiles = x.float().unflatten(-1, (-1, TILE))
    scales = _scales(tiles.abs().amax(-1))
    return (tiles / scales[..., None]).flatten(-2).to(torch.float8_e4m3fn), scales


def quantize_blocks(w: Float[Tensor, "N K"], block: int = TILE) -> tuple[Tensor, Float[Tensor, "rows cols"]]:
    """Quantise a weight to E4M3 with one scale per ``block`` x ``block``; edges may be cut short.

    Returns:
        values: float8_e4m3fn [N, K]. scales: FP32 [ceil(N/block), ceil(K/block)].
    """
    rows, cols = -(-w.shape[0] // block), -(-w.shape[1] // block)
    padded = F.pad(w.float(), (0, cols * block - w.shape[1], 0, rows * block - w.shape[0]))
    scales = _scales(padded.view(rows, block, cols, block).abs().amax((1, 3)))
    return (w.float() / _spread(scales, w.shape, block)).to(torch.float8_e4m3fn), scales


def dequantize(
    values: Tensor, scales: Float[Tensor, "*s"], block: int = TILE, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*M K"]:
    """values · scale, for tiles (a scale per row and 128 columns) and for blocks (a scale per square).

    Args:
        values: float8_e4m3fn. scales: FP32, as either quantiser returned them. block: edge of a square.

    Raises:
        KernelError: the scales fit neither form.
    """
    cols = -(-values.shape[-1] // block)
    if scales.shape == (*values.shape[:-1], cols):
        return (values.float() * scales.repeat_interleave(block, -1)[..., : values.shape[-1]]).to(dtype)
    if values.ndim == 2 and scales.shape == (-(-values.shape[0] // block), cols):
        return (values.float() * _spread(scales, values.shape, block)).to(dtype)
    raise KernelError(
        f"dequantize: scales {tuple(scales.shape)} fit neither 1x{block} tiles nor {block}x{block} blocks "
        f"of values {tuple(values.shape)}"
    )


def _scales(amax: Tensor) -> Tensor:
    return torch.where(amax > 0, amax / E4M3_MAX, torch.ones_like(amax))


def _spread(scales: Tensor, shape: torch.Size, block: int) -> Tensor:
    return scales.repeat_interleave(block, 0)[: shape[0]].repeat_interleave(block, 1)[:, : shape[1]]
