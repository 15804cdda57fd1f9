"""Grouped matrix product: rows sorted by group, one weight matrix per group, groups of any size."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import KernelError


def grouped_gemm_ref(
    x: Float[Tensor, "M K"], weight: Float[Tensor, "G N K"], counts: Int[Tensor, " G"]
) -> Float[Tensor, "M N"]:
    """y = x Wᵀ group by group, the plain form: one product a group, joined."""
    parts = x.split(counts.tolist())
    return torch.cat([part @ w.t() for part, w in zip(parts, weight, strict=True)])


def grouped_gemm(
    x: Float[Tensor, "M K"], weight: Float[Tensor, "G N K"], counts: Int[Tensor, " G"]
) -> Float[Tensor, "M N"]:
    """y = x Wᵀ for rows that are sorted by group: the first ``counts[0]`` rows meet ``weight[0]``, and so on.

    Args:
        x: rows, those of one group side by side. weight: one matrix a group.
        counts: rows per group, summing to M; zero is allowed.

    Returns:
        Products in the order of the rows. Differentiable in ``x`` and ``weight``.

    Raises:
        KernelError: widths differ, or the counts do not sum to the rows.
    """
    if x.shape[1] != weight.shape[2] or counts.numel() != weight.shape[0]:
        raise KernelError(
            f"grouped_gemm: rows of width {x.shape[1]} and {counts.numel()} counts do not fit weights "
            f"{tuple(weight.shape)}, which are [groups, out, in]"
        )
    return _GroupedGemm.apply(x, weight, counts)


class _GroupedGemm(torch.autograd.Function):
    """Each product is written where it belongs: no joining copy forward, none backward."""

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
