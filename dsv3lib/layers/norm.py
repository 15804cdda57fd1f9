"""RMSNorm: divide by the root of the mean square, then scale each channel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..kernels.elementwise.norms import add_rms_norm, rms_norm
from ..kernels.toolchain.targets import for_layers


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + ε) · w, over the last dimension.

    Both latents of MLA pass through one too (paper §4.2, "additional RMSNorm layers after the compressed
    latent vectors"), with the same ε as every other norm.

    Args:
        dim: width of the last dimension.
        eps: ε, the configuration's ``rms_norm_eps``.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Normalise each vector.

        Args:
            x: any leading dimensions; bf16 and fp16 are normalised in FP32 and returned in their own dtype.
        """
        if for_layers(x):
            return rms_norm(x, self.weight, self.eps)
        if x.dtype in (torch.bfloat16, torch.float16):
            return F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype) * self.weight
        if x.device.type == "cpu":
            return _CpuRMSNorm.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def of_sum(
        self, x: Float[Tensor, "*batch dim"], residual: Float[Tensor, "*batch dim"]
    ) -> tuple[Float[Tensor, "*batch dim"], Float[Tensor, "*batch dim"]]:
        """The normalised sum and the sum, which is the next residual: in one pass where there is a kernel for it."""
        if for_layers(x):
            return add_rms_norm(x, residual, self.weight, self.eps)
        total = residual + x
        return self(total), total

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


class _CpuRMSNorm(torch.autograd.Function):
    """The same in as few passes over memory as it takes; torch's takes a dozen small operations on a CPU.

    With n = x / rms and m the mean of g ⊙ w ⊙ n over the channels: dx = (g ⊙ w − m n) / rms, dw = Σ g ⊙ n.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse_rms = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms)
        return (x * inverse_rms).mul_(weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight, inverse_rms = ctx.saved_tensors
        n = x * inverse_rms
        products = grad * n
        mean = torch.matmul(products, weight).div_(x.shape[-1]).unsqueeze(-1)
        grad_x = torch.mul(grad, weight).addcmul_(n, mean, value=-1).mul_(inverse_rms)
        return grad_x, products.flatten(0, -2).sum(0), None
