"""What a trained head scores by distance, content and position apart, and which rotary pairs make the latter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from ..layers.rope import apply_rope
from ..model import DeepSeekV3


@dataclass(frozen=True)
class HeadScores:
    """Means over many queries; scores are before the softmax, its scale is in them.

    Attributes:
        content, position: the two parts of a score (Eq. 10), [layers, heads, distances], from distance 0.
        pair_share: share of each rotary pair in how the position part varies with distance, [layers, heads, R/2].
    """

    content: Float[Tensor, "layers H distances"]
    position: Float[Tensor, "layers H distances"]
    pair_share: Float[Tensor, "layers H half"]


@torch.no_grad()
def head_scores(model: DeepSeekV3, rows: Int64[Tensor, "B T"], distances: int = 65) -> HeadScores:
    """Run a model over text and take every head's scores apart.

    q_t·k_j / √(d_h + d_h^R) = (content of both) + Σ over pairs of Re(q_i conj(k_i)), averaged over t at t − j = 0, 1, …

    Args:
        model: any; its modules are looked at while they run, not changed. rows: text. distances: how many.
    """
    cfg, found = model.config, []
    turns = model.rope.table(rows.shape[1], model.lm_head.weight)
    for layer in range(cfg.num_hidden_layers):
        q, c_kv, k_rope = _seen(model, layer, rows)
        q_nope, q_rope = q.split([cfg.qk_nope_head_dim, cfg.qk_rope_head_dim], -1)
        up = model.model.layers[layer].self_attn.kv_b_proj.weight.unflatten(0, (cfg.num_attention_heads, -1))
        k_nope = torch.einsum("bsc,hnc->bshn", c_kv, up[:, : cfg.qk_nope_head_dim])
        content = torch.einsum("bthn,bshn->hts", q_nope, k_nope) / len(rows)
        pairs_q = torch.view_as_complex(apply_rope(q_rope, turns[:, None]).unflatten(-1, (-1, 2)).contiguous())
        pairs_k = torch.view_as_complex(apply_rope(k_rope, turns).unflatten(-1, (-1, 2)).contiguous())
        by_pair = torch.einsum("bthi,bsi->hits", pairs_q, pairs_k.conj()).real / len(rows)
        found.append([_by_distance(part * cfg.softmax_scale, distances) for part in (content, by_pair)])
    content, by_pair = (torch.stack(parts) for parts in zip(*found, strict=True))
    variance = by_pair.var(-1)
    return HeadScores(content, by_pair.sum(2), variance / variance.sum(-1, keepdim=True).clamp(min=1e-30))


def _seen(model: DeepSeekV3, layer: int, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, T, H, QK], latents [B, T, C] and rotary keys [B, T, R] of a layer, nothing turned yet."""
    attention, kept = model.model.layers[layer].self_attn, {}
    names = ("q_b_proj", "kv_a_layernorm", "kv_a_proj_with_mqa")

    def keep(name: str):
        def hook(module: nn.Module, given: tuple, out: Tensor) -> None:
            kept[name] = out

        return hook

    hooks = [getattr(attention, name).register_forward_hook(keep(name)) for name in names]
    try:
        model(rows)
    finally:
        for hook in hooks:
            hook.remove()
    q = kept["q_b_proj"].unflatten(-1, (model.config.num_attention_heads, -1))
    return q, kept["kv_a_layernorm"], kept["kv_a_proj_with_mqa"][..., model.config.kv_lora_rank :]


def _by_distance(scores: Float[Tensor, "*batch T S"], distances: int) -> Float[Tensor, "*batch distances"]:
    """Means of the diagonals: distance 0 is a token with itself."""
    rows = [scores.diagonal(-distance, dim1=-2, dim2=-1).mean(-1) for distance in range(distances)]
    return torch.stack(rows, -1)
