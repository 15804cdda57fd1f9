"""RMSNorm: divide by the root of the mean square, then scale each channel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


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
        if x.dtype in (torch.bfloat16, torch.float16):
            return F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype) * self.weight
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        """Width and ε, as ``print(model)`` shows them."""
        return f"{self.weight.numel()}, eps={self.eps}"
