"""SwiGLU: silu(gate) ⊙ up, where one matrix product has made both halves side by side; forward and backward.

The two numbers, for 65536 visits of experts of width 2048 in BF16: 537 MB read, 268 MB written forward, 0.8 GB
read and 0.5 GB written backward, and about ten operations a value. Memory is the limit. PyTorch's silu and product
write and read the activated gate once more; backward they keep it in memory besides. Here neither happens: the
sigmoid is computed again from the gate, which costs one exponential.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ...autograd import once_differentiable
from ..quantize.rounding import rounded_to, widened
from ..toolchain import tuning
from ..toolchain.checks import require_dtype, require_multiple
from ..toolchain.language import INTERPRETED, jit, row_offset, tl, triton
from ..toolchain.targets import on_device, on_triton
from .norms import as_rows

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*KERNEL_DTYPES, torch.float64)

Settings = dict[str, int]


def swiglu(gate_up: Float[Tensor, "*M both"], settings: Settings | None = None) -> Float[Tensor, "*M I"]:
    """silu(gate) ⊙ up = gate · σ(gate) · up; differentiable.

    FP16 and BF16 are computed in FP32 and rounded once; FP64 goes to the reference.

    Args:
        gate_up: [..., 2 I], the gate in the first half of a row, as ``layers.experts`` stacks them.

    Returns:
        [..., I] in the dtype of gate_up.

    Raises:
        KernelError: an odd width, or a dtype that is not there.
    """
    require_dtype("swiglu", "gate_up", gate_up, DTYPES)
    require_multiple("swiglu", "the last dimension", gate_up.shape[-1], 2)
    if gate_up.is_meta or gate_up.dtype == torch.float64 or not on_triton(gate_up):
        return swiglu_ref(gate_up)
    return _SwiGLU.apply(gate_up, settings)


def swiglu_ref(gate_up: Float[Tensor, "*M both"]) -> Float[Tensor, "*M I"]:
    """The same in plain PyTorch: FP32 inside, FP64 for FP64."""
    wide = gate_up if gate_up.dtype == torch.float64 else gate_up.float()
    gate, up = wide.chunk(2, -1)
    return (F.silu(gate) * up).to(gate_up.dtype)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, settings):
        ctx.save_for_backward(gate_up)
        out = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
        if out.numel():
            _launch(swiglu_kernel, "swiglu", gate_up, out, settings)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (gate_up,) = ctx.saved_tensors
        grad_both = gate_up.new_empty(gate_up.shape)
        if grad.numel():
            _launch(swiglu_backward_kernel, "swiglu_backward", gate_up, grad_both, None, as_rows(grad))
        return grad_both, None


def _launch(
    kernel,
    operation: str,
    gate_up: Tensor,
    out: Tensor,
    settings: Settings | None,
    grad: Tensor | None = None,
) -> None:
    rows = as_rows(gate_up)
    m, width = rows.shape[0], rows.shape[1] // 2
    row = settings or tuning.pick(operation, rows.device, I=width)
    grads = () if grad is None else (grad, grad.stride(0))
    with on_device(rows):
        kernel[(triton.cdiv(m, row["ROWS"]), triton.cdiv(width, row["COLUMNS"]))](
            rows, out, m, width, rows.stride(0), *grads, **row
        )


@jit
def silu(gate):
    """gate · σ(gate) in FP32, and σ(gate)."""
    sigmoid = _sigmoid(gate)
    return gate * sigmoid, sigmoid


@jit
def _sigmoid(x):
    """1 / (1 + 2^(-x log2 e)) in four instructions, to a few last places; below -87 it is 0.

    ``tl.sigmoid`` takes twelve, which keep results below FP32's normal numbers alive: here they meet a 1, or
    are 10^-38 of a gate of -87.
    """
    if INTERPRETED:
        return tl.sigmoid(x)
    return tl.inline_asm_elementwise(
        """{
            .reg .f32 power;
            mul.f32 power, $1, 0fBFB8AA3B;
            ex2.approx.ftz.f32 power, power;
            add.f32 power, power, 0f3F800000;
            rcp.approx.ftz.f32 $0, power;
        }""",
        "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@jit
def swiglu_kernel(gate_up, out, M, I, stride_x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """ROWS x COLUMNS results a program."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < M)[:, None] & (column < I)
    source = gate_up + row_offset(row, stride_x)[:, None] + column
    gate = widened(tl.load(source, mask=inside, other=0.0))  # [ROWS, COLUMNS]
    up = widened(tl.load(source + I, mask=inside, other=0.0))  # [ROWS, COLUMNS]
    activated, _ = silu(gate)
    result = rounded_to(activated * up, out.dtype.element_ty)
    tl.store(out + row_offset(row, I)[:, None] + column, result, mask=inside)  # [ROWS, COLUMNS]


@jit
def swiglu_backward_kernel(
    gate_up, grad_both, M, I, stride_x, grad, stride_grad, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """d gate = g · up · σ (1 + gate (1 - σ)), d up = g · gate · σ."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < M)[:, None] & (column < I)
    source = gate_up + row_offset(row, stride_x)[:, None] + column
    gate = widened(tl.load(source, mask=inside, other=0.0))  # [ROWS, COLUMNS]
    up = widened(tl.load(source + I, mask=inside, other=0.0))  # [ROWS, COLUMNS]
    # [ROWS, COLUMNS]
    g = widened(tl.load(grad + row_offset(row, stride_grad)[:, None] + column, mask=inside, other=0.0))
    activated, sigmoid = silu(gate)
    slope = sigmoid + activated * (1 - sigmoid)
    target = grad_both + row_offset(row, 2 * I)[:, None] + column
    tl.store(target, rounded_to(g * up * slope, grad_both.dtype.element_ty), mask=inside)  # [ROWS, COLUMNS]
    tl.store(target + I, rounded_to(g * activated, grad_both.dtype.element_ty), mask=inside)  # [ROWS, COLUMNS]
