"""GEMM in FP32 on a CPU: larger matrix products by whichever of torch's two libraries is quicker on this processor.

torch gives FP32 products to MKL, which on AMD's processors with AVX-512 runs AVX2 code, at half of what they can.
oneDNN, which torch has for other work, makes its code for the processor that it finds, and is twice as quick there
(``benchmarks/gemm.py`` measures both). Elsewhere MKL it stays. The processor alone decides, and no measurement: a run
must give the same numbers twice.
"""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad

LEAST = 2**21  # multiplications: oneDNN takes 10 us to begin a product
LEAST_ROWS = 16  # likewise
STEPS = 8  # numbers of rows between n and 2 n that it is given
KINDS = (Tensor, nn.Parameter)


@lru_cache(maxsize=1)
def by_onednn() -> bool:
    """Whether larger products are oneDNN's on this machine."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and "AuthenticAMD" in vendor() and has_onednn()


def has_onednn() -> bool:
    """Whether this build of torch has oneDNN, and an operation that takes tensors as they are."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def vendor() -> str:
    """Whose processor this is, as the processor says it among other words ("AuthenticAMD", "GenuineIntel")."""
    try:
        return Path("/proc/cpuinfo").read_text(errors="replace").partition("\n\n")[0]
    except OSError:  # not Linux
        return platform.processor()


def padded_size(n: int) -> int:
    """To how many rows n are padded, where their number changes from call to call.

    oneDNN makes code for each shape, in 0.3 ms, and keeps it for good, half a megabyte. So it is given few of them, and
    up to an eighth of the rows is for nothing.

    Args:
        n: rows that are used; the padding must be zeros where it is summed over.
    """
    if n <= LEAST_ROWS or not by_onednn():
        return n
    step = max(LEAST_ROWS, 2 ** ((n - 1).bit_length() - 1) // STEPS)
    return -(-n // step) * step


def linear(
    x: Float[Tensor, "*N I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"] | None = None
) -> Float[Tensor, "*N O"]:
    """y = x Wᵀ + b; differentiable any number of times, as ``torch.nn.functional.linear``, its plain twin.

    Args:
        x: any leading dimensions.
        weight: W.
        bias: b, or ``None``.
    """
    suits = _suit(x, weight.t()) and (bias is None or (bias.dtype is x.dtype and bias.shape == weight.shape[:1]))
    if not suits or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _Linear.apply(x, weight, bias)
    return _linear(x, weight, bias)


def weight_gradient(grad: Float[Tensor, "N O"], x: Float[Tensor, "N I"]) -> Float[Tensor, "O I"]:
    """∂L/∂W = ∂L/∂yᵀ x of a linear layer, without a gradient of its own; ``grad.mT @ x`` is its plain twin.

    Args:
        grad: ∂L/∂y.
        x: the layer's input.
    """
    if not _suit(grad.t(), x):
        return grad.t() @ x
    return mm(padded(grad).t(), padded(x)).contiguous()


def mm(a: Float[Tensor, "M K"], b: Float[Tensor, "K N"]) -> Float[Tensor, "M N"]:
    """a b, without a gradient, of operands that come in few shapes; ``torch.mm`` is its plain twin.

    Args:
        a: by rows or by columns in memory.
        b: likewise.

    Returns:
        By rows or by columns in memory.
    """
    if not _suit(a, b):
        return torch.mm(a, b)
    # oneDNN's first operand lies by rows; where neither does, the smaller one is copied so.
    if not a.is_contiguous() and b.numel() < a.numel() and a.t().is_contiguous():
        return onednn(b.t(), a).t()
    return onednn(a, b.t())


class _Linear(torch.autograd.Function):
    """∂L/∂x = ∂L/∂y W and ∂L/∂W = ∂L/∂yᵀ x: linear layers too, and so differentiable again."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        of_y, of_x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_x = linear(grad, weight.t()) if wants_x else None
        grad_weight = None
        if wants_weight:
            grad_weight = of_y.t() @ of_x if torch.is_grad_enabled() else weight_gradient(of_y, of_x)
        return grad_x, grad_weight, of_y.sum(0) if wants_bias else None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    n = x.numel() // x.shape[-1]
    if padded_size(n) == n:
        return onednn(x, weight, bias)
    y = onednn(padded(x.reshape(n, -1)), weight, bias)[:n]
    return y if x.ndim == 2 else y.view(*x.shape[:-1], -1)


def padded(x: Float[Tensor, "N I"]) -> Float[Tensor, "padded I"]:
    """x with zeros behind it up to ``padded_size(N)``; x itself where that is N."""
    n = len(x)
    if padded_size(n) == n:
        return x
    room = padded_room(n, x)
    room[:n] = x
    return room


def padded_room(n: int, like: Float[Tensor, "N I"]) -> Float[Tensor, "padded I"]:
    """Room for n rows, not filled, and zeros behind them up to ``padded_size(n)``.

    Args:
        n: rows.
        like: of the width, dtype and device.
    """
    room = like.new_empty(padded_size(n), like.shape[1])
    room[n:].zero_()
    return room


def onednn(
    x: Float[Tensor, "*N I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"] | None = None
) -> Float[Tensor, "*N O"]:
    """x Wᵀ + b by oneDNN, whatever the sizes; FP32, no gradient. The arguments are those of ``linear``.

    The weight lies by rows or by columns; with gaps between them oneDNN runs reference code, a hundred times as slow.
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _suit(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN should make a b; what does not fit together is torch's to refuse."""
    return (
        a.dtype is torch.float32 is b.dtype
        and a.numel() * b.shape[1] >= LEAST
        and a.numel() >= LEAST_ROWS * a.shape[-1]
        and b.shape[1] >= LEAST_ROWS
        and a.shape[-1] == b.shape[0]
        and by_onednn()
        and a.device.type == "cpu" == b.device.type
        # A second operand with gaps between its rows gets oneDNN's reference code, a hundred times as slow.
        and (b.is_contiguous() or b.t().is_contiguous())
        and type(a) in KINDS
        and type(b) in KINDS
        and not _watched()
    )


def _watched() -> bool:
    """Whether somebody follows torch's operations, who knows products by their usual names, or derives forward."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
    )
