"""What both FP8 products are made of: slices of 128 along K, each multiplied alone, then promoted to FP32.

Two halves of a tile share the other operand: a 256 x 128 tile brings 48 KiB per 8.4 MFLOP, a 128 x 128 tile 32 KiB
per 4.2. At 900 TFLOP/s that is 5.2 and 7 TB/s out of L2. Their products are taken one after the other, because both
sums and *one* raw product are what 255 registers a thread hold (64 each, at 8 warps and 128 x 128).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..toolchain.language import INTERPRETED, TensorDescriptor, jit, tl


def describe(x: Tensor, rows: int, cols: int) -> Any:
    """A descriptor for the copy engine: it fetches [rows, cols] at once and fills with zeros past the edge."""
    return TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [rows, cols])


@jit
def promote(total, product, scale):
    """total + product · scale, at this place in the program and no later.

    Left to itself the assembler moves the additions past the next product to overlap the two, and then has two raw
    products to keep besides the sums: more than 255 registers. A volatile instruction stays where it is.
    """
    if INTERPRETED:
        return total + product * scale
    return tl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [product, scale, total], tl.float32, is_pure=False, pack=1
    )


@jit
def place(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile, walking down GROUP rows before the next column: neighbours share operands in L2."""
    strip = GROUP * tiles_n
    first = tile // strip * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    return first + tile % strip % height, tile % strip // height


@jit
def sum_of_slices(
    a, b, row, b_row, scale, inside, b_scale, stride_ak, stride_bk, next_half, inside_next, slices,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Both halves of a tile over all of K: rows ``row`` and ``row + BLOCK_M`` of a against ``b_row`` of b.

    ``scale`` points at the first half's scales, ``next_half`` elements on lie the second's; ``b_scale`` at the one
    scale of b's block. A slice's scales are read a slice ahead: four registers, and no promotion waits for memory.
    """
    first = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    second = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    factor_b = tl.load(b_scale)  # scalar
    factor = tl.load(scale, mask=inside, other=0.0)  # [BLOCK_M]
    if HALVES == 2:
        factor_next = tl.load(scale + next_half, mask=inside_next, other=0.0)  # [BLOCK_M]
    for s in tl.range(0, slices):
        x = a.load([row, s * 128])  # [BLOCK_M, 128]
        y = b.load([b_row, s * 128]).T  # [BLOCK_N, 128], turned
        scale += stride_ak
        b_scale += stride_bk
        more = s + 1 < slices
        coming_b = tl.load(b_scale, mask=more, other=0.0)  # scalar
        coming = tl.load(scale, mask=inside & more, other=0.0)  # [BLOCK_M]
        if HALVES == 2:
            coming_next = tl.load(scale + next_half, mask=inside_next & more, other=0.0)  # [BLOCK_M]
        first = promote(first, tl.dot(x, y), (factor * factor_b)[:, None])
        if HALVES == 2:
            # Read here and not above: it then arrives at a barrier of its own, and the wait for it is a border
            # that the assembler moves no promotion across.
            x = a.load([row + BLOCK_M, s * 128])  # [BLOCK_M, 128]
            second = promote(second, tl.dot(x, y), (factor_next * factor_b)[:, None])
            factor_next = coming_next
        factor, factor_b = coming, coming_b
    return first, second


@jit
def sum_of_tiled_slices(
    a, b, row, b_row, scale, inside, b_scale, stride_ak, stride_bk, first_slice, last_slice,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The same for 1 x 128 tiles on both sides, over a range of slices; ``b_scale`` points at BLOCK_N scales.

    Their pointers alone would fill 64 registers, so the scales come through shared memory with the operands.
    """
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for s in tl.range(first_slice, last_slice, num_stages=STAGES):
        x = a.load([row, s * 128])  # [BLOCK_M, 128]
        y = b.load([b_row, s * 128]).T  # [BLOCK_N, 128], turned
        factor_b = tl.load(b_scale)  # [BLOCK_N]
        factor = tl.load(scale, mask=inside, other=0.0)  # [BLOCK_M]
        total = promote(total, tl.dot(x, y) * factor_b[None, :], factor[:, None])
        scale += stride_ak
        b_scale += stride_bk
    return total
