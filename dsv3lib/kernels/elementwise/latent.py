"""What is cached of a token, in one pass: the latent normalised, the shared key turned, side by side.

One matrix product makes both, [c_kv; k_rope] (paper §2.1.1, Eqs. 1 and 3); then the first 512 numbers go through
RMSNorm and the last 64 through RoPE. The parts are so narrow that PyTorch's split, norm, turn and cat cost their
dozen launches and intermediate copies rather than their arithmetic.

The two numbers, for 8192 tokens of V3 in BF16: 9.4 MB read, 9.4 MB written, some five operations a value: four
microseconds of an H200's memory, as long as one empty launch. So the aim is one launch.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ...autograd import once_differentiable
from ...errors import KernelError
from ..quantize.rounding import rounded_to
from ..toolchain import tuning
from ..toolchain.checks import require_dtype, require_shape
from ..toolchain.language import jit, row_offset, tl, triton
from ..toolchain.targets import on_device, on_triton, processors
from .norms import DTYPES, KERNEL_DTYPES, WIDEST, as_rows, rms_norm_ref
from .rotary import checked_table, turn_pairs, turned_ref

Settings = dict[str, int]


def norm_and_turn(
    x: Float[Tensor, "*batch latent"],
    weight: Float[Tensor, " C"],
    turns: Tensor,
    eps: float,
    settings: Settings | None = None,
) -> Float[Tensor, "*batch latent"]:
    """[RMSNorm(c); RoPE(k)] of [c; k]; differentiable in x and the weight.

    FP16 and BF16 are computed in FP32 and rounded once; FP64 and latents wider than 16384 go to the reference.

    Args:
        x: [..., C + R].
        weight: of the norm, its width is C.
        turns: as in :func:`~dsv3lib.kernels.elementwise.rotary.rope`, of R/2 pairs.
        eps: ε.

    Returns:
        the shape and dtype of x.

    Raises:
        KernelError: dtypes or shapes that do not fit.
    """
    table = _check(x, weight, turns)
    dtypes = {x.dtype, weight.dtype}
    if x.is_meta or not x.numel() or weight.numel() > WIDEST or not dtypes <= set(KERNEL_DTYPES):
        return norm_and_turn_ref(x, weight, table, eps)
    if not on_triton(x, weight, table):
        return norm_and_turn_ref(x, weight, table, eps)
    return _NormAndTurn.apply(x, weight, table.float().contiguous(), eps, settings)


def norm_and_turn_ref(
    x: Float[Tensor, "*batch latent"], weight: Float[Tensor, " C"], turns: Tensor, eps: float
) -> Float[Tensor, "*batch latent"]:
    """The same in plain PyTorch: split, each part on its own, join."""
    table = torch.view_as_real(turns) if turns.is_complex() else turns
    c, k = x.split([weight.numel(), x.shape[-1] - weight.numel()], -1)
    return torch.cat([rms_norm_ref(c, weight, eps), turned_ref(k, table)], -1)


def _check(x: Tensor, weight: Tensor, turns: Tensor) -> Tensor:
    require_dtype("norm_and_turn", "x", x, DTYPES)
    require_dtype("norm_and_turn", "weight", weight, DTYPES)
    require_shape("norm_and_turn", "weight", weight, (None,))
    rotary = x.shape[-1] - weight.numel()
    if rotary < 2:
        raise KernelError(
            f"norm_and_turn: x has width {x.shape[-1]}, expected at least 2 more than the weight's {weight.numel()}"
        )
    return checked_table("norm_and_turn", turns, x.shape[:-1], rotary)


class _NormAndTurn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, table, eps, settings):
        rows = as_rows(x)
        m, c = rows.shape[0], weight.numel()
        out = x.new_empty(x.shape)
        inverse_rms = x.new_empty(m, dtype=torch.float32)
        row = settings or tuning.pick("norm_and_turn", x.device, C=c)
        with on_device(x):
            norm_and_turn_kernel[(triton.cdiv(m, row["ROWS"]),)](
                rows, weight.contiguous(), table, out, inverse_rms, m, table.shape[:-2].numel(), rows.stride(0), eps,
                **widths(c, x.shape[-1] - c), **row,
            )  # fmt: skip
        ctx.save_for_backward(rows, weight, table, inverse_rms)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, weight, table, inverse_rms = ctx.saved_tensors
        m, c = rows.shape[0], weight.numel()
        shape, grad = grad.shape, as_rows(grad)
        row = tuning.pick("norm_and_turn_backward", rows.device, C=c)
        programs = min(triton.cdiv(m, row["ROWS"]), processors(rows.device) * row["PER_PROCESSOR"])
        grad_x = rows.new_empty(shape)
        parts = rows.new_empty(programs, c, dtype=torch.float32)
        options = {k: v for k, v in row.items() if k != "PER_PROCESSOR"}
        with on_device(rows):
            norm_and_turn_backward_kernel[(programs,)](
                grad, rows, weight.contiguous(), table, inverse_rms, grad_x, parts, m,
                table.shape[:-2].numel(), grad.stride(0), rows.stride(0),
                **widths(c, shape[-1] - c), **options,
            )  # fmt: skip
        return grad_x, parts.sum(0).to(weight.dtype), None, None, None


def widths(c: int, rotary: int) -> dict[str, int]:
    pairs = triton.next_power_of_2(rotary // 2)
    return {"C": c, "WIDTH": triton.next_power_of_2(c), "ROTARY": rotary, "PAIRS": pairs}


@jit
def norm_and_turn_kernel(
    x, weight, table, out, inverse_rms, M, period, stride_x, eps,
    C: tl.constexpr, WIDTH: tl.constexpr, ROTARY: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS tokens a program. ``period``: after so many tokens turns recur."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    source = x + row_offset(row, stride_x)[:, None]
    target = out + row_offset(row, C + ROTARY)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = (row < M)[:, None] & (column < C)
    values = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)  # [ROWS, WIDTH]
    scale = tl.rsqrt(tl.sum(values * values, 1) / C + eps)
    by = tl.load(weight + column, mask=column < C, other=0.0).to(tl.float32)  # [1, WIDTH]
    # [ROWS, WIDTH]
    tl.store(target + column, rounded_to(values * scale[:, None] * by, out.dtype.element_ty), mask=inside)
    tl.store(inverse_rms + row, scale, mask=row < M)  # [ROWS]
    column = tl.arange(0, 2 * PAIRS)[None, :]
    inside = (row < M)[:, None] & (column < ROTARY)
    # [ROWS, 2 PAIRS]
    turns = tl.load(table + row_offset(row % period, ROTARY)[:, None] + column, mask=inside, other=0.0)
    key = tl.load(source + C + column, mask=inside, other=0.0).to(tl.float32)  # [ROWS, 2 PAIRS]
    # [ROWS, 2 PAIRS]
    tl.store(
        target + C + column, rounded_to(turn_pairs(key, turns, False), out.dtype.element_ty), mask=inside
    )


@jit
def norm_and_turn_backward_kernel(
    grad, x, weight, table, inverse_rms, grad_x, parts, M, period, stride_grad, stride_x,
    C: tl.constexpr, WIDTH: tl.constexpr, ROTARY: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Every so-many-th set of ROWS tokens, and this program's part of the weight's gradient: see ``norms``."""
    along = tl.arange(0, WIDTH)[None, :]
    pair = tl.arange(0, 2 * PAIRS)[None, :]
    by = tl.load(weight + along, mask=along < C, other=0.0).to(tl.float32)  # [1, WIDTH]
    part = tl.zeros([ROWS, WIDTH], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(M, ROWS), tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS)
        sent = grad + row_offset(row, stride_grad)[:, None]
        target = grad_x + row_offset(row, C + ROTARY)[:, None]
        inside = (row < M)[:, None] & (along < C)
        g = tl.load(sent + along, mask=inside, other=0.0).to(tl.float32)  # [ROWS, WIDTH]
        # [ROWS, WIDTH]
        values = tl.load(x + row_offset(row, stride_x)[:, None] + along, mask=inside, other=0.0).to(
            tl.float32
        )
        scale = tl.load(inverse_rms + row, mask=row < M, other=0.0)[:, None]  # [ROWS, 1]
        normed = values * scale
        part += g * normed
        g *= by
        result = (g - normed * (tl.sum(g * normed, 1) / C)[:, None]) * scale
        tl.store(target + along, rounded_to(result, grad_x.dtype.element_ty), mask=inside)  # [ROWS, WIDTH]
        inside = (row < M)[:, None] & (pair < ROTARY)
        # [ROWS, 2 PAIRS]
        turns = tl.load(table + row_offset(row % period, ROTARY)[:, None] + pair, mask=inside, other=0.0)
        g = tl.load(sent + C + pair, mask=inside, other=0.0).to(tl.float32)  # [ROWS, 2 PAIRS]
        back = rounded_to(turn_pairs(g, turns, True), grad_x.dtype.element_ty)
        tl.store(target + C + pair, back, mask=inside)  # [ROWS, 2 PAIRS]
    tl.store(parts + row_offset(tl.program_id(0), C) + along, tl.sum(part, 0)[None, :], mask=along < C)  # [1, WIDTH]
