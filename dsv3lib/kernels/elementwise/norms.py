"""RMSNorm, alone and together with the addition of the residual before it; forward and backward.

The two numbers, for 8192 tokens of V3's width 7168 in BF16, forward: 117 MB read and as much written, about six
operations a value. Memory is the limit, so a row is read once, stays in registers while its mean square is
found, and is written once. PyTorch's own chain (convert, square, mean, add, root, multiply, convert, multiply)
moves it eight times.

A block of the model adds its residual and normalises the sum at once. Fused, the sum is written for the next
residual while it still is in registers: two reads and two writes where the separate operations make three and two.

Backward, with n = x / rms and m = mean(g ⊙ w ⊙ n): dx = (g ⊙ w - m n) / rms, dw = Σ g ⊙ n over all rows. The
sum over rows has no room in one program and must not depend on which program comes first: a fixed number of
programs each take every so-many-th row, keep their own sum in registers, write it once, and a second, small
reduction adds these in order. Same inputs, same bits.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ...autograd import once_differentiable
from ..quantize.rounding import rounded_to
from ..toolchain import tuning
from ..toolchain.checks import require_dtype, require_shape
from ..toolchain.language import jit, row_offset, tl, triton
from ..toolchain.targets import on_device, on_triton, processors

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*KERNEL_DTYPES, torch.float64)
WIDE = 4096  # from here on a row of V3 is the model's, not a latent's
WIDEST = 16384  # values of a row that one program holds in registers

Settings = dict[str, int]


def rms_norm(
    x: Float[Tensor, "*batch N"], weight: Float[Tensor, " N"], eps: float, settings: Settings | None = None
) -> Float[Tensor, "*batch N"]:
    """y = x / sqrt(mean(x²) + ε) ⊙ w over the last dimension; differentiable in x and w.

    FP16 and BF16 are normalised in FP32 and rounded once, after the multiplication by w. (``layers.norm``
    rounds before it and after it; the two differ by at most two last places.) FP64 and rows wider than 16384 go
    to the reference.

    Args:
        x: any leading dimensions.
        weight: w.
        eps: ε.
        settings: the forward kernel's, instead of those in ``tuned/``.

    Returns:
        y in the shape and dtype of x.

    Raises:
        KernelError: a dtype that is not there, or a weight that does not fit.
    """
    _check("rms_norm", x, weight)
    if not _on_kernel(x, weight):
        return rms_norm_ref(x, weight, eps)
    return _RMSNorm.apply(x, None, weight, eps, settings)[0]


def add_rms_norm(
    x: Float[Tensor, "*batch N"],
    residual: Float[Tensor, "*batch N"],
    weight: Float[Tensor, " N"],
    eps: float,
    settings: Settings | None = None,
) -> tuple[Float[Tensor, "*batch N"], Float[Tensor, "*batch N"]]:
    """s = x + residual and rms_norm(s, w) in one pass; differentiable in x, residual and w.

    The sum is rounded to the dtype of x before it is normalised, as if it had been written and read.

    Returns:
        the normalised sum, and the sum, which is the next residual.

    Raises:
        KernelError: a dtype that is not there, or shapes that do not fit.
    """
    _check("add_rms_norm", x, weight)
    require_shape("add_rms_norm", "residual", residual, x.shape)
    require_dtype("add_rms_norm", "residual", residual, (x.dtype,))
    if not _on_kernel(x, weight, residual):
        return add_rms_norm_ref(x, residual, weight, eps)
    return _RMSNorm.apply(x, residual, weight, eps, settings)


def rms_norm_ref(
    x: Float[Tensor, "*batch N"], weight: Float[Tensor, " N"], eps: float
) -> Float[Tensor, "*batch N"]:
    """The same in plain PyTorch: FP32 inside, FP64 for FP64."""
    wide = x if x.dtype == torch.float64 else x.float()
    inverse_rms = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * inverse_rms * weight.to(wide.dtype)).to(x.dtype)


def add_rms_norm_ref(
    x: Float[Tensor, "*batch N"], residual: Float[Tensor, "*batch N"], weight: Float[Tensor, " N"], eps: float
) -> tuple[Float[Tensor, "*batch N"], Float[Tensor, "*batch N"]]:
    """The same in plain PyTorch."""
    total = x + residual
    return rms_norm_ref(total, weight, eps), total


def _check(operation: str, x: Tensor, weight: Tensor) -> None:
    require_dtype(operation, "x", x, DTYPES)
    require_dtype(operation, "weight", weight, DTYPES)
    require_shape(operation, "weight", weight, x.shape[-1:])


def _on_kernel(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> bool:
    if x.is_meta or x.shape[-1] > WIDEST or not x.numel():
        return False
    return on_triton(x, weight, residual) and {x.dtype, weight.dtype} <= set(KERNEL_DTYPES)


def as_rows(x: Tensor) -> Tensor:
    """[rows, width] with a row's values side by side; a copy only where no view does."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps, settings):
        rows, other = as_rows(x), None if residual is None else as_rows(residual)
        m, n = rows.shape
        y = x.new_empty(x.shape)
        total = None if residual is None else x.new_empty(x.shape)
        inverse_rms = x.new_empty(m, dtype=torch.float32)
        row = settings or tuning.pick("rms_norm", x.device, N=n)
        with on_device(x):
            rms_norm_kernel[(triton.cdiv(m, row["ROWS"]),)](
                rows, other, weight.contiguous(), y, total, inverse_rms, m, n, rows.stride(0),
                0 if other is None else other.stride(0), eps,
                ADD=residual is not None, WIDTH=triton.next_power_of_2(n), **row,
            )  # fmt: skip
        ctx.save_for_backward(rows if total is None else total.view(m, n), weight, inverse_rms)
        ctx.fused, ctx.shape = residual is not None, x.shape
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_total):
        rows, weight, inverse_rms = ctx.saved_tensors
        m, n = rows.shape
        grad = rows.new_zeros(m, n) if grad is None else as_rows(grad)
        extra = None if grad_total is None else as_rows(grad_total)
        width = triton.next_power_of_2(n)
        row = tuning.pick("rms_norm_backward", rows.device, N=n, bytes=width * rows.element_size())
        programs = min(triton.cdiv(m, row["ROWS"]), processors(rows.device) * row["PER_PROCESSOR"])
        grad_x = rows.new_empty(m, n)
        parts = rows.new_empty(programs, n, dtype=torch.float32)
        options = {k: v for k, v in row.items() if k != "PER_PROCESSOR"}
        with on_device(rows):
            rms_norm_backward_kernel[(programs,)](
                grad, extra, rows, weight.contiguous(), inverse_rms, grad_x, parts, m, n,
                grad.stride(0), 0 if extra is None else extra.stride(0), rows.stride(0),
                ADD=extra is not None, WIDTH=width, **options,
            )  # fmt: skip
        grad_x = grad_x.view(ctx.shape)
        return grad_x, grad_x if ctx.fused else None, parts.sum(0).to(weight.dtype), None, None


