"""Grouped matrix product: rows sorted by group, one weight matrix per group, groups of any size.

It is what V3's routed experts are: 4096 tokens visit 8 experts each, so that 32,768 rows meet 256 matrices, about
128 rows each and sometimes none. The gate and up projection of one layer is 1.92 TFLOP in the forward pass and twice
that backward. With 128 rows a group each weight is read for 128 multiplications, 128 operations a byte, under the
few hundred at which a GPU's limits meet: the weights' bytes are the limit for a small batch, arithmetic for a large.

All products are one launch each, whatever the counts. The plan of a launch (``group_plan.py``) is made on the
device, so that the host never waits. Three products:

* forward, y = x Wᵀ: a tile of rows of one group against a tile of its matrix;
* dx = dy W: the same with the weight read the other way;
* dW = dyᵀ x per group: a tile of the matrix, summed over the rows of its group; no rows, a gradient of zero.

Every tile is summed by one program in a fixed order: the same bits on every run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...autograd import once_differentiable
from ...errors import KernelError
from ..toolchain import tuning
from ..toolchain.checks import ALIGNMENT, require_dtype, require_shape
from ..toolchain.language import INTERPRETED, TensorDescriptor, jit, row_offset, tl, to_bf16, triton
from ..toolchain.targets import on_device, on_triton, processors
from .fp8_slices import place
from .group_plan import make_plan, padded, rows_of_groups

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DTYPES = (*KERNEL_DTYPES, torch.float64)  # FP64 is computed by the plain form, on any device
COUNTS = (torch.int64, torch.int32)


def grouped_gemm_ref(
    x: Float[Tensor, "M K"], weight: Float[Tensor, "G N K"], counts: Int[Tensor, " G"]
) -> Float[Tensor, "M N"]:
    """y = x Wᵀ group by group, the plain form: one product a group, joined."""
    parts = x.split(counts.tolist())
    return torch.cat([part @ w.t() for part, w in zip(parts, weight, strict=True)])


def grouped_gemm(
    x: Float[Tensor, "M K"],
    weight: Float[Tensor, "G N K"],
    counts: Int[Tensor, " G"],
    settings: Mapping[str, Any] | None = None,
) -> Float[Tensor, "M N"]:
    """y = x Wᵀ for rows that are sorted by group: the first ``counts[0]`` rows meet ``weight[0]``, and so on.

    On a GPU the counts stay there, and what depends on their values cannot be refused: rows beyond their sum come
    back as NaN.

    Args:
        x: rows, those of one group side by side; BF16, FP16 or FP32 (FP64 through the plain form).
        weight: one matrix a group.
        counts: rows per group, summing to M; zero is allowed.
        settings: block sizes and the like; the device's own when None.

    Returns:
        Products in the order of the rows. Differentiable in ``x`` and ``weight``.

    Raises:
        KernelError: widths, dtypes or devices differ, or (on a CPU) the counts do not sum to the rows.
    """
    _check("grouped_gemm", x, weight, counts)
    if on_triton(x, weight, counts) and x.dtype in KERNEL_DTYPES:
        return _Kernels.apply(x, weight, counts, None, settings)
    return _GroupedGemm.apply(x, weight, counts)


def grouped_gemm_masked_ref(
    x: Float[Tensor, "G R K"], weight: Float[Tensor, "G N K"], counts: Int[Tensor, " G"]
) -> Float[Tensor, "G R N"]:
    """The plain form: one product over everything, rows beyond a group's count set to zero before and after."""
    valid = torch.arange(x.shape[1], device=x.device) < counts[:, None]
    y = x.masked_fill(~valid[..., None], 0) @ weight.mT
    return y.masked_fill(~valid[..., None], 0)


