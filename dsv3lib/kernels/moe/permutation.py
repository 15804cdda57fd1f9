"""Tokens to experts and back: rows sorted by expert, so that each expert's lie side by side, and home again.

The two numbers, for V3 (8 experts a token, width 7168, BF16), per token: one row of 14 KiB in and eight out, 126 KiB
of traffic, and no arithmetic to speak of; the way back adds eight rows to one, 65,000 operations on as many bytes.
Both are copies, whose limit is the memory's bandwidth. What a design can do wrong is to read more than that, or to
sum in the order in which threads happen to arrive. So rows are *scattered* by token on the way out (each is read once,
where gathering by row would read it eight times) and *gathered* by token on the way home: each sum has one owner, who
adds in FP32 and in the order of the choices. Each is the other's transpose and serves as its backward; that of the
weighted sum makes the rows' gradients and the weights' in one pass. Where each row goes is ``placement``'s matter.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from ...autograd import once_differentiable
from ..toolchain import tuning
from ..toolchain.checks import require_dtype, require_rows, require_shape
from ..toolchain.language import jit, row_offset, tl, to_bf16, triton
from ..toolchain.targets import on_device, on_triton
from . import placement
from .placement import place_visits, place_visits_ref

WIDE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NARROW = (torch.float8_e4m3fn, torch.uint8)  # only carried, as V3 dispatches in FP8: no sums, no gradient


# ---- the operations ----------------------------------------------------------------------------------------


def permute(
    x: Shaped[Tensor, "T D"], indices: Int[Tensor, "T K"], n_experts: int
) -> tuple[Shaped[Tensor, "TK D"], Int[Tensor, " E"], Int[Tensor, "T K"]]:
    """One row per visit, sorted by expert, in the order of the tokens within each.

    Args:
        x: a row a token: FP32, BF16, FP16, FP64, or E4M3 (carried as it is, without a gradient).
        indices: the experts that each token visits.
        n_experts: E.

    Returns:
        rows: [T·K, D]. counts: visits per expert, Int64 [E], on the device of x; nothing waits for them.
        positions: of each visit its row, Int64 [T, K], for ``unpermute``.

    Raises:
        KernelError: wrong dtype or shape; on the CPU also an index outside [0, E). On a GPU nobody looks: the row
            of such a visit is -1, it is copied nowhere and counts as zero on the way home.
    """
    _check_rows("permute", "x", x, WIDE + NARROW)
    require_shape("permute", "indices", indices, (x.shape[0], None))
    if x.dtype == torch.float64 or not on_triton(x, indices):
        return permute_ref(x, indices, n_experts)
    positions, counts = place_visits(indices, n_experts)
    if x.dtype in NARROW:
        return _scatter(x.view(torch.uint8), positions).view(x.dtype), counts, positions
    return _Permute.apply(x, positions), counts, positions


def unpermute(
    y: Float[Tensor, "TK D"], positions: Int[Tensor, "T K"], weights: Float[Tensor, "T K"] | None = None
) -> Float[Tensor, "T D"]:
    """Each token's weighted sum over its visits, Σ_k weights[t, k] · y[positions[t, k]], added in FP32.

    Args:
        y: rows as ``permute`` laid them.
        positions: from there.
        weights: FP32, or ``None`` for ones.

    Returns:
        In the dtype of y; differentiable in y and the weights.

    Raises:
        KernelError: wrong dtype or shape.
    """
    _check_rows("unpermute", "y", y, WIDE)
    require_shape("unpermute", "y", y, (positions.numel(), None))
    if weights is not None:
        require_shape("unpermute", "weights", weights, positions.shape)
        require_dtype("unpermute", "weights", weights, (torch.float32, torch.float64))
    if y.dtype == torch.float64 or not on_triton(y, positions, weights):
        return unpermute_ref(y, positions, weights)
    return _Unpermute.apply(y, positions, weights)


def _check_rows(operation: str, name: str, rows: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    require_shape(operation, name, rows, (None, None))
    require_dtype(operation, name, rows, dtypes)
    require_rows(operation, name, rows)


# ---- references --------------------------------------------------------------------------------------------


def permute_ref(
    x: Shaped[Tensor, "T D"], indices: Int[Tensor, "T K"], n_experts: int
) -> tuple[Shaped[Tensor, "TK D"], Int[Tensor, " E"], Int[Tensor, "T K"]]:
    """The plain form: rows gathered in the sorted order."""
    placement.check_experts(indices, n_experts)
    order, positions, counts = place_visits_ref(indices, n_experts)
    return x[order // max(indices.shape[1], 1)], counts, positions


def unpermute_ref(
    y: Float[Tensor, "TK D"], positions: Int[Tensor, "T K"], weights: Float[Tensor, "T K"] | None = None
) -> Float[Tensor, "T D"]:
    """The plain form: gather, weigh, add."""
    visits = (y if y.dtype == torch.float64 else y.float())[positions]
    if weights is not None:
        visits = visits * weights[..., None]
    return visits.sum(1).to(y.dtype)


# ---- launches ----------------------------------------------------------------------------------------------


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, positions):
        ctx.save_for_backward(positions)
        return _scatter(x, positions)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _gather(grad.contiguous(), None, ctx.saved_tensors[0]), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, positions, weights):
        ctx.save_for_backward(y, positions, weights)
        return _gather(y, weights, positions)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, positions, weights = ctx.saved_tensors
        grad = grad.contiguous()
        if weights is None:
            return _scatter(grad, positions), None, None
        (tokens, visits), width = positions.shape, y.shape[1]
        grad_y = torch.empty(tokens * visits, width, dtype=y.dtype, device=y.device)
        grad_weights = torch.empty_like(weights, memory_format=torch.contiguous_format)
        if positions.numel():
            row = tuning.pick("unpermute_backward", y.device, D=width)
            with on_device(y):
                unpermute_backward_kernel[(tokens,)](
                    grad, y, weights.float().contiguous(), positions, grad_y, grad_weights,
                    grad.stride(0), y.stride(0), width, VISITS=visits, **row,
                )  # fmt: skip
        return grad_y, None, grad_weights


def _scatter(x: Tensor, positions: Tensor) -> Tensor:
    """rows[positions[t, k]] = x[t]."""
    (tokens, visits), width = positions.shape, x.shape[1]
    rows = torch.empty(tokens * visits, width, dtype=x.dtype, device=x.device)
    if positions.numel():
        row = tuning.pick("permute", x.device, D=width)
        with on_device(x):
            permute_kernel[(tokens, triton.cdiv(width, row["BLOCK_D"]))](
                x, positions, rows, x.stride(0), width, VISITS=visits, **row
            )
    return rows


def _gather(y: Tensor, weights: Tensor | None, positions: Tensor) -> Tensor:
    """Σ_k weights[t, k] · y[positions[t, k]]."""
    (tokens, visits), width = positions.shape, y.shape[1]
    out = torch.empty(tokens, width, dtype=y.dtype, device=y.device)
    if tokens:
        row = tuning.pick("unpermute", y.device, D=width)
        with on_device(y):
            unpermute_kernel[(tokens, triton.cdiv(width, row["BLOCK_D"]))](
                y, positions if weights is None else weights.float().contiguous(), positions, out,
                y.stride(0), width, VISITS=visits, WEIGHTED=weights is not None, **row,
            )  # fmt: skip
    return out


# ---- kernels -----------------------------------------------------------------------------------------------


@jit
def permute_kernel(
    x_ptr, positions_ptr, rows_ptr, stride_x, width, VISITS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """A part of one token's row, written once for each visit."""
    token = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + row_offset(token, stride_x) + d, mask=d < width)  # [BLOCK_D]
    for k in tl.static_range(VISITS):
        position = tl.load(positions_ptr + row_offset(token, VISITS) + k)  # scalar
        tl.store(rows_ptr + row_offset(position, width) + d, x, mask=(d < width) & (position >= 0))  # [BLOCK_D]


