"""RMSNorm on a CPU in as few passes over memory as it takes; torch's takes a dozen small operations there."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..autograd import once_differentiable


def rms_norm(
    x: Float[Tensor, "*batch N"], weight: Float[Tensor, " N"], eps: float
) -> Float[Tensor, "*batch N"]:
    """y = x / sqrt(mean(x²) + ε) · w over the last dimension; differentiable once in x and w.

    Args:
        x: FP32 or FP64.
        weight: w.
        eps: ε.
    """
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """With n = x / rms and m the mean of g ⊙ w ⊙ n over the channels: dx = (g ⊙ w − m n) / rms, dw = Σ g ⊙ n."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse_rms = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms)
        return (x * inverse_rms).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, inverse_rms = ctx.saved_tensors
        n = x * inverse_rms
        products = grad * n
        mean = torch.matmul(products, weight).div_(x.shape[-1]).unsqueeze(-1)
        grad_x = torch.mul(grad, weight).addcmul_(n, mean, value=-1).mul_(inverse_rms)
        return grad_x, products.flatten(0, -2).sum(0), None