def grouped_gemm_masked(
    x: Float[Tensor, "G R K"],
    weight: Float[Tensor, "G N K"],
    counts: Int[Tensor, " G"],
    settings: Mapping[str, Any] | None = None,
) -> Float[Tensor, "G R N"]:
    """The same where each group has room for R rows and fills its first ``counts[g]``, as when decoding.

    Shapes then do not depend on the routing, so that a step can be captured once and replayed.

    Args:
        x: what lies beyond a group's count is not read.
        counts: 0 to R; more counts as R.

    Returns:
        Products. On a GPU rows beyond the count are left as the memory was: whatever reads them must mask them.
    """
    name = "grouped_gemm_masked"
    _check(name, x, weight, counts)
    if on_triton(x, weight, counts) and x.dtype in KERNEL_DTYPES:
        y = _Kernels.apply(x.flatten(0, 1), weight, counts, x.shape[1], settings)
        return y.unflatten(0, x.shape[:2])
    return grouped_gemm_masked_ref(x, weight, counts)


def _check(name: str, x: Tensor, weight: Tensor, counts: Tensor) -> None:
    require_shape(name, "weight", weight, (None, None, None))
    if weight.shape[0] == 0:
        raise KernelError(f"{name}: weight has no groups (shape {list(weight.shape)}), expected at least one")
    if x.shape[-1] != weight.shape[2] or counts.shape != weight.shape[:1]:
        raise KernelError(
            f"{name}: rows of width {x.shape[-1]} and counts {list(counts.shape)} do not fit weights "
            f"{list(weight.shape)}, which are [groups, out, in]"
        )
    if x.ndim == 3 and x.shape[0] != weight.shape[0]:
        raise KernelError(f"{name}: x has {x.shape[0]} groups of rows, weight has {weight.shape[0]} groups")
    require_dtype(name, "x", x, DTYPES)
    require_dtype(name, "weight", weight, (x.dtype,))
    require_dtype(name, "counts", counts, COUNTS)


class _GroupedGemm(torch.autograd.Function):
    """On a CPU: each product is written where it belongs, no joining copy forward, none backward."""

    @staticmethod
    def forward(ctx, x, weight, counts):
        sizes = counts.tolist()
        if sum(sizes) != x.shape[0]:
            raise KernelError(f"grouped_gemm: counts sum to {sum(sizes)}, there are {x.shape[0]} rows")
        ctx.save_for_backward(x, weight)
        ctx.sizes = sizes
        out = x.new_empty(x.shape[0], weight.shape[1])
        for a, b, w in zip(x.split(sizes), out.split(sizes), weight, strict=True):
            torch.mm(a, w.t(), out=b)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        parts = grad.split(ctx.sizes)
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x)
            for g, w, out in zip(parts, weight, grad_x.split(ctx.sizes), strict=True):
                torch.mm(g, w, out=out)
        if ctx.needs_input_grad[1]:
            grad_w = torch.empty_like(weight)
            for g, a, out in zip(parts, x.split(ctx.sizes), grad_w, strict=True):
                torch.mm(g.t(), a, out=out)
        return grad_x, grad_w, None


class _Kernels(torch.autograd.Function):
    """Through the kernels; ``capacity`` is a group's room for rows in the masked layout, else None."""

    @staticmethod
    def forward(ctx, x, weight, counts, capacity, settings):
        ctx.save_for_backward(x, weight, counts)
        ctx.capacity, ctx.settings = capacity, settings
        out = x.new_empty(x.shape[0], weight.shape[1])
        rows_by_matrices(x, weight, counts, out, capacity, settings)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, counts = ctx.saved_tensors
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            # Rows that belong to no group have no part in the loss; in the masked layout nothing is written there.
            grad_x = x.new_empty(x.shape) if ctx.capacity is None else x.new_zeros(x.shape)
            rows_by_matrices(grad, weight.mT, counts, grad_x, ctx.capacity, ctx.settings)
        if ctx.needs_input_grad[1]:
            grad_w = weight.new_empty(weight.shape)
            rows_by_rows(grad, x, counts, grad_w, ctx.capacity)
        return grad_x, grad_w, None, None, None


@jit
def operand(x):
    """What a matrix product is fed; the interpreter's products of BF16 are garbage, so there it is widened."""
    return x.to(tl.float32) if INTERPRETED else x


@jit
def rounded(x, TO: tl.constexpr):
    """FP32 to the dtype of the result."""
    return to_bf16(x) if TO == tl.bfloat16 else x.to(TO)


