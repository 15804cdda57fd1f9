"""A transformer block for few tokens of one row, in NumPy: what ``few_tokens`` takes a model or an MTP module through.

Tokens are the rows of an array. A linear layer is one pass over its weights, a norm a few operations instead of a
dozen, and each chosen expert meets its rows once. ``layers`` is the definition; a test holds both equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from ..config import ModelConfig
from ..layers.experts import Routing
from .few_attention import attend_to_latents, by_head, rotated
from .few_routing import route_rows, sort_visits
from .token_weights import ROW_BY_ROW, BlockWeights, MixtureWeights, MLPWeights, product, row_product
from .weight_copies import Array, WeightReader


class FewBlocks:
    """The operations of a block.

    Args:
        config: sizes.
        reader: gives the weights as arrays, and knows which of them are copies.
    """

    def __init__(self, config: ModelConfig, reader: WeightReader) -> None:
        self.config, self.reader = config, reader

    def block(
        self, w: BlockWeights, x: Array, store: Callable[[int, Array], Array], rotations: Array
    ) -> tuple[Array, Routing | None]:
        """x + MLA(norm x), then x + FFN(norm x), over tokens [T, D], and how they were routed.

        Args:
            w: the block's weights.
            x: tokens.
            store: takes a layer's new latents into the cache, and returns all that it holds, [S, C + R].
            rotations: RoPE's e^{iφ} of the tokens' positions, complex [T, R/2].
        """
        x = x + w.o(self.attend(w, self.normalize(x, w.norm_1), store, rotations))
        h = self.normalize(x, w.norm_2)
        if isinstance(w.ffn, MLPWeights):
            return x + swiglu(w.ffn, h), None
        y, experts, scores = self.mixture(w.ffn, h)
        return x + y, Routing(torch.from_numpy(experts[None]), torch.from_numpy(scores[None]))

    def normalize(self, x: Array, weight: Array, factor: float = 1.0) -> Array:
        """RMSNorm of each row, times ``factor``."""
        y, width, eps = x * weight, x.shape[1], self.config.rms_norm_eps
        if len(x) == 1:  # the root of the mean square is one Python number
            row = x[0]
            y *= factor / math.sqrt(float(row.dot(row)) / width + eps)
        else:
            scale = np.vecdot(x, x)
            scale /= width
            scale += eps
            np.sqrt(scale, scale)
            y *= np.divide(factor, scale, scale)[:, None]
        return y

    def attend(
        self, w: BlockWeights, h: Array, store: Callable[[int, Array], Array], rotations: Array
    ) -> Array:
        """Absorbed attention of each token's heads, [T, H V]; the tokens' own latents go into the cache first.

        The softmax scale rides in the query latent's norm: from there to the scores everything is linear.
        The arguments are those of ``block``, but h is normalised.
        """
        cfg = self.config
        rank, nope, n_new = cfg.kv_lora_rank, cfg.qk_nope_head_dim, len(h)
        latents = w.kv_a(h)
        latents[:, :rank] = self.normalize(latents[:, :rank], w.kv_norm)
        latents[:, rank:] = rotated(latents[:, rank:], rotations)
        past = store(w.layer, latents)

        if w.q_a is None:
            q = product(w.q, h)
            q *= cfg.softmax_scale
        else:
            q = product(w.q, self.normalize(w.q_a(h), w.q_norm, cfg.softmax_scale))
        q = q.reshape(n_new, cfg.num_attention_heads, -1)
        q_latent = np.empty((*q.shape[:2], cfg.latent_dim), q.dtype)
        by_head(q[:, :, :nope], w.w_uk, q_latent[:, :, :rank])
        q_latent[:, :, rank:] = rotated(q[:, :, nope:], rotations[:, None])
        u = attend_to_latents(q_latent, past, rank)
        heads = np.empty((*q.shape[:2], cfg.v_head_dim), q.dtype)
        by_head(u, w.w_uv.transpose(0, 2, 1), heads)
        return heads.reshape(n_new, -1)

    def mixture(self, w: MixtureWeights, h: Array) -> tuple[Array, Array, Array]:
        """The shared expert + the chosen ones, each weighted (Eq. 12); no other weights are touched.

        Returns:
            The sum [T, D], the chosen experts [T, A] and all affinities [T, E].
        """
        scores = product(w.gate, h)
        np.negative(scores, scores)
        np.exp(scores, scores)
        scores += 1
        np.reciprocal(scores, scores)
        chosen, gates = route_rows(scores, w.bias, self.config)
        run = one_by_one if len(h) <= ROW_BY_ROW else by_expert
        y = run(w, h, chosen, gates)
        y += swiglu(w.shared, h)
        return y, chosen, scores


def one_by_one(w: MixtureWeights, h: Array, chosen: Array, gates: Array) -> Array:
    """Σ_a g_a · expert_a(h) of very few tokens, visit after visit: to sort them would take longer than it saves.

    Args:
        w: the experts' weights.
        h: tokens, [T, D].
        chosen: each token's experts, [T, A].
        gates: their gate values, [T, A].
    """
    visits, each = chosen.ravel().tolist(), chosen.shape[1]
    gate_up = np.empty((len(visits), len(w.gate_up[0])), h.dtype)
    for i, expert in enumerate(visits):
        row_product(w.gate_up[expert], h[i // each], gate_up[i])
    hidden = gated(gate_up, gates.reshape(-1, 1))
    y = np.empty((len(visits), h.shape[1]), h.dtype)
    for i, expert in enumerate(visits):
        row_product(w.down[expert], hidden[i], y[i])
    return y.reshape(len(h), each, -1).sum(1)


def by_expert(w: MixtureWeights, h: Array, chosen: Array, gates: Array) -> Array:
    """The same, where each expert meets all its tokens at once."""
    visits = sort_visits(chosen)
    rows = h[visits.token]
    gate_up = np.empty((len(rows), len(w.gate_up[0])), h.dtype)
    for expert, part in visits.parts:
        product(w.gate_up[expert], rows[part], gate_up[part])
    hidden = gated(gate_up, gates.reshape(-1, 1)[visits.order])
    for expert, part in visits.parts:
        product(w.down[expert], hidden[part], rows[part])
    return rows[visits.inverse].reshape(*chosen.shape, -1).sum(1)


def gated(gate_up: Array, gates: Array) -> Array:
    """g · silu(gate) ⊙ up, of visits [V, 2F] and their gate values [V, 1]."""
    width = gate_up.shape[1] // 2
    hidden = silu(gate_up[:, :width])
    hidden *= gate_up[:, width:]
    hidden *= gates
    return hidden


def silu(x: Array) -> Array:
    """x · sigmoid(x)."""
    y = np.negative(x)
    np.exp(y, y)
    y += 1
    return np.divide(x, y, y)


def swiglu(w: MLPWeights, h: Array) -> Array:
    """down(silu(gate h) ⊙ up h)."""
    a = silu(product(w.gate, h))
    a *= product(w.up, h)
    return product(w.down, a)
