"""How many directions the keys and values of a small model use, and what its loss says when they are cut down."""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..model import DeepSeekV3


@torch.no_grad()
def latents_of(
    model: DeepSeekV3, layer: int, ids: Int[Tensor, "rows T"]
) -> tuple[Float[Tensor, "tokens D"], Float[Tensor, "tokens C"]]:
    """What a layer's attention reads of each token, and the latent (before its norm) that it makes of it."""
    block, seen = model.model.layers[layer].self_attn, []
    hook = block.kv_a_proj_with_mqa.register_forward_hook(lambda _m, given, out: seen.extend([given[0], out]))
    model(ids)
    hook.remove()
    h, c = (one.flatten(0, 1).cpu().double() for one in seen)
    return h, c[:, : model.config.kv_lora_rank]


@torch.no_grad()
def keys_and_values(
    model: DeepSeekV3, layer: int, ids: Int[Tensor, "rows T"]
) -> Float[Tensor, "tokens width"]:
    """Content keys and values of all heads, a row per token: heads × (d_h + d_v) numbers."""
    block, seen = model.model.layers[layer].self_attn, []
    hook = block.kv_a_layernorm.register_forward_hook(lambda _m, _given, latent: seen.append(latent))
    model(ids)
    hook.remove()
    return block.kv_b_proj(seen[0]).flatten(0, 1).cpu().double()


def variance_kept(rows: Float[Tensor, "tokens width"]) -> list[float]:
    """Share of the variance that the best 1, 2, 3, … directions hold (singular value decomposition)."""
    variance = torch.linalg.svdvals(rows - rows.mean(0)).square()
    return (variance.cumsum(0) / variance.sum()).tolist()


def directions(model: DeepSeekV3, ids: Int[Tensor, "rows T"], share: float = 0.9) -> list[int]:
    """How many directions hold that share of the variance of keys and values, for each layer."""
    kept = [variance_kept(keys_and_values(model, i, ids)) for i in range(model.config.num_hidden_layers)]
    return [1 + sum(one < share for one in row) for row in kept]


@torch.no_grad()
def loss_of(model: DeepSeekV3, unseen: Int[Tensor, "rows T"]) -> float:
    """Nats per byte on text that no training read."""
    return model(unseen, labels=unseen).loss.item()


@torch.no_grad()
def loss_with_directions(
    model: DeepSeekV3,
    count: int,
    text: Int[Tensor, "rows T"],
    unseen: Int[Tensor, "rows T"],
    draw: torch.Generator | None = None,
) -> float:
    """The loss when every layer's keys and values may use only so many directions.

    ``basis.T @ W`` leads down to a few numbers and ``basis`` up again: a matrix of low rank is a way down and up.

    Args:
        model: not changed. count: directions. text: where the best directions are found. unseen: what the loss is of.
        draw: of random directions instead; None takes the best.
    """
    cut = copy.deepcopy(model)
    for i, layer in enumerate(cut.model.layers):
        W = layer.self_attn.kv_b_proj.weight
        if draw is None:
            rows = keys_and_values(model, i, text)
            basis = torch.linalg.svd(rows, full_matrices=False).Vh[:count].T.to(W)
        else:
            basis = torch.linalg.qr(torch.randn(len(W), count, generator=draw)).Q.to(W)
        W.copy_(basis @ (basis.T @ W))
    return loss_of(cut, unseen)


def told_by_latent(model: DeepSeekV3, layer: int, ids: Int[Tensor, "rows T"]) -> float:
    """Share of the variance of what a layer reads that the best linear map of its latent gives back."""
    h, c = latents_of(model, layer, ids)
    h, c = h - h.mean(0), c - c.mean(0)
    missed = h - c @ torch.linalg.lstsq(c, h).solution
    return 1 - (missed.square().sum() / h.square().sum()).item()


def cut_down(
    trained: DeepSeekV3,
    untrained: DeepSeekV3,
    text: Int[Tensor, "rows T"],
    unseen: Int[Tensor, "rows T"],
    draw: torch.Generator,
    counts: tuple[int, ...] = (1, 2, 4, 8, 16, 32),
) -> tuple[dict[str, list[float]], dict[str, dict[int, float]], dict[str, float]]:
    """All that :func:`dsv3lib.viz.cache.kept_by_directions` draws.

    Args:
        trained, untrained: the same model after and before training. text: where the best directions are found.
        unseen: what is measured. draw: of the random directions, three times each. counts: directions kept.

    Returns:
        Variance kept by the best 1, 2, … directions, by stage; loss by kind of directions and count; the loss of
        the whole model.
    """
    stages = {"trained": trained, "untrained": untrained}
    spectra = {name: variance_kept(keys_and_values(model, 1, unseen))[:64] for name, model in stages.items()}

    def random(count: int) -> float:
        return sum(loss_with_directions(trained, count, text, unseen, draw) for _ in range(3)) / 3

    losses = {
        "best directions": {n: loss_with_directions(trained, n, text, unseen) for n in counts},
        "random directions": {n: random(n) for n in counts},
    }
    return spectra, losses, {"whole model": loss_of(trained, unseen)}