@jit
def grouped_rows_kernel(
    x, matrices, out, plan, tiles_m, groups, N, K,
    stride_xm, stride_bg, stride_bn, stride_bk, stride_om, programs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr, ALONG_N: tl.constexpr,
):  # fmt: skip
    """out[r, n] = Σ_k x[r, k] · matrices[g, n, k] for the tiles of a plan.

    With TMA ``x`` and ``matrices`` are descriptors, which fill with zeros past an edge; ALONG_N says that the
    matrices lie with n side by side. Else they are pointers, and any strides will do.
    """
    for tile in tl.range(tl.program_id(0), tiles_m * tl.cdiv(N, BLOCK_N), programs):
        tile_m, tile_n = place(tile, tiles_m, tl.cdiv(N, BLOCK_N), GROUP)
        group = tl.load(plan + tile_m * 3)  # scalar
        if group >= 0:
            row, end = tl.load(plan + tile_m * 3 + 1), tl.load(plan + tile_m * 3 + 2)  # two scalars
            rows, cols = row + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
            matrix = tl.minimum(group, groups - 1)
            total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            if TMA:
                for k in tl.range(0, K, BLOCK_K):
                    a = x.load([row, k])  # [BLOCK_M, BLOCK_K]
                    if ALONG_N:
                        # [BLOCK_K, BLOCK_N]
                        b = matrices.load([matrix, k, tile_n * BLOCK_N]).reshape(BLOCK_K, BLOCK_N)
                    else:
                        # [BLOCK_N, BLOCK_K], turned
                        b = matrices.load([matrix, tile_n * BLOCK_N, k]).reshape(BLOCK_N, BLOCK_K).T
                    total = tl.dot(operand(a), operand(b), total)
            else:
                ks = tl.arange(0, BLOCK_K)
                a_at = x + row_offset(rows, stride_xm)[:, None] + ks[None, :]
                b_at = (
                    matrices + row_offset(matrix, stride_bg)
                    + row_offset(cols, stride_bn)[None, :] + row_offset(ks, stride_bk)[:, None]
                )  # fmt: skip
                step = row_offset(tl.full((), BLOCK_K, tl.int32), stride_bk)
                for k in tl.range(0, K, BLOCK_K):
                    inside = k + ks < K
                    a = tl.load(a_at, mask=(rows < end)[:, None] & inside[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
                    b = tl.load(b_at, mask=inside[:, None] & (cols < N)[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
                    total = tl.dot(operand(a), operand(b), total, input_precision="ieee")
                    a_at += BLOCK_K
                    b_at += step
            total = tl.where(group < groups, total, float("nan"))  # rows that belong to no group
            where = out + row_offset(rows, stride_om)[:, None] + cols[None, :]
            kept = (rows < end)[:, None] & (cols < N)[None, :]
            tl.store(where, rounded(total, out.dtype.element_ty), mask=kept)  # [BLOCK_M, BLOCK_N]


@jit
def grouped_weight_kernel(
    dy, x, out, counts, groups, M, capacity, N, K, stride_ym, stride_xm, stride_og, stride_on,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, GROUPS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """out[g] = dyᵀ x over the rows of a group. Masks and no descriptors: the rows after a group's are another's."""
    tiles_k = tl.cdiv(K, BLOCK_K)
    tile, group = tl.program_id(0), tl.program_id(1)
    numbers = tl.arange(0, GROUPS)
    first, last = rows_of_groups(counts, numbers, groups, M, capacity, MASKED)
    row = tl.sum(tl.where(numbers == group, first, 0), 0)
    end = tl.sum(tl.where(numbers == group, last, 0), 0)
    ns = tile // tiles_k * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tile % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    ms = tl.arange(0, BLOCK_M)
    y_at = dy + row_offset(row + ms, stride_ym)[:, None] + ns[None, :]
    x_at = x + row_offset(row + ms, stride_xm)[:, None] + ks[None, :]
    block = tl.full((), BLOCK_M, tl.int32)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for m in tl.range(row, end, BLOCK_M):
        inside = (m + ms < end)[:, None]
        a = tl.load(y_at, mask=inside & (ns < N)[None, :], other=0.0)  # [BLOCK_M, BLOCK_N]
        b = tl.load(x_at, mask=inside & (ks < K)[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        total = tl.dot(operand(a).T, operand(b), total, input_precision="ieee")
        y_at += row_offset(block, stride_ym)
        x_at += row_offset(block, stride_xm)
    where = out + row_offset(group, stride_og) + row_offset(ns, stride_on)[:, None] + ks[None, :]
    # [BLOCK_N, BLOCK_K]
    tl.store(where, rounded(total, out.dtype.element_ty), mask=(ns < N)[:, None] & (ks < K)[None, :])


def rows_by_matrices(
    x: Tensor, matrices: Tensor, counts: Tensor, out: Tensor, capacity: int | None,
    settings: Mapping[str, Any] | None,
) -> None:  # fmt: skip
    """out = x Bᵀ group by group: the forward product, and the one for the input with the matrices transposed."""
    groups, n, k = matrices.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    if not out.numel() or k == 0:
        out.zero_()
        return
    along_n = matrices.stride(2) != 1 and matrices.stride(1) == 1
    aligned = _sixteen_bits_aligned(x, matrices.mT if along_n else matrices)
    if (
        settings is None or not aligned
    ):  # settings are tried for aligned operands; others need what masks allow
        sizes = {"M": x.shape[0], "N": n, "K": k, "G": groups, "ROWS": x.shape[0] // groups}
        settings = tuning.pick("grouped_gemm", x.device, **sizes, ALIGNED=int(aligned))
    chosen = dict(settings)
    block_m, block_n, block_k = (chosen[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    a, b = x, matrices
    if chosen["TMA"]:
        a = TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [block_m, block_k])
        lying = matrices.mT if along_n else matrices
        block = [1, block_k, block_n] if along_n else [1, block_n, block_k]
        b = TensorDescriptor(matrices, list(lying.shape), list(lying.stride()), block)
    with on_device(x):
        plan = make_plan(counts, x.shape[0], capacity, block_m)
        programs = min(
            processors(x.device) * chosen.pop("PER_PROCESSOR"), len(plan) * triton.cdiv(n, block_n)
        )
        grouped_rows_kernel[(programs,)](
            a, b, out, plan, len(plan), groups, n, k,
            x.stride(0), *matrices.stride(), out.stride(0), programs, ALONG_N=along_n, **chosen,
        )  # fmt: skip


def rows_by_rows(dy: Tensor, x: Tensor, counts: Tensor, out: Tensor, capacity: int | None) -> None:
    """out[g] = dyᵀ x over the rows of group g: the product for the weight."""
    groups, n, k = out.shape
    dy, x = (t if t.stride(-1) == 1 else t.contiguous() for t in (dy, x))
    if not out.numel():
        return
    aligned = _sixteen_bits_aligned(dy, x)
    sizes = {"M": x.shape[0], "N": n, "K": k, "G": groups, "ROWS": x.shape[0] // groups}
    chosen = tuning.pick("grouped_gemm_weight", x.device, **sizes, ALIGNED=int(aligned))
    grid = (triton.cdiv(n, chosen["BLOCK_N"]) * triton.cdiv(k, chosen["BLOCK_K"]), groups)
    with on_device(x):
        grouped_weight_kernel[grid](
            dy, x, out, counts, groups, x.shape[0], capacity or 0, n, k,
            dy.stride(0), x.stride(0), out.stride(0), out.stride(1),
            GROUPS=padded(groups), MASKED=capacity is not None, **chosen,
        )  # fmt: skip


def _sixteen_bits_aligned(*tensors: Tensor) -> bool:
    """Whether all are BF16 or FP16, with every row on a 16-byte border: what wide accesses and descriptors take."""
    return all(
        t.element_size() == 2
        and t.stride(-1) == 1
        and t.data_ptr() % ALIGNMENT == 0
        and all(s > 0 and s * t.element_size() % ALIGNMENT == 0 for s in t.stride()[:-1])
        for t in tensors
    )
