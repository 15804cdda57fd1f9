"""The experts' products in FP8: grouped rows as in ``grouped_gemm.py``, slices promoted as in ``gemm.py``.

Forward, y = x Wᵀ: rows in 1 x 128 tiles against each expert's matrix in 128 x 128 blocks. Backward for the input,
dx = dy W: the same operation with each matrix, and its scales, transposed. Backward for the weight, dW = dyᵀ x: both
operands are quantised again in tiles along the tokens, so a group's tokens are padded with zeros to a multiple of
128; no scale then belongs to two experts.

At V3's sizes (32,768 rows, 256 experts, gate and up projection 4096 x 7168) the weights are 7.5 GB in E4M3, half of
BF16's, and the matrix instructions run at twice BF16's rate: both limits move by two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import KernelError
from ...numerics import TILE
from ..toolchain import tuning
from ..toolchain.checks import require_aligned, require_dtype, require_multiple, require_shape
from ..toolchain.language import jit, row_offset, tl, to_bf16, triton
from ..toolchain.targets import on_device, on_triton, processors, require_fp8
from .fp8_slices import describe, place, sum_of_slices, sum_of_tiled_slices
from .gemm import E4M3, OUTPUTS, gemm_fp8_ref
from .group_plan import make_plan, padded, rows_of_groups
from .grouped_gemm import COUNTS


def grouped_gemm_fp8_ref(
    a: Float[Tensor, "M K"],
    a_scales: Float[Tensor, "M slices"],
    b: Float[Tensor, "G N K"],
    b_scales: Float[Tensor, "G blocks slices"],
    counts: Int[Tensor, " G"],
    out_dtype: torch.dtype = torch.bfloat16,
) -> Float[Tensor, "M N"]:
    """The plain form: ``gemm_fp8_ref`` group by group, joined; any widths.

    Raises:
        KernelError: the counts do not sum to the rows.
    """
    sizes = counts.tolist()
    if sum(sizes) != a.shape[0]:
        raise KernelError(f"grouped_gemm_fp8: counts sum to {sum(sizes)}, there are {a.shape[0]} rows")
    parts = zip(a.split(sizes), a_scales.split(sizes), b, b_scales, strict=True)
    return torch.cat([gemm_fp8_ref(*part, out_dtype) for part in parts])


def grouped_gemm_fp8(
    a: Float[Tensor, "M K"],
    a_scales: Float[Tensor, "M slices"],
    b: Float[Tensor, "G N K"],
    b_scales: Float[Tensor, "G blocks slices"],
    counts: Int[Tensor, " G"],
    settings: Mapping[str, Any] | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Float[Tensor, "M N"]:
    """y = x Wᵀ for rows sorted by group, both in E4M3: the first ``counts[0]`` rows meet ``b[0]``, and so on.

    On a GPU the counts stay there: rows beyond their sum come back as NaN.

    Args:
        a: E4M3 [M, K], 1 x 128 tiles.
        a_scales: FP32 [M, K/128], of any strides.
        b: E4M3 [G, N, K], contiguous; N and K divide by 128.
        b_scales: FP32 [G, N/128, K/128], 128 x 128 blocks.
        counts: rows per group, summing to M; zero is allowed.
        settings: the device's own when None.
        out_dtype: BF16 or FP32.

    Returns:
        [M, N].

    Raises:
        KernelError: a dtype, shape, stride or alignment that the kernel cannot take, or a GPU without E4M3.
    """
    _check("grouped_gemm_fp8", a, a_scales, b, b_scales, counts)
    if out_dtype not in OUTPUTS:
        raise KernelError(f"grouped_gemm_fp8: out_dtype is {out_dtype}, expected bfloat16 or float32")
    if not on_triton(a, a_scales, b, b_scales, counts):
        return grouped_gemm_fp8_ref(a, a_scales, b, b_scales, counts, out_dtype)
    return _launch(a, a_scales, b, b_scales, counts, None, settings, out_dtype)


def grouped_gemm_fp8_masked_ref(
    a: Float[Tensor, "G R K"],
    a_scales: Float[Tensor, "G R slices"],
    b: Float[Tensor, "G N K"],
    b_scales: Float[Tensor, "G blocks slices"],
    counts: Int[Tensor, " G"],
) -> Float[Tensor, "G R N"]:
    """The plain form: every row's product, then zeros beyond each group's count."""
    y = torch.stack([gemm_fp8_ref(*part) for part in zip(a, a_scales, b, b_scales, strict=True)])
    valid = torch.arange(a.shape[1], device=a.device) < counts[:, None]
    return y.masked_fill(~valid[..., None], 0)


def grouped_gemm_fp8_masked(
    a: Float[Tensor, "G R K"],
    a_scales: Float[Tensor, "G R slices"],
    b: Float[Tensor, "G N K"],
    b_scales: Float[Tensor, "G blocks slices"],
    counts: Int[Tensor, " G"],
    settings: Mapping[str, Any] | None = None,
) -> Float[Tensor, "G R N"]:
    """The same where each group has room for R rows and fills its first ``counts[g]``, as when decoding.

    Returns:
        BF16. On a GPU rows beyond the count are left as the memory was: whatever reads them must mask them.
    """
    name = "grouped_gemm_fp8_masked"
    require_shape(name, "a", a, (b.shape[0], None, None))
    if not a.is_contiguous():
        raise KernelError(f"{name}: a has strides {a.stride()}, expected contiguous rows: call .contiguous()")
    flat, flat_scales = a.flatten(0, 1), a_scales.flatten(0, 1)
    _check(name, flat, flat_scales, b, b_scales, counts)
    if not on_triton(a, a_scales, b, b_scales, counts):
        return grouped_gemm_fp8_masked_ref(a, a_scales, b, b_scales, counts)
    y = _launch(flat, flat_scales, b, b_scales, counts, a.shape[1], settings)
    return y.unflatten(0, a.shape[:2])


def grouped_wgrad_fp8_ref(
    dy_t: Float[Tensor, "N M"],
    dy_scales: Float[Tensor, "N slices"],
    x_t: Float[Tensor, "K M"],
    x_scales: Float[Tensor, "K slices"],
    counts: Int[Tensor, " G"],
) -> Float[Tensor, "G N K"]:
    """The plain form: ``gemm_fp8_ref`` over each group's tokens, FP32."""
    sizes = counts.tolist()
    slices = [size // TILE for size in sizes]
    parts = zip(
        dy_t.split(sizes, 1), dy_scales.split(slices, 1), x_t.split(sizes, 1), x_scales.split(slices, 1),
        strict=True,
    )  # fmt: skip
    return torch.stack([gemm_fp8_ref(*part, torch.float32) for part in parts])


def grouped_wgrad_fp8(
    dy_t: Float[Tensor, "N M"],
    dy_scales: Float[Tensor, "N slices"],
    x_t: Float[Tensor, "K M"],
    x_scales: Float[Tensor, "K slices"],
    counts: Int[Tensor, " G"],
    accumulate_into: Float[Tensor, "G N K"] | None = None,
) -> Float[Tensor, "G N K"]:
    """dW[g] = dYᵀ X over the tokens of group g, in FP32; a group without tokens gets zeros.

    Args:
        dy_t: E4M3 [N, M] and x_t: E4M3 [K, M], tokens sorted by group, 1 x 128 tiles along the tokens; N and K
            divide by 128.
        dy_scales: FP32 [N, M/128], of any strides.
        x_scales: FP32 [K, M/128], of any strides.
        counts: tokens per group, each padded to a multiple of 128. On a GPU they stay there: a gradient whose
            group is cut differently comes back as NaN.
        accumulate_into: FP32 [G, N, K] gradients that these are added to.

    Raises:
        KernelError: as for ``grouped_gemm_fp8``; on a CPU also counts that do not divide or do not sum to M.
    """
    name = "grouped_wgrad_fp8"
    for label, values, scales in (("dy_t", dy_t, dy_scales), ("x_t", x_t, x_scales)):
        require_shape(name, label, values, (None, dy_t.shape[-1]))
        require_dtype(name, label, values, (E4M3,))
        require_dtype(name, f"the scales of {label}", scales, (torch.float32,))
        require_multiple(name, f"the width of {label}", values.shape[0], TILE)
        require_multiple(name, f"tokens of {label}", values.shape[1], TILE)
        require_shape(name, f"the scales of {label}", scales, (values.shape[0], values.shape[1] // TILE))
        if values.numel():
            require_aligned(name, label, values)
    require_dtype(name, "counts", counts, COUNTS)
    groups, (n, tokens), k = counts.numel(), dy_t.shape, x_t.shape[0]
    if accumulate_into is not None:
        require_dtype(name, "accumulate_into", accumulate_into, (torch.float32,))
        require_shape(name, "accumulate_into", accumulate_into, (groups, n, k))
        if not accumulate_into.is_contiguous():
            raise KernelError(
                f"{name}: accumulate_into has strides {accumulate_into.stride()}, expected contiguous"
            )
    if not on_triton(dy_t, dy_scales, x_t, x_scales, counts, accumulate_into):
        if counts.sum() != tokens or (counts % TILE).any():
            raise KernelError(
                f"{name}: counts {counts.tolist()} must be multiples of {TILE} that sum to {tokens} tokens"
            )
        product = grouped_wgrad_fp8_ref(dy_t, dy_scales, x_t, x_scales, counts)
        return product if accumulate_into is None else accumulate_into.add_(product)
    require_fp8(name, dy_t.device)
    add = accumulate_into is not None
    if tokens == 0 or groups == 0:
        return accumulate_into if add else dy_t.new_zeros(groups, n, k, dtype=torch.float32)
    out = accumulate_into if add else dy_t.new_empty(groups, n, k, dtype=torch.float32)
    sizes = {"M": tokens, "N": n, "K": k, "G": groups}
    chosen = tuning.pick("grouped_wgrad_fp8", dy_t.device, **sizes)
    block_m, block_n = chosen["BLOCK_M"], chosen["BLOCK_N"]
    with on_device(dy_t):
        grouped_wgrad_fp8_kernel[(triton.cdiv(n, block_m) * (k // block_n), groups)](
            describe(dy_t, block_m, TILE), describe(x_t, block_n, TILE), out, dy_scales, x_scales, counts,
            groups, tokens, n, k, *dy_scales.stride(), *x_scales.stride(), out.stride(0), out.stride(1),
            GROUPS=padded(groups), ADD=add, **chosen,
        )  # fmt: skip
    return out


def _check(name: str, a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, counts: Tensor) -> None:
    require_shape(name, "b", b, (None, None, None))
    groups, n, k = b.shape
    if groups == 0:
        raise KernelError(f"{name}: b has no groups (shape {list(b.shape)}), expected at least one matrix")
    require_shape(name, "a", a, (None, k))
    require_shape(name, "counts", counts, (groups,))
    require_dtype(name, "counts", counts, COUNTS)
    require_multiple(name, "N", n, TILE)
    require_multiple(name, "K", k, TILE)
    for label, values in (("a", a), ("b", b)):
        require_dtype(name, label, values, (E4M3,))
        if values.numel():
            require_aligned(name, label, values)
    if not b.is_contiguous():
        raise KernelError(
            f"{name}: b has strides {b.stride()}, expected contiguous matrices: call .contiguous()"
        )
    for label, scales in (("a_scales", a_scales), ("b_scales", b_scales)):
        require_dtype(name, label, scales, (torch.float32,))
    require_shape(name, "a_scales (1 x 128 tiles)", a_scales, (a.shape[0], k // TILE))
    require_shape(name, "b_scales (128 x 128 blocks)", b_scales, (groups, n // TILE, k // TILE))


@jit
def grouped_fp8_kernel(
    a, b, out, a_scales, b_scales, plan, tiles_m, groups, N, K,
    stride_am, stride_ak, stride_bg, stride_bn, stride_bk, stride_om, programs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HALVES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The tiles of a plan; ``b`` describes all matrices as one of groups · N rows."""
    for tile in tl.range(tl.program_id(0), tiles_m * (N // BLOCK_N), programs):
        tile_m, tile_n = place(tile, tiles_m, N // BLOCK_N, GROUP)
        group = tl.load(plan + tile_m * 3)
        if group >= 0:
            row, end = tl.load(plan + tile_m * 3 + 1), tl.load(plan + tile_m * 3 + 2)
            col, matrix = tile_n * BLOCK_N, tl.minimum(group, groups - 1)
            rows, cols = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
            scale = a_scales + row_offset(rows, stride_am)
            b_scale = b_scales + row_offset(matrix, stride_bg) + row_offset(col // 128, stride_bn)
            next_half = row_offset(tl.full((), BLOCK_M, tl.int32), stride_am)
            first, second = sum_of_slices(
                a, b, row, matrix * N + col, scale, rows < end, b_scale, stride_ak, stride_bk,
                next_half, rows + BLOCK_M < end, K // 128, BLOCK_M, BLOCK_N, HALVES,
            )  # fmt: skip
            where = out + row_offset(rows, stride_om)[:, None] + cols[None, :]
            first = tl.where(group < groups, first, float("nan"))  # rows that belong to no group
            first = first if out.dtype.element_ty == tl.float32 else to_bf16(first)
            tl.store(where, first, mask=(rows < end)[:, None])  # [BLOCK_M, BLOCK_N]
            if HALVES == 2:
                where += row_offset(tl.full((), BLOCK_M, tl.int32), stride_om)
                second = tl.where(group < groups, second, float("nan"))
                second = second if out.dtype.element_ty == tl.float32 else to_bf16(second)
                tl.store(where, second, mask=(rows + BLOCK_M < end)[:, None])  # [BLOCK_M, BLOCK_N]


@jit
def grouped_wgrad_fp8_kernel(
    a, b, out, a_scales, b_scales, counts, groups, tokens, N, K,
    stride_am, stride_ak, stride_bn, stride_bk, stride_og, stride_on,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, ADD: tl.constexpr, num_stages: tl.constexpr,
):  # fmt: skip
    """A tile of one group's gradient: a holds dYᵀ [N, tokens], b holds Xᵀ [K, tokens]."""
    group = tl.program_id(1)
    numbers = tl.arange(0, GROUPS)
    first, last = rows_of_groups(counts, numbers, groups, tokens, 0, False)
    start = tl.sum(tl.where(numbers == group, first, 0), 0)
    end = tl.sum(tl.where(numbers == group, last, 0), 0)
    row, col = tl.program_id(0) // (K // BLOCK_N) * BLOCK_M, tl.program_id(0) % (K // BLOCK_N) * BLOCK_N
    rows, cols = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
    scale = a_scales + row_offset(rows, stride_am) + row_offset(start // 128, stride_ak)
    b_scale = b_scales + row_offset(cols, stride_bn) + row_offset(start // 128, stride_bk)
    total = sum_of_tiled_slices(
        a, b, row, col, scale, rows < N, b_scale, stride_ak, stride_bk, start // 128, end // 128,
        BLOCK_M, BLOCK_N, num_stages,
    )  # fmt: skip
    total = tl.where((start | end) % 128 == 0, total, float("nan"))  # a slice that belongs to two groups
    where = out + row_offset(group, stride_og) + row_offset(rows, stride_on)[:, None] + cols[None, :]
    if ADD:
        total += tl.load(where, mask=(rows < N)[:, None], other=0.0)
    tl.store(where, total, mask=(rows < N)[:, None])


def _launch(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, counts: Tensor, capacity: int | None,
    settings: Mapping[str, Any] | None, out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    require_fp8("grouped_gemm_fp8", a.device)
    groups, n, k = b.shape
    rows = a.shape[0]
    if rows == 0 or n == 0 or k == 0:
        return a.new_zeros(rows, n, dtype=out_dtype)
    if settings is None:
        sizes = {"M": rows, "N": n, "K": k, "G": groups, "ROWS": rows // groups}
        settings = tuning.pick("grouped_gemm_fp8", a.device, **sizes)
    chosen = dict(settings)
    block_m, block_n = chosen["BLOCK_M"], chosen["BLOCK_N"]
    if TILE % block_n:
        raise KernelError(f"grouped_gemm_fp8: BLOCK_N is {block_n}, expected a divisor of {TILE}")
    out = a.new_empty(rows, n, dtype=out_dtype)
    with on_device(a):
        plan = make_plan(counts, rows, capacity, block_m * chosen["HALVES"])
        programs = min(processors(a.device) * chosen.pop("PER_PROCESSOR"), len(plan) * (n // block_n))
        grouped_fp8_kernel[(programs,)](
            describe(a, block_m, TILE), describe(b.flatten(0, 1), block_n, TILE), out, a_scales, b_scales, plan,
            len(plan), groups, n, k, *a_scales.stride(), *b_scales.stride(), out.stride(0), programs, **chosen,
        )  # fmt: skip
    return out
