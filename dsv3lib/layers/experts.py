"""Experts: one shared by all tokens, and many of which each token visits a few (DeepSeekMoE).

Tokens are sorted by expert, so that each expert's rows lie together and one grouped product serves all
experts; then each token gathers its experts' answers, weighted. Every token visits every expert it chose:
there is no capacity and nothing is dropped, in training or inference (paper §2.1.2, "No Token-Dropping").
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..config import ModelConfig
from ..kernels.elementwise.gated import swiglu
from ..kernels.matmul.grouped_gemm import grouped_gemm, grouped_gemm_ref
from ..kernels.moe.permutation import permute, unpermute
from ..kernels.moe.placement import place_visits_ref
from ..kernels.toolchain.targets import for_layers
from .expert_by_expert import experts_one_by_one
from .router import Router

CACHED_VALUES = 2**18  # of an MLP's hidden layer at a time: 1 MiB in FP32


class Routing(NamedTuple):
    """How one mixture layer spread its tokens.

    Args:
        indices: chosen experts, Int64 [B, T, A]. scores: affinities s, [B, T, E], in the graph.
    """

    indices: Int[Tensor, "B T A"]
    scores: Float[Tensor, "B T E"]


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) ⊙ up x)."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        with warnings.catch_warnings():  # width 0, no shared expert, gives a tensor that torch finds odd
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            self.gate_proj = nn.Linear(hidden, width, bias=False)
            self.up_proj = nn.Linear(hidden, width, bias=False)
            self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
        """The same for each token; on a CPU a few rows at a time, whose hidden values stay in its cache."""
        rows = CACHED_VALUES // max(self.gate_proj.out_features, 1)
        if x.device.type != "cpu" or x.numel() <= rows * x.shape[-1]:
            return self._swiglu(x)
        parts = x.flatten(0, -2).split(rows)
        return torch.cat([self._swiglu(part) for part in parts]).view_as(x)

    def _swiglu(self, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """The routed experts' weights, stacked, with gate and up projection in one matrix.

    Attributes:
        gate_up_proj: [E, 2F, D], gate rows first. down_proj: [E, D, F].
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        n, d, f = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(n, 2 * f, d))
        self.down_proj = nn.Parameter(torch.empty(n, d, f))

    def forward(
        self, x: Float[Tensor, "N D"], indices: Int[Tensor, "N A"], weights: Float[Tensor, "N A"]
    ) -> Float[Tensor, "N D"]:
        """Σ g · FFN_i(x) over each token's experts (second sum of Eq. 12).

        Args:
            x: tokens. indices: their experts. weights: gate values g, FP32.
        """
        if for_layers(x):
            return self.on_kernels(x, indices, weights)
        visits = sort_by_expert(indices, self.gate_up_proj.shape[0])
        if x.device.type == "cpu" and x.element_size() >= 4:
            matrices = (self.gate_up_proj, self.down_proj)
            weights = weights.to(x.dtype)
            return experts_one_by_one(x, weights, *matrices, visits.order, visits.inverse, visits.counts)
        return self.staged(x, weights, visits)

    def staged(
        self, x: Float[Tensor, "N D"], weights: Float[Tensor, "N A"], visits: Visits
    ) -> Float[Tensor, "N D"]:
        """The same in stages, each over all experts: the plain form of the two others."""
        multiply = grouped_gemm if x.device.type == "cpu" else grouped_gemm_ref
        rows = dispatch(x, visits)
        gate, up = multiply(rows, self.gate_up_proj, visits.counts).chunk(2, -1)
        y = multiply(F.silu(gate) * up, self.down_proj, visits.counts)
        return combine(y, weights.to(y.dtype), visits)

    def on_kernels(
        self, x: Float[Tensor, "N D"], indices: Int[Tensor, "N A"], weights: Float[Tensor, "N A"]
    ) -> Float[Tensor, "N D"]:
        """The same stages, each one kernel; how many tokens an expert got never leaves the GPU."""
        rows, counts, positions = permute(x, indices, self.gate_up_proj.shape[0])
        hidden = swiglu(grouped_gemm(rows, self.gate_up_proj, counts))
        return unpermute(grouped_gemm(hidden, self.down_proj, counts), positions, weights)


class Visits(NamedTuple):
    """Which token goes where, as a permutation of the N x A visits.

    Args:
        token: of each sorted visit, the token that makes it, Int64 [NA].
        order: of each sorted visit, its place in the flattened [N, A].
        inverse: of each place in [N, A], its row among the sorted, Int64 [N, A].
        counts: visits per expert, zeros included, Int64 [E].
    """

    token: Int[Tensor, " NA"]
    order: Int[Tensor, " NA"]
    inverse: Int[Tensor, "N A"]
    counts: Int[Tensor, " E"]


def sort_by_expert(indices: Int[Tensor, "N A"], n_experts: int) -> Visits:
    """Lay all visits of one expert side by side, tokens in order within it.

    Args:
        indices: chosen experts. n_experts: how many there are.
    """
    order, inverse, counts = place_visits_ref(indices, n_experts)
    return Visits(order // indices.shape[1], order, inverse, counts)


def dispatch(x: Float[Tensor, "N D"], visits: Visits) -> Float[Tensor, "NA D"]:
    """Send each token to its experts: one row per visit, sorted by expert."""
    return _Dispatch.apply(x, visits)


def combine(y: Float[Tensor, "NA D"], weights: Float[Tensor, "N A"], visits: Visits) -> Float[Tensor, "N D"]:
    """Bring the answers home: each token's sum over its experts, by gate value."""
    return _Combine.apply(y, weights, visits)


def _gather_sum(y: Tensor, weights: Tensor | None, inverse: Tensor) -> Tensor:
    """Σ_a weights[n, a] · y[inverse[n, a]]: what an embedding layer calls a bag. No weights: all one.

    Gathering and summing in a fixed order, where scatter-adding would sum in the order of the threads: the
    same step gives the same bits every time.
    """
    return F.embedding_bag(inverse, y, mode="sum", per_sample_weights=weights)


class _Dispatch(torch.autograd.Function):
    """Dispatch and combine are each other's transpose: the backward of one is the forward of the other."""

    @staticmethod
    def forward(ctx, x, visits):
        ctx.visits = visits
        return x.index_select(0, visits.token)

    @staticmethod
    def backward(ctx, grad):
        return _gather_sum(grad.contiguous(), None, ctx.visits.inverse), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, weights, visits):
        ctx.save_for_backward(y, weights)
        ctx.visits = visits
        return _gather_sum(y, weights, visits.inverse)

    @staticmethod
    def backward(ctx, grad):
        y, weights = ctx.saved_tensors
        visits = ctx.visits
        sent = grad.index_select(0, visits.token)
        sorted_weights = weights.flatten()[visits.order]
        grad_weights = torch.linalg.vecdot(sent, y)[visits.inverse]
        return sent.mul_(sorted_weights[:, None]), grad_weights, None


class MixtureOfExperts(nn.Module):
    """Shared experts plus the routed ones that the gate chose (paper §2.1.2, Eq. 12 without the residual)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = MLP(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size)

    def forward(self, x: Float[Tensor, "B T D"]) -> tuple[Float[Tensor, "B T D"], Routing]:
        """The mixture's output, and how tokens were routed."""
        tokens = x.flatten(0, 1)
        indices, weights, scores = self.gate(tokens)
        y = self.experts(tokens, indices, weights).view_as(x) + self.shared_experts(x)
        return y, Routing(indices.view(*x.shape[:2], -1), scores.view(*x.shape[:2], -1))
