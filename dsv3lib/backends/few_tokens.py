"""The same blocks for few tokens of one row on a CPU, in as little started work as it takes.

When one row goes on by a token, or by a handful that speculation wants verified, each matrix is read once and the
activations are tiny: what costs is not arithmetic but *starting* operations, some 200 of them in a layer of the plain
form, 1 to 10 µs each, and reading the weights. Here tokens are the rows of NumPy arrays in the model's own memory
(``token_weights``), which starts an operation in a third of a microsecond; a linear layer is one pass over its
weights, a norm a few operations instead of a dozen, and each chosen expert meets its rows once. The plain layers are
the definition; a test holds both equal. No gradient is kept, and no module is called: ``choice`` takes this road only
where every module is as it was built.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..config import ModelConfig
from ..layers.decoder import Decoder
from ..layers.experts import Routing
from ..layers.step import Step
from ..linear import Linear
from .few_attention import attend_to_latents, by_head, rotated
from .few_routing import route_rows, sort_visits
from .token_weights import Array, BlockWeights, MixtureWeights, MLPWeights, TokenWeights, product


class FewTokens:
    """Takes tokens of one row through all layers; keeps nothing but views of the weights.

    Args:
        config: sizes.
        decoder: the model's, as it was built.
        head: the model's.
    """

    def __init__(self, config: ModelConfig, decoder: Decoder, head: Linear) -> None:
        self.config = config
        self.weights = TokenWeights(config, decoder, head)

    def forward(
        self, x: Float[Tensor, "1 T D"], step: Step
    ) -> tuple[Float[Tensor, "1 T vocab"], Float[Tensor, "1 T D"], list[Routing]]:
        """All blocks, x + MLA(norm x) and x + FFN(norm x), the last norm and the head.

        Args:
            x: the tokens' embeddings.
            step: the call's cache and rotations.

        Returns:
            Logits, the head's input, and how each mixture routed.
        """
        weights, rotations = self.weights, step.rotations.numpy()
        like, routings = x.new_empty(1, 1, self.config.latent_dim), []
        # exp(-z) may overflow to infinity, where the sigmoid is rightly 0; and NaN goes its way as in torch.
        with np.errstate(all="ignore"):
            x = x[0].numpy()
            for layer, w in enumerate(weights.blocks):
                past = step.cache.append_rows(layer, len(x), like)
                x, routing = self.block(w, x, past, rotations)
                if routing is not None:
                    routings.append(routing)
            hidden = self.normalize(x, weights.norm)
            logits = product(weights.head, hidden)
        return torch.from_numpy(logits)[None], torch.from_numpy(hidden)[None], routings

    def block(self, w: BlockWeights, x: Array, past: Array, rotations: Array) -> tuple[Array, Routing | None]:
        """One block over tokens [T, D]; the arguments as for ``attend``."""
        x = x + w.o(self.attend(w, self.normalize(x, w.norm_1), past, rotations))
        h = self.normalize(x, w.norm_2)
        if isinstance(w.ffn, MLPWeights):
            return x + swiglu(w.ffn, h), None
        y, experts, scores = self.mixture(w.ffn, h)
        return x + y, Routing(torch.from_numpy(experts)[None], torch.from_numpy(scores)[None])

    def normalize(self, x: Array, weight: Array, factor: float = 1.0) -> Array:
        """RMSNorm of each row, times ``factor``."""
        y = x * weight
        if len(x) == 1:  # the root of the mean square is one Python number
            row = x[0]
            y *= factor / math.sqrt(float(row.dot(row)) / row.size + self.config.rms_norm_eps)
            return y
        scale = np.vecdot(x, x)
        scale /= x.shape[1]
        scale += self.config.rms_norm_eps
        np.sqrt(scale, scale)
        y *= np.divide(factor, scale, scale)[:, None]
        return y

    def attend(self, w: BlockWeights, h: Array, past: Array, rotations: Array) -> Array:
        """Absorbed attention of each token's heads; the tokens' own latents are written into the cache first.

        The softmax scale rides in the query latent's norm: from there to the scores everything is linear.

        Args:
            w: the block's weights.
            h: normalised tokens [T, D].
            past: the cache's rows [S, C + R], the last T for these tokens.
            rotations: RoPE's e^{iφ} of their positions, complex [T, R/2].

        Returns:
            Every head's answers, [T, H V].
        """
        cfg = self.config
        rank, nope, n_new = cfg.kv_lora_rank, cfg.qk_nope_head_dim, len(h)
        latents = w.kv_a(h)
        past[-n_new:, :rank] = self.normalize(latents[:, :rank], w.kv_norm)
        past[-n_new:, rank:] = rotated(latents[:, rank:], rotations)

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
        visits = sort_visits(chosen)
        rows = h[visits.token]
        gate_up = np.empty((len(rows), len(w.gate_up[0])), h.dtype)
        for expert, part in visits.parts:
            product(w.gate_up[expert], rows[part], gate_up[part])
        width = gate_up.shape[1] // 2
        hidden = silu(gate_up[:, :width])
        hidden *= gate_up[:, width:]
        hidden *= gates.reshape(-1, 1)[visits.order]
        for expert, part in visits.parts:
            product(w.down[expert], hidden[part], rows[part])
        y = swiglu(w.shared, h)
        y += rows[visits.inverse].reshape(*chosen.shape, -1).sum(1)
        return y, chosen, scores


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
