"""The operations that a layer asks its backend for, in plain PyTorch: the definition that fast forms are held to.

A layer does not ask which machine it is on. It asks ``step.backend`` for an operation; here each is the module itself
or the formula in this folder. ``backends/`` derives faster ones, and chooses between them once a call.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from ..intact import why_touched
from ..linear import Linear
from .cache import LatentCache, LatentCodec
from .experts import Experts, Routing, Visits, combine, dispatch, sort_by_expert
from .rope import apply_rope
from .scaled_attention import scaled_attention


class Dispatched(NamedTuple):
    """Tokens on their way to their experts: what the stage ``dispatch`` gives, and ``experts`` takes.

    Args:
        rows: one a visit, sorted by expert; or the tokens themselves, where a backend gathers them later.
        indices: chosen experts.
        weights: gate values.
        visits: which row is whose; ``None`` where the experts' module is called whole.
        gathered: whether ``rows`` are the visits' already; else the experts gather them, and bring the answers home.
    """

    rows: Float[Tensor, "rows D"]
    indices: Int[Tensor, "N A"]
    weights: Float[Tensor, "N A"]
    visits: Visits | None
    gathered: bool = True


class Operations:
    """Plain PyTorch.

    Attributes:
        name: the backend's.
        page: buffers of the latent cache are rounded up to whole numbers of so many tokens.
        latent_codec: writes and reads a cache's latents in FP8; ``None`` where nothing can.
    """

    name = "plain"
    page = 1
    latent_codec: LatentCodec | None = None

    def reads_cache(self, n_new: int, absorb: bool, cache: LatentCache) -> bool:
        """Whether attention takes the latents out of an FP8 cache itself, so that none need be decoded for it."""
        return False

    def intact(self, module: nn.Module, kind: type[nn.Module]) -> bool:
        """Whether a module is exactly of its class, so that it need not be called."""
        return why_touched(module, (kind,)) is None

    # ---- norms and RoPE ------------------------------------------------------------------------------

    def norm(self, norm: nn.Module, x: Float[Tensor, "*batch N"]) -> Float[Tensor, "*batch N"]:
        """norm(x)."""
        return norm(x)

    def add_norm(
        self, norm: nn.Module, x: Float[Tensor, "*batch N"], residual: Float[Tensor, "*batch N"]
    ) -> tuple[Float[Tensor, "*batch N"], Float[Tensor, "*batch N"]]:
        """norm(residual + x), and the sum, which is the next residual."""
        total = residual + x
        return self.norm(norm, total), total

    def latents(
        self,
        norm: nn.Module,
        c_kv_k_rope: Float[Tensor, "B T latent"],
        rotations: Complex[Tensor, "*BT half"],
    ) -> Float[Tensor, "B T latent"]:
        """[norm(c_kv); RoPE(k_rope)], what is cached of each token (Eqs. 1 and 3)."""
        rope = 2 * rotations.shape[-1]
        c_kv, k_rope = c_kv_k_rope.tensor_split([c_kv_k_rope.shape[-1] - rope], -1)
        return torch.cat([self.norm(norm, c_kv), apply_rope(k_rope, rotations)], -1)

    def rotate_queries(
        self, q: Float[Tensor, "B T H QK"], rotations: Complex[Tensor, "*BT half"]
    ) -> Float[Tensor, "B H T QK"]:
        """RoPE on each query's last dimensions, heads before tokens (Eqs. 8 and 9)."""
        q = q.transpose(1, 2)
        q_nope, q_rope = q.tensor_split([q.shape[-1] - 2 * rotations.shape[-1]], -1)
        rotations = rotations if rotations.ndim == 2 else rotations[:, None]
        return torch.cat([q_nope, apply_rope(q_rope, rotations)], -1)

    # ---- attention -----------------------------------------------------------------------------------

    def may_absorb(self, attention: nn.Module) -> bool:
        """Whether W_UK and W_UV may be taken out of ``kv_b_proj``, which then is not called."""
        kv_b = attention.kv_b_proj
        return self.intact(kv_b, Linear) and kv_b.bias is None and kv_b.recipe.absorbs

    def absorbed(
        self,
        attention: nn.Module,
        q: Float[Tensor, "B H T QK"],
        latents: Float[Tensor, "B S latent"],
        step: Any,
    ) -> Float[Tensor, "B T H V"]:
        """Attention in the latent space."""
        return attention.absorbed(q, latents, step.mask)

    def expanded(
        self,
        attention: nn.Module,
        q: Float[Tensor, "B H T QK"],
        latents: Float[Tensor, "B S latent"],
        step: Any,
    ) -> Float[Tensor, "B T H V"]:
        """Attention over every head's own keys and values."""
        return attention.expanded(q, latents, step.mask, self, step.recompute)

    def attend(
        self,
        q: Float[Tensor, "B H T QK"],
        k: Float[Tensor, "B H S QK"],
        v: Float[Tensor, "B H S V"],
        mask: Tensor | None,
        scale: float,
    ) -> Float[Tensor, "B H T V"]:
        """softmax(scale · q kᵀ) v; without a mask, causal over the last T of S."""
        return scaled_attention(q, k, v, mask, scale)

    # ---- the feed-forward network --------------------------------------------------------------------

    def feed_forward(self, mlp: nn.Module, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
        """mlp(x)."""
        return mlp(x)

    def route(self, router: nn.Module, x: Float[Tensor, "N D"]) -> tuple[Tensor, Tensor, Tensor]:
        """Experts of each token, their gate values, and the affinities s."""
        return router(x)

    def dispatch(
        self,
        experts: nn.Module,
        x: Float[Tensor, "N D"],
        indices: Int[Tensor, "N A"],
        weights: Float[Tensor, "N A"],
    ) -> Dispatched:
        """Send tokens to their experts."""
        if not self.intact(experts, Experts):
            return Dispatched(x, indices, weights, None)
        visits = sort_by_expert(indices, experts.gate_up_proj.shape[0])
        return Dispatched(dispatch(x, visits), indices, weights, visits)

    def experts(self, experts: nn.Module, sent: Dispatched) -> Float[Tensor, "rows D"]:
        """The experts' answers; the whole weighted sum where their module was touched and is called."""
        if sent.visits is None:
            return experts(sent.rows, sent.indices, sent.weights)
        return experts.answer(sent.rows, sent.visits.counts)

    def combine(self, answers: Float[Tensor, "rows D"], sent: Dispatched) -> Float[Tensor, "N D"]:
        """Bring the answers home: each token's sum over its experts, by gate value."""
        if sent.visits is None or not sent.gathered:
            return answers
        return combine(answers, sent.weights.to(answers.dtype), sent.visits)

    # ---- whole modules -------------------------------------------------------------------------------

    def advance(
        self, module: nn.Module, hidden: Float[Tensor, "B T D"], embedding: Float[Tensor, "B T D"], step: Any
    ) -> tuple[Float[Tensor, "B T D"], Routing | None] | None:
        """What ``MTPModule.advance`` gives, where the backend has a form for the whole module; else ``None``."""
        return None


PLAIN_OPERATIONS = Operations()
