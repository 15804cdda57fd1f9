"""Experiments on a frozen router: its affinities on real text, and the bias that balances them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from ..config import ModelConfig
from ..layers.router import route
from ..model import DeepSeekV3
from ..training.loop.balance import max_violation, update_bias
from ..training.text.data import PackedStream


@torch.no_grad()
def router_logits(
    model: DeepSeekV3, text: PackedStream, layer: int = 0, rows: int = 24, seed: int = 0
) -> Float[Tensor, "tokens E"]:
    """u · e_i of validation text of all domains, the tokens in random order.

    Args:
        model: frozen. text: where the validation documents come from. layer: row of ``model.routers()``.
        rows: of 64 tokens, at most, of each domain. seed: of the order.
    """
    router, found = model.routers()[layer], []
    hook = router.register_forward_pre_hook(lambda _m, given: found.append(given[0] @ router.weight.T))
    for name in text.domain_names:
        for batch in text.validation_batches(name, 1, rows, seq_len=64):
            model(batch.input_ids.to(router.weight.device))
    hook.remove()
    logits = torch.cat(found).cpu()
    return logits[torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))]


def find_bias(
    scores: Float[Tensor, "tokens E"], config: ModelConfig, gamma: float, updates: int = 400, batch: int = 512
) -> tuple[Float[Tensor, " E"], Float[Tensor, " updates"]]:
    """Update a bias, from zero, on affinities that do not change.

    Args:
        scores: affinities; batch after batch is taken from them, round and round. config: sizes.
        gamma: γ; 0 leaves the bias at zero. updates: how many. batch: tokens in each.

    Returns:
        The bias, and MaxVio of each batch before its update.
    """
    bias, violations = torch.zeros(scores.shape[-1]), []
    for i in range(updates):
        rows = scores[torch.arange(i * batch, (i + 1) * batch) % len(scores)]
        load = torch.bincount(route(rows, bias, config)[0].flatten(), minlength=len(bias))
        violations.append(float(max_violation(load)))
        update_bias(bias, load, gamma)
    return bias, torch.tensor(violations)


def forbidden_visits(
    fill: float, steered: Float[Tensor, "tokens E"], config: ModelConfig
) -> Float[Tensor, ""]:
    """The share of tokens with an expert in a group that was closed to them, if closed groups are set to ``fill``."""
    parts = steered.unflatten(-1, (config.n_group, -1))
    kept = parts.topk(2, dim=-1).values.sum(-1).topk(config.topk_group, dim=-1).indices
    closed = torch.ones(parts.shape[:-1], dtype=torch.bool).scatter(-1, kept, False)
    filled = parts.masked_fill(closed[..., None], fill).flatten(-2)
    chosen = filled.topk(config.num_experts_per_tok, dim=-1).indices
    return closed.gather(-1, chosen // parts.shape[-1]).any(-1).double().mean()


def made_up_affinities(
    gate: Callable[[Tensor], Tensor], config: ModelConfig, tokens: int = 10240, seed: int = 0
) -> Float[Tensor, "tokens E"]:
    """Affinities of normal logits in which some experts are more popular than others.

    Args:
        gate: makes affinities of logits: a sigmoid, a softmax. config: sizes. tokens: rows. seed: of the logits.
    """
    draw = torch.Generator().manual_seed(seed)
    popular = 0.5 * torch.randn(config.n_routed_experts, generator=draw)
    return gate(torch.randn(tokens, config.n_routed_experts, generator=draw) + popular)