@jit
def unpermute_kernel(
    y_ptr, weights_ptr, positions_ptr, out_ptr, stride_y, width,
    VISITS: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A part of one token's row: its visits' answers, weighted and added."""
    token = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    for k in tl.static_range(VISITS):
        at = row_offset(token, VISITS) + k
        position = tl.load(positions_ptr + at)  # scalar
        # [BLOCK_D]
        y = tl.load(y_ptr + row_offset(position, stride_y) + d, mask=(d < width) & (position >= 0), other=0.0)
        total += y.to(tl.float32) * (tl.load(weights_ptr + at) if WEIGHTED else 1.0)  # scalar
    tl.store(out_ptr + row_offset(token, width) + d, narrowed(total, out_ptr), mask=d < width)  # [BLOCK_D]


@jit
def unpermute_backward_kernel(
    grad_ptr, y_ptr, weights_ptr, positions_ptr, grad_y_ptr, grad_weights_ptr, stride_grad, stride_y, width,
    VISITS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One token's visits: each row's gradient is w · g, each weight's is ⟨g, y⟩. After the first, g is in the cache."""
    token = tl.program_id(0)
    grad_row = grad_ptr + row_offset(token, stride_grad)
    for k in tl.static_range(VISITS):
        at = row_offset(token, VISITS) + k
        position = tl.load(positions_ptr + at)  # scalar
        weight = tl.load(weights_ptr + at)  # scalar
        products = tl.zeros([BLOCK_D], dtype=tl.float32)
        for start in range(0, width, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            inside = (d < width) & (position >= 0)
            g = tl.load(grad_row + d, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_D]
            y = tl.load(y_ptr + row_offset(position, stride_y) + d, mask=inside, other=0.0)  # [BLOCK_D]
            products += g * y.to(tl.float32)
            out = grad_y_ptr + row_offset(position, width) + d
            tl.store(out, narrowed(g * weight, grad_y_ptr), mask=inside)  # [BLOCK_D]
        tl.store(grad_weights_ptr + at, tl.sum(products))  # scalar


@jit
def narrowed(x, pointer):
    """FP32 to what a pointer points to, to nearest even."""
    kind: tl.constexpr = pointer.dtype.element_ty
    return to_bf16(x) if kind == tl.bfloat16 else x.to(kind)
