"""Experts: one shared by all tokens, and many of which each token visits a few (DeepSeekMoE).

Tokens are sorted by expert, so that each expert's rows lie together and one grouped product serves all
experts; then each token gathers its experts' answers, weighted. Every token visits every expert it chose:
there is no capacity and nothing is dropped, in training or inference (paper §2.1.2, "No Token-Dropping").
"""

from __future__ import annotations

import warnings
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..autograd import once_differentiable
from ..config import ModelConfig
from ..intact import why_touched
from ..linear import PLAIN, Linear, PlainRecipe, gated_linear, stacked_linear
from .router import Router


class Routing(NamedTuple):
    """How one mixture layer spread its tokens.

    Args:
        indices: chosen experts, Int64 [B, T, A].
        scores: affinities s, [B, T, E], in the graph.
    """

    indices: Int[Tensor, "B T A"]
    scores: Float[Tensor, "B T E"]


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) ⊙ up x)."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        with warnings.catch_warnings():  # width 0, no shared expert, gives a tensor that torch finds odd
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            self.gate_proj = Linear(hidden, width, bias=False)
            self.up_proj = Linear(hidden, width, bias=False)
            self.down_proj = Linear(width, hidden, bias=False)

    def forward(self, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
        """The same for each token."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        if why_touched(self.down_proj, (Linear,)) is None and self.down_proj.recipe.keeps_gate:
            return gated_linear(gate, up, self.down_proj.weight, None, self.down_proj.recipe)
        return self.down_proj(F.silu(gate) * up)


class Experts(nn.Module):
    """The routed experts' weights, stacked, with gate and up projection in one matrix.

    Attributes:
        gate_up_proj: [E, 2F, D], gate rows first.
        down_proj: [E, D, F].
        gate_up_recipe: how the first product is made.
        down_recipe: how the second is.
        first: number of the first expert of the stack; above 0 where a layer's experts lie on several ranks.
    """

    first: int = 0
    gate_up_recipe: PlainRecipe = PLAIN
    down_recipe: PlainRecipe = PLAIN
    recipes = MappingProxyType({"gate_up_recipe": "gate_up_proj", "down_recipe": "down_proj"})

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
            x: tokens.
            indices: their experts.
            weights: gate values g, FP32.
        """
        visits = sort_by_expert(indices, self.gate_up_proj.shape[0])
        y = self.answer(dispatch(x, visits), visits.counts)
        return combine(y, weights.to(y.dtype), visits)

    def answer(self, rows: Float[Tensor, "NA D"], counts: Int[Tensor, " E"]) -> Float[Tensor, "NA D"]:
        """Each expert's network over its own rows.

        Args:
            rows: sorted by expert.
            counts: rows of each expert.
        """
        gate, up = stacked_linear(rows, self.gate_up_proj, counts, self.gate_up_recipe).chunk(2, -1)
        return gated_linear(gate, up, self.down_proj, counts, self.down_recipe)


class Visits(NamedTuple):
    """Which token goes where, as a permutation of the N x A visits.

    Args:
        token: of each sorted visit, the token that makes it, Int64 [NA]; ``None`` where a kernel needs it not.
        order: of each sorted visit, its place in the flattened [N, A]; ``None`` likewise.
        inverse: of each place in [N, A], its row among the sorted, Int64 [N, A].
        counts: visits per expert, zeros included, Int64 [E].
    """

    token: Int[Tensor, " NA"] | None
    order: Int[Tensor, " NA"] | None
    inverse: Int[Tensor, "N A"]
    counts: Int[Tensor, " E"]


def sort_by_expert(indices: Int[Tensor, "N A"], n_experts: int) -> Visits:
    """Lay all visits of one expert side by side, tokens in order within it.

    Args:
        indices: chosen experts.
        n_experts: how many there are.
    """
    flat = indices.flatten()
    order = flat.argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    counts = torch.bincount(flat, minlength=n_experts)
    return Visits(order // max(indices.shape[1], 1), order, inverse.view_as(indices), counts)


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
    @once_differentiable
    def backward(ctx, grad):
        return _gather_sum(grad.contiguous(), None, ctx.visits.inverse), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, weights, visits):
        ctx.save_for_backward(y, weights)
        ctx.visits = visits
        return _gather_sum(y, weights, visits.inverse)

    @staticmethod
    @once_differentiable
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
