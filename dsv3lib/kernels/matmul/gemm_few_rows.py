"""The FP8 product for few rows (M up to a few hundred: decoding), whose limit is the weights' bytes.

At M = 64, N = 24576, K = 7168 the weights are 176 MB and all else 4 MB: 37 µs at 4.8 TB/s, in which the tensor cores
could do three times the work. So a tile is short, many stages of weights are on their way at once, and K is split
until every multiprocessor has work. The parts are added in their order by a second, small kernel: the same bits on
every run, where atomic additions would give others each time. Up to 32 rows Cᵀ = B Aᵀ is computed: the weight fills
the 64 rows that Hopper's matrix instruction always has, and M becomes the side that can be as narrow as 16.

From 65 rows on the activations count too: each tile reads them anew out of L2. A 128 x 128 tile brings as many bytes
of them as of weights, a 128 x 256 tile half as many: hence two halves that share them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...numerics import TILE
from ..toolchain import tuning
from ..toolchain.language import jit, row_offset, tl, to_bf16, triton
from ..toolchain.targets import processors
from .fp8_slices import describe, promote

LEAST_SLICES = 4  # of K in a part, when K is split: fewer would not fill the pipeline


def launch_few_rows(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, c: Tensor, tiled: bool, add: bool,
    settings: dict[str, Any],
) -> None:  # fmt: skip
    """c (+)= A Bᵀ; arguments as ``gemm_fp8`` has checked them."""
    m, n, slices = a.shape[0], b.shape[0], triton.cdiv(a.shape[1], TILE)
    wanted = processors(a.device) * settings.pop("PER_PROCESSOR")
    settings.pop("FEW_ROWS")
    rows, cols = settings["BLOCK_M"], settings["BLOCK_N"]
    tiles = triton.cdiv(m, rows) * triton.cdiv(n, cols * settings["HALVES"])
    parts = max(1, min(wanted // tiles, slices // LEAST_SLICES))
    part_slices = triton.cdiv(slices, parts)
    parts = triton.cdiv(slices, part_slices)
    direct = parts == 1 and not add
    out = c if direct else a.new_empty(parts, m, n, dtype=torch.float32)
    gemm_fp8_few_rows_kernel[(tiles, parts)](
        describe(a, rows, TILE), describe(b, cols, TILE), out, a_scales, b_scales,
        m, n, slices * TILE, *a_scales.stride(), *b_scales.stride(), m * n, n, part_slices,
        TILED=tiled, CUT=bool(n % cols), **settings,
    )  # fmt: skip
    if not direct:
        adding = tuning.pick("sum_of_parts", a.device)
        grid = (triton.cdiv(m * n, adding["BLOCK"]),)
        sum_of_parts_kernel[grid](out, c, m * n, parts, ADD=add, **adding)


@jit
def scaled(total, x, y, factor, factor_b, SWAP: tl.constexpr, TILED: tl.constexpr):
    """total + (x yᵀ) · both scales; with SWAP the transposed: total + (y xᵀ) · both scales."""
    product = tl.dot(y, x.T) if SWAP else tl.dot(x, y.T)
    if TILED:
        product *= factor_b[:, None] if SWAP else factor_b[None, :]
    else:
        factor *= factor_b
    return promote(total, product, factor[None, :] if SWAP else factor[:, None])


@jit
def gemm_fp8_few_rows_kernel(
    a, b, out, a_scales, b_scales, M, N, K, stride_am, stride_ak, stride_bn, stride_bk, stride_part, stride_out,
    part_slices, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HALVES: tl.constexpr, SWAP: tl.constexpr,
    TILED: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """HALVES · BLOCK_N columns over one part of K, written to ``out[part]``; with SWAP computed as Cᵀ = B Aᵀ.

    CUT: the last of the columns' tiles reaches past N, which a store must not.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    row = tl.program_id(0) % tiles_m * BLOCK_M  # neighbours read the same weights
    col = tl.program_id(0) // tiles_m * (BLOCK_N * HALVES)
    last = tl.cdiv(N, BLOCK_N) * BLOCK_N - BLOCK_N if CUT else N - BLOCK_N
    col_next = tl.minimum(col + BLOCK_N, last)  # the second half: where there is none, the first again
    part = tl.program_id(1)
    rows, cols = row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    start = part * part_slices
    scale = a_scales + row_offset(rows, stride_am) + row_offset(start, stride_ak)
    if TILED:
        b_scale = b_scales + row_offset(col + cols, stride_bn) + row_offset(start, stride_bk)
        to_next = row_offset(col_next - col, stride_bn)
    else:
        b_scale = b_scales + row_offset(col // 128, stride_bn) + row_offset(start, stride_bk)
        to_next = row_offset(col_next // 128 - col // 128, stride_bn)
    first = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    second = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for s in tl.range(start, tl.minimum(start + part_slices, K // 128)):
        x = a.load([row, s * 128])  # [BLOCK_M, 128]
        y = b.load([col, s * 128])  # [BLOCK_N, 128]
        factor = tl.load(scale, mask=rows < M, other=0.0)  # [BLOCK_M]
        factor_b = tl.load(b_scale)  # scalar, or [BLOCK_N] where TILED
        if HALVES == 2:
            factor_next = tl.load(b_scale + to_next)  # scalar, or [BLOCK_N] where TILED
        first = scaled(first, x, y, factor, factor_b, SWAP, TILED)
        if HALVES == 2:
            # [BLOCK_N, 128]
            y = b.load([col_next, s * 128])  # here and not above, as in fp8_slices.py
            second = scaled(second, x, y, factor, factor_next, SWAP, TILED)
        scale += stride_ak
        b_scale += stride_bk
    where = out + row_offset(part, stride_part) + row_offset(rows, stride_out)[:, None] + cols[None, :]
    inside = (rows < M)[:, None]
    first = first.T if SWAP else first
    kept = inside & (col + cols < N)[None, :] if CUT else inside
    # [BLOCK_M, BLOCK_N]
    tl.store(where + col, first if out.dtype.element_ty == tl.float32 else to_bf16(first), mask=kept)
    if HALVES == 2:
        second = second.T if SWAP else second
        second = second if out.dtype.element_ty == tl.float32 else to_bf16(second)
        kept = inside & (col_next + cols < N)[None, :] if CUT else inside
        tl.store(where + col_next, second, mask=kept & (col_next > col))  # [BLOCK_M, BLOCK_N]


@jit
def sum_of_parts_kernel(parts, c, size, count, BLOCK: tl.constexpr, ADD: tl.constexpr):
    """c (+)= Σ parts[i], in the order of i: where K was split, the same bits on every run."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    if ADD:
        total += tl.load(c + at, mask=inside, other=0.0)  # [BLOCK]
    for _ in tl.range(0, count):
        total += tl.load(parts + at, mask=inside, other=0.0)  # [BLOCK]
        parts += size.to(tl.int64)
    tl.store(c + at, total if c.dtype.element_ty == tl.float32 else to_bf16(total), mask=inside)  # [BLOCK]