@jit
def rms_norm_kernel(
    x, residual, weight, y, total, inverse_rms, M, N, stride_x, stride_residual, eps,
    ADD: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows a program."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    inside = (row < M)[:, None] & (column < N)
    place = row_offset(row, N)[:, None] + column
    values = tl.load(x + row_offset(row, stride_x)[:, None] + column, mask=inside, other=0.0)  # [ROWS, WIDTH]
    if ADD:
        source = residual + row_offset(row, stride_residual)[:, None] + column
        added = values.to(tl.float32) + tl.load(source, mask=inside, other=0.0).to(tl.float32)  # [ROWS, WIDTH]
        values = rounded_to(added, y.dtype.element_ty)
        tl.store(total + place, values, mask=inside)  # [ROWS, WIDTH]
    values = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 1) / N + eps)
    by = tl.load(weight + column, mask=column < N, other=0.0).to(tl.float32)  # [1, WIDTH]
    tl.store(y + place, rounded_to(values * scale[:, None] * by, y.dtype.element_ty), mask=inside)  # [ROWS, WIDTH]
    tl.store(inverse_rms + row, scale, mask=row < M)  # [ROWS]


@jit
def rms_norm_backward_kernel(
    grad, extra, x, weight, inverse_rms, grad_x, parts, M, N, stride_grad, stride_extra, stride_x,
    ADD: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Every so-many-th set of ROWS rows, and this program's part of the weight's gradient.

    A wide row takes so many registers that one program fills a multiprocessor; with STAGES the next rows are on
    their way into shared memory while it computes.
    """
    column = tl.arange(0, WIDTH)[None, :]
    by = tl.load(weight + column, mask=column < N, other=0.0).to(tl.float32)  # [1, WIDTH]
    part = tl.zeros([ROWS, WIDTH], tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(M, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = block * ROWS + tl.arange(0, ROWS)
        inside = (row < M)[:, None] & (column < N)
        g = tl.load(grad + row_offset(row, stride_grad)[:, None] + column, mask=inside, other=0.0)  # [ROWS, WIDTH]
        values = tl.load(x + row_offset(row, stride_x)[:, None] + column, mask=inside, other=0.0)  # [ROWS, WIDTH]
        scale = tl.load(inverse_rms + row, mask=row < M, other=0.0)[:, None]  # [ROWS, 1]
        g, normed = g.to(tl.float32), values.to(tl.float32) * scale
        part += g * normed
        g *= by
        result = (g - normed * (tl.sum(g * normed, 1) / N)[:, None]) * scale
        if ADD:
            source = extra + row_offset(row, stride_extra)[:, None] + column
            result += tl.load(source, mask=inside, other=0.0).to(tl.float32)  # [ROWS, WIDTH]
        place = row_offset(row, N)[:, None] + column
        tl.store(grad_x + place, rounded_to(result, grad_x.dtype.element_ty), mask=inside)  # [ROWS, WIDTH]
    target = parts + row_offset(tl.program_id(0), N) + column
    tl.store(target, tl.sum(part, 0)[None, :], mask=column < N)  # [1, WIDTH]


def meant_for(row: tuning.Row, n: int, taken: int = 0) -> bool:
    """Whether a row of settings is for this width and as many bytes; those without a width are for the model's."""
    bounds = row["when"]
    low, high = bounds.get("N", (WIDE, n))
    least, most = bounds.get("bytes", (taken, taken))
    return low <= n <= high and least <= taken <= most
