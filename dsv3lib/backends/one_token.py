"""The same blocks for a single token on a CPU, in as little started work as it takes.

When one row continues by one token, each matrix is read once and the vectors are tiny: what costs is not
arithmetic but *starting* operations, some 200 of them in a layer of the plain form, 1 to 10 µs each, and
reading the weights. Here a token is a NumPy vector in the model's own memory (``token_weights``), which starts
an operation in a third of a microsecond; a linear layer is one pass over its weights, a norm three operations
instead of a dozen, the choice of experts Python on a handful of numbers, and nothing is sorted or sent about.
The operations of a small model stay in one thread: to wake another takes longer than most of them. The plain
layers are the definition; a test holds both equal. No gradient is kept, and no module is called: ``choice`` takes this
road only where every module is as it was built.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import add

import numpy as np
import torch
from jaxtyping import Float

from ..config import ModelConfig
from ..errors import InputError
from ..layers.decoder import Decoder
from ..layers.experts import Routing
from ..layers.step import Step
from ..linear import Linear
from .token_weights import Array, BlockWeights, MixtureWeights, MLPWeights, TokenWeights

# Latents at a time in attention. So small a product is done where its operands lie (OpenBLAS, AVX-512), a larger
# one copies them into another order first, which for a few heads takes longer than the product.
PIECE_VALUES, PIECE_LEAST = 10_240, 64


class OneToken:
    """Takes tokens through all layers, one at a call; keeps nothing but views of the weights.

    Args:
        config: sizes.
        decoder: the model's, as it was built.
        head: the model's.
    """

    def __init__(self, config: ModelConfig, decoder: Decoder, head: Linear) -> None:
        self.config = config
        self.weights = TokenWeights(config, decoder, head)

    def forward(
        self, x: Float[Tensor, "1 1 D"], step: Step
    ) -> tuple[Float[Tensor, "1 1 vocab"], Float[Tensor, "1 1 D"], list[Routing]]:
        """All blocks, x + MLA(norm x) and x + FFN(norm x), the last norm and the head.

        Args:
            x: the token's embedding.
            step: the call's cache and rotations.

        Returns:
            Logits, the head's input, and how each mixture routed.
        """
        weights = self.weights
        like, rotation = x.new_empty(1, 1, self.config.latent_dim), step.rotations[0].numpy()
        chosen, affinities = [], []
        # exp(-z) may overflow to infinity, where the sigmoid is rightly 0; and NaN goes its way as in torch.
        with np.errstate(all="ignore"):
            x = x.view(-1).numpy()
            for layer, w in enumerate(weights.blocks):
                past = step.cache.append_one(layer, like)
                x = x + w.o(self.attend(w, self.normalize(x, w.norm_1), past, rotation))
                h = self.normalize(x, w.norm_2)
                if isinstance(w.ffn, MLPWeights):
                    x = x + swiglu(w.ffn, h)
                    continue
                y, experts, scores = self.mixture(w.ffn, h)
                x = x + y
                chosen.append(experts)
                affinities.append(scores)
            hidden = self.normalize(x, weights.norm)
            logits = np.vecdot(weights.head, hidden)
        indices = torch.tensor(chosen, dtype=torch.int64)[:, None, None]
        routings = [
            Routing(i, torch.from_numpy(s).view(1, 1, -1)) for i, s in zip(indices, affinities, strict=True)
        ]
        return torch.from_numpy(logits).view(1, 1, -1), torch.from_numpy(hidden).view(1, 1, -1), routings

    def normalize(self, x: Array, weight: Array, factor: float = 1.0) -> Array:
        """RMSNorm, times ``factor``: the root of the mean square is one Python number."""
        scale = factor / math.sqrt(float(x.dot(x)) / x.size + self.config.rms_norm_eps)
        y = x * weight
        y *= scale
        return y

    def attend(self, w: BlockWeights, h: Array, past: Array, rotation: Array) -> Array:
        """Absorbed attention of one query per head; the token's own latent is written into the cache first.

        The softmax scale rides in the query latent's norm: from there to the scores everything is linear.

        Args:
            w: the block's weights.
            h: normalised token [D].
            past: the cache's rows [S, C + R], the last one for this token.
            rotation: RoPE's e^{iφ} of this position, complex [R/2].

        Returns:
            Every head's answer, [H V].
        """
        cfg = self.config
        rank, nope, heads = cfg.kv_lora_rank, cfg.qk_nope_head_dim, cfg.num_attention_heads
        latent = w.kv_a(h)
        past[-1, :rank] = self.normalize(latent[:rank], w.kv_norm)
        past[-1, rank:] = rotated(latent[rank:], rotation)

        if w.q_a is None:
            q = np.vecdot(w.q, h)
            q *= cfg.softmax_scale
        else:
            q = np.vecdot(w.q, self.normalize(w.q_a(h), w.q_norm, cfg.softmax_scale))
        q = q.reshape(heads, -1)
        q_latent = np.empty((heads, cfg.latent_dim), q.dtype)
        np.vecmat(q[:, :nope], w.w_uk, out=q_latent[:, :rank])
        q_latent[:, rank:] = rotated(q[:, nope:], rotation)
        return np.matvec(w.w_uv, attend_to_latents(q_latent, past, rank)).reshape(-1)

    def mixture(self, w: MixtureWeights, h: Array) -> tuple[Array, list[int], Array]:
        """The shared expert + the chosen ones, each weighted (Eq. 12); no other weights are touched."""
        scores = 1 / (1 + np.exp(-np.vecdot(w.gate, h)))
        chosen, gates = route_one(scores.tolist(), w.bias.tolist(), self.config)
        y = swiglu(w.shared, h)
        width = self.config.moe_intermediate_size
        gate_up = np.empty((len(chosen), 2 * width), h.dtype)
        for i, row in zip(chosen, gate_up, strict=True):
            np.vecdot(w.gate_up[i], h, row)
        hidden = silu(gate_up[:, :width])
        hidden *= gate_up[:, width:]
        hidden *= np.array(gates, h.dtype)[:, None]
        for i, row in zip(chosen, hidden, strict=True):
            y += np.vecdot(w.down[i], row)
        return y, chosen, scores


def attend_to_latents(q: Array, past: Array, rank: int) -> Array:
    """softmax(q · latents) c_kv for queries [H, C + R] that bear the softmax scale: every head's [H, C].

    The context is cut into pieces, whose products NumPy does one after the other at one call.
    """
    heads, latent_dim = q.shape
    piece = max(PIECE_LEAST, PIECE_VALUES // latent_dim)
    whole, left = divmod(len(past), piece)
    pieces, rest = past[: len(past) - left].reshape(whole, piece, latent_dim), past[len(past) - left :]
    p = np.empty((whole + 1, heads, piece), q.dtype)
    np.matmul(q, pieces.transpose(0, 2, 1), out=p[:whole])
    np.matmul(q, rest.T, out=p[whole, :, :left])
    p[whole, :, left:] = -np.inf  # the last piece is not full
    p -= p.max(0).max(1, keepdims=True)
    np.exp(p, p)
    u = np.matmul(p[:whole], pieces[..., :rank]).sum(0)
    u += p[whole, :, :left] @ rest[:, :rank]
    u /= p.sum(0).sum(1, keepdims=True)
    return u


def rotated(x: Array, rotation: Array) -> Array:
    """RoPE: neighbours in the last dimension are pairs, one complex product each."""
    return (x.view(rotation.dtype) * rotation).view(x.dtype)


def silu(x: Array) -> Array:
    """x · sigmoid(x)."""
    y = np.negative(x)
    np.exp(y, y)
    y += 1
    return np.divide(x, y, y)


def swiglu(w: MLPWeights, h: Array) -> Array:
    """down(silu(gate h) ⊙ up h)."""
    a = silu(np.vecdot(w.gate, h))
    a *= np.vecdot(w.up, h)
    return np.vecdot(w.down, a)


def route_one(
    scores: Sequence[float], bias: Sequence[float], config: ModelConfig
) -> tuple[list[int], list[float]]:
    """``router.route`` for one token in plain Python, which is quicker than tensors for a row of this length.

    Args:
        scores: sigmoid affinities s.
        bias: b.
        config: sizes and switches.

    Returns:
        The experts, best first (the lower index among equals), and their gate values.

    Raises:
        InputError: a score is NaN.
    """
    if math.isnan(sum(scores)):
        raise InputError(
            f"scores: {sum(map(math.isnan, scores))} of {len(scores)} are NaN, expected affinities in [0, 1]; "
            "the hidden state or the router's weight is spoilt"
        )
    steered = list(map(add, scores, bias))
    allowed = range(len(steered))
    if config.n_group > 1:
        size = len(steered) // config.n_group
        groups = [allowed[start : start + size] for start in range(0, len(steered), size)]
        totals = [sum(sorted([steered[i] for i in group])[-2:]) for group in groups]
        kept = sorted(range(config.n_group), key=totals.__getitem__, reverse=True)[: config.topk_group]
        allowed = [i for n in sorted(kept) for i in groups[n]]
    chosen = sorted(allowed, key=steered.__getitem__, reverse=True)[: config.num_experts_per_tok]
    gates = [scores[i] for i in chosen]
    scale = config.routed_scaling_factor
    if config.norm_topk_prob:
        scale /= sum(gates) + 1e-20
    return chosen, [g * scale for g in gates]
