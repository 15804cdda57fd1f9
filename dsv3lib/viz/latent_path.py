"""Drawings of multi-head latent attention: what is made of a token and what is kept of it, and absorption."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from ..config import ModelConfig
from ..layers.attention import MultiHeadLatentAttention, Step
from .diagram import Box, diagram

_SHOWN = 3
"""Numbers of a vector that a strip shows."""


def latent_path(
    configs: Mapping[str, ModelConfig], token: Mapping[str, Sequence[float]]
) -> tuple[Figure, str, str]:
    """From a token's hidden state through the latents to one head; what is cached has a doubled edge.

    Args:
        configs: name → sizes, for the widths in each box.
        token: "h", "c_q", "c", "k_rope", and of one head "q", "q_rope", "k", "v": one worked token's numbers.

    Returns:
        The figure, its alt text and its caption.
    """
    d = diagram("What is made of one token, and what is kept of it", 9.8, 5.0)

    def tensor(x: float, y: float, name: str, key: str, of, meaning: str | None = None, kept: bool = False):
        widths = " · ".join(f"{model} {of(config):,}" for model, config in configs.items())
        made = d.box(x, y, name, widths, meaning=meaning, kept=kept, w=1.62)
        d.numbers(x + 0.05, y - 0.4, token[key][:_SHOWN], meaning=meaning, more=True)
        return made

    h = tensor(0.1, 2.35, r"\mathbf{h}_t", "h", lambda c: c.hidden_size)
    c_q = tensor(3.0, 3.85, r"\mathbf{c}_t^{Q}", "c_q", lambda c: c.q_lora_rank)
    c = tensor(3.0, 0.75, r"\mathbf{c}_t^{KV}", "c", lambda c: c.kv_lora_rank, "latent", kept=True)
    k_r = tensor(3.0, 2.3, r"\mathbf{k}_t^{R}", "k_rope", lambda c: c.qk_rope_head_dim, "rope", kept=True)
    q = tensor(5.9, 4.25, r"\mathbf{q}_{t,i}^{C}", "q", lambda c: c.qk_nope_head_dim, "content")
    q_r = tensor(5.9, 3.2, r"\mathbf{q}_{t,i}^{R}", "q_rope", lambda c: c.qk_rope_head_dim, "rope")
    k = tensor(5.9, 1.5, r"\mathbf{k}_{t,i}^{C}", "k", lambda c: c.qk_nope_head_dim, "content")
    v = tensor(5.9, 0.42, r"\mathbf{v}_{t,i}", "v", lambda c: c.v_head_dim, "content")
    right = (h.x + h.width, h.y + h.height / 2)
    for end, word in ((c_q, "W^{DQ}"), (k_r, "W^{KR},\\ RoPE"), (c, "W^{DKV}")):
        d.arrow(right, _left(end), word)
    for start, end, word in (
        (c_q, q, "W_i^{UQ}"),
        (c_q, q_r, "W_i^{QR},\\ RoPE"),
        (c, k, "W_i^{UK}"),
        (c, v, "W_i^{UV}"),
    ):
        d.arrow(_right(start), _left(end), word)
    score = d.box(8.35, 2.5, "score", r"q^C\cdot k^C+q^R\cdot k^R", w=1.4, h=0.75)
    out = d.box(8.35, 0.35, "head's output", r"\sum_j p_j\,\mathbf{v}_{j,i}", w=1.4, h=0.75)
    for part, place in ((q, 0.9), (q_r, 0.65), (k_r, 0.38), (k, 0.12)):
        d.arrow(_right(part), (score.x, score.y + place * score.height))
    d.arrow(score, out, "softmax: p")
    d.arrow(_right(v), _left(out))
    d.note(3.0, 4.85, "shared by all heads", size=9)
    heads = ", ".join(f"{config.num_attention_heads} in {name}" for name, config in configs.items())
    d.note(5.9, 5.05, f"head i ({heads})", size=9)
    kept = "; ".join(f"{m} {c.kv_lora_rank} and {c.qk_rope_head_dim}" for m, c in configs.items())
    return d.done(
        alt=(
            "A drawing from left to right. The hidden state h leads to three vectors that all heads share: the latent "
            "of queries, the latent of keys and values, and the position key. The latter two have a doubled edge, "
            f"cached ({kept} numbers). From the query's latent each head makes its query, content and position; from "
            "the cached latent its content key and its value. Queries and keys meet in the score, which weighs values."
        ),
        caption=(
            "Doubled edge: what the cache keeps of a token. All else is made again or forgotten. In the boxes the "
            "widths, under them the first three numbers of one real token in tiny."
        ),
    )


def _left(box: Box) -> tuple[float, float]:
    return box.x, box.y + box.height / 2


def _right(box: Box) -> tuple[float, float]:
    return box.x + box.width, box.y + box.height / 2


def absorption(config: ModelConfig, tokens: int = 4) -> tuple[Figure, str, str]:
    """Two orders of the same products, side by side: the matrix on every latent, or once on the query.

    Args:
        config: sizes, named in the boxes. tokens: cached tokens that are drawn.

    Returns:
        The figure, its alt text and its caption.
    """
    d = diagram("The same scores: the matrix on every latent, or once on the query", 9.8, 3.9)
    heads, nope, rank = config.num_attention_heads, config.qk_nope_head_dim, config.kv_lora_rank
    for left, absorbed in ((0.0, False), (5.2, True)):
        d.note(left + 0.1, 3.75, "absorbed" if absorbed else "expanded", size=11)
        query = d.box(left + 0.1, 2.95, r"\mathbf{q}_{i}", f"[{nope}]", meaning="content", w=0.95, h=0.55)
        if absorbed:
            moved = d.box(
                left + 1.9, 2.95, r"W_i^{UK\top}\mathbf{q}_{i}", f"[{rank}]", meaning="latent", w=1.15, h=0.55
            )
            d.arrow(query, moved, "W_i^{UK\\top}")
        for j in range(tokens):
            y = 2.05 - 0.66 * j
            latent = d.box(
                left + 3.4,
                y,
                f"\\mathbf{{c}}_{j + 1}",
                f"[{rank}]",
                meaning="latent",
                kept=True,
                w=1.0,
                h=0.5,
            )
            if absorbed:
                d.arrow((moved.x + 0.55, moved.y), (latent.x - 0.05, y + 0.25))
                continue
            key = d.box(
                left + 1.4, y, f"\\mathbf{{k}}_{{{j + 1},i}}", f"[{nope}]", meaning="content", w=1.0, h=0.5
            )
            d.arrow((latent.x - 0.05, y + 0.25), (key.x + key.width, y + 0.25), "W_i^{UK}")
            d.arrow((query.x + 0.45, query.y), (key.x, y + 0.25))
        d.note(left + (1.55 if absorbed else 0.05), 0.75, "one score\nper arrow", size=8.5)
    return d.done(
        alt=(
            f"Two pictures side by side, for one of {heads} heads. Left: a matrix turns each cached latent into a key, "
            "and the query meets the keys. Right: the matrix is applied once, to the query, and what comes out meets "
            "the latents as they lie; there is no key."
        ),
        caption=(
            f"For one head of {heads}. Left, the matrix works once per cached token; right, once, however many tokens "
            "are cached. What stands at the tips of the long arrows is the same number."
        ),
    )


@torch.no_grad()
def worked_token(
    attention: MultiHeadLatentAttention, h: Float[Tensor, "T D"], step: Step, token: int = -1
) -> dict[str, list[float]]:
    """What a layer makes of one token, for :func:`latent_path`: its own numbers, of head 0 where there are heads.

    Args:
        attention: the layer. h: hidden states. step: their positions. token: which.
    """
    cfg = attention.config
    cached = attention.latents(h[None], step)
    c_q = attention.q_a_layernorm(attention.q_a_proj(h[None]))
    q = attention.queries(h[None], step)[0, 0, token]
    k, v = (one[0, 0, token] for one in attention.keys_values(cached))
    c, k_rope = cached[0, token].split([cfg.kv_lora_rank, cfg.qk_rope_head_dim])
    found = {"h": h[token], "c_q": c_q[0, token], "c": c, "k_rope": k_rope, "v": v}
    found |= {
        "q": q[: cfg.qk_nope_head_dim],
        "q_rope": q[cfg.qk_nope_head_dim :],
        "k": k[: cfg.qk_nope_head_dim],
    }
    return {name: values.tolist() for name, values in found.items()}
