"""Multi-head latent attention, in its two equal forms.

Keys and values of all heads are made from one latent c of 512 values a token, and only that latent (with the
one shared rotary key) is cached. *Expanded*, the textbook form: multiply the latents up to full keys and
values, then attend; best where many queries share the work. *Absorbed*: with q·(W_UK c) = (W_UKᵀ q)·c the
up-projection moves to the side of the query, and all heads attend to the latents themselves: multi-query
attention with 576-wide keys and 512-wide values; best where few queries meet many cached tokens. No weights
are multiplied together in advance, the products are only taken in another order (paper §2.1.1).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..config import ModelConfig
from ..linear import Linear, stacked_linear
from ..recompute import Recompute, run
from .norm import RMSNorm
from .operations import PLAIN_OPERATIONS, Operations
from .scaled_attention import causal_mask, scaled_attention
from .step import Step

__all__ = ["MultiHeadLatentAttention", "Step", "absorbed_is_cheaper", "causal_mask", "scaled_attention"]


class MultiHeadLatentAttention(nn.Module):
    """MLA (paper §2.1.1, Eqs. 1 to 11).

    Args:
        config: sizes.
        layer: index of this block's buffer in the cache.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        d, heads, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
        if config.q_lora_rank is None:
            self.q_proj = Linear(d, heads * config.qk_head_dim, bias=False)
        else:
            self.q_a_proj = Linear(d, config.q_lora_rank, bias=bias)  # W_DQ
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
            self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim, bias=False)  # W_UQ, W_QR
        self.kv_a_proj_with_mqa = Linear(d, config.latent_dim, bias=bias)  # W_DKV, W_KR
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, config.rms_norm_eps)
        kv_width = config.qk_nope_head_dim + config.v_head_dim
        self.kv_b_proj = Linear(config.kv_lora_rank, heads * kv_width, bias=False)  # W_UK, W_UV
        self.o_proj = Linear(heads * config.v_head_dim, d, bias=bias)

    def forward(self, x: Float[Tensor, "B T D"], step: Step) -> Float[Tensor, "B T D"]:
        """Attend to this call's tokens and, with a cache, to all before them."""
        compute = step.backend
        latents, absorb = self.latents(x, step), False
        if step.cache is not None:
            n_total = len(step.cache) + x.shape[1]
            absorb = absorbed_is_cheaper(self.config, x.shape[1], n_total) and compute.may_absorb(self)
            if compute.reads_cache(x.shape[1], absorb, step.cache):
                step.cache.store(self.layer, latents)
            else:
                latents = step.cache.append(self.layer, latents, step.lengths)
        q = self.queries(x, step)
        heads = (compute.absorbed if absorb else compute.expanded)(self, q, latents, step)
        return self.o_proj(heads.flatten(2))

    def latents(self, x: Float[Tensor, "B T D"], step: Step) -> Float[Tensor, "B T latent"]:
        """What is cached of each token: [c_kv; k_rope], the latent normalised, the key rotated (Eqs. 1 and 3)."""
        c_kv_k_rope = self.kv_a_proj_with_mqa(x)
        return run(step.recompute, step.backend.latents, self.kv_a_layernorm, c_kv_k_rope, step.rotations)

    def queries(self, x: Float[Tensor, "B T D"], step: Step) -> Float[Tensor, "B H T QK"]:
        """Every head's query, content part beside rotated rotary part (Eqs. 6 to 9)."""
        c_q = x if self.config.q_lora_rank is None else self.q_a_proj(x)
        return run(step.recompute, self._queries, c_q, step)

    def _queries(self, c_q: Tensor, step: Step) -> Tensor:
        if self.config.q_lora_rank is None:
            q = self.q_proj(c_q)
        else:
            q = self.q_b_proj(step.backend.norm(self.q_a_layernorm, c_q))
        heads = q.unflatten(-1, (self.config.num_attention_heads, self.config.qk_head_dim))
        return step.backend.rotate_queries(heads, step.rotations)

    def keys_values(
        self, latents: Float[Tensor, "B S latent"]
    ) -> tuple[Float[Tensor, "B H S QK"], Float[Tensor, "B H S V"]]:
        """Every head's keys and values out of the latents; all heads get the same rotary key (Eqs. 2, 4, 5)."""
        cfg = self.config
        c_kv, k_rope = latents.split([cfg.kv_lora_rank, cfg.qk_rope_head_dim], -1)
        kv = self.kv_b_proj(c_kv).unflatten(-1, (cfg.num_attention_heads, -1)).transpose(1, 2)
        k_nope, v = kv.split([cfg.qk_nope_head_dim, cfg.v_head_dim], -1)
        k = torch.cat([k_nope, k_rope[:, None].expand(-1, cfg.num_attention_heads, -1, -1)], -1)
        return k, v.contiguous()

    def expanded(
        self,
        q: Float[Tensor, "B H T QK"],
        latents: Float[Tensor, "B S latent"],
        mask: Bool[Tensor, "B 1 T S"] | None = None,
        compute: Operations = PLAIN_OPERATIONS,
        recompute: Recompute | None = None,
    ) -> Float[Tensor, "B T H V"]:
        """Make every head's keys and values from the latents, then attend (Eq. 10).

        Args:
            q: queries, the last T of the S positions.
            latents: [c_kv; k_rope] of all S positions.
            mask: which positions each query sees; ``None`` means its own and all before.
            compute: who attends.
            recompute: makes keys and values again in backward.
        """
        k, v = run(recompute, self.keys_values, latents)
        return compute.attend(q, k, v, mask, self.config.softmax_scale).transpose(1, 2)

    def absorbed(
        self,
        q: Float[Tensor, "B H T QK"],
        latents: Float[Tensor, "B S latent"],
        mask: Bool[Tensor, "B 1 T S"] | None = None,
    ) -> Float[Tensor, "B T H V"]:
        """Carry queries into the latent space, attend there, carry the result back: equal to ``expanded``.

        q·(W_UK c) = (W_UKᵀ q)·c for the scores, Σ p (W_UV c) = W_UV (Σ p c) for the values. All heads share
        the same keys and values, so heads and queries together are the rows of two plain matrix products.

        Args:
            q: queries.
            latents: [c_kv; k_rope] of all S positions.
            mask: which positions each query sees; ``None`` means its own and all before.
        """
        cfg = self.config
        batch, heads, n_new = q.shape[:3]
        q_nope, q_rope = q.split([cfg.qk_nope_head_dim, cfg.qk_rope_head_dim], -1)
        q_latent = self.into_latent(q_nope)
        q_BxC = (torch.cat([q_latent, q_rope], -1) * cfg.softmax_scale).flatten(1, 2)
        scores = q_BxC @ latents.transpose(1, 2)
        if mask is None and n_new > 1:
            mask = causal_mask(n_new, latents.shape[1], latents.device)
        if mask is not None:
            scores = scores.unflatten(1, (heads, n_new)).masked_fill(~mask, float("-inf")).flatten(1, 2)
        p = scores.softmax(-1, dtype=torch.float32 if scores.element_size() < 4 else None).to(scores.dtype)
        u_BHTC = (p @ latents[..., : cfg.kv_lora_rank]).view(batch, heads, n_new, -1)
        return self.out_of_latent(u_BHTC).transpose(1, 2)

    def into_latent(self, q_nope: Float[Tensor, "B H T K"]) -> Float[Tensor, "B H T C"]:
        """W_UKᵀ q, one product a head: contents of queries, carried to where the latents are."""
        return self._by_head(q_nope, self.up_projections()[0].mT)

    def out_of_latent(self, u: Float[Tensor, "B H T C"]) -> Float[Tensor, "B H T V"]:
        """W_UV u, one product a head: what a head saw of the latents, as its values."""
        return self._by_head(u, self.up_projections()[1])

    def _by_head(self, x: Tensor, weight: Tensor) -> Tensor:
        """x Wᵀ of every head; all tokens of a batch are one product's rows."""
        batch = x.shape[0]
        rows = x[0] if batch == 1 else x.transpose(0, 1).flatten(1, 2)  # [H, B T, ·]
        y = stacked_linear(rows, weight, None, self.kv_b_proj.recipe)
        return y[None] if batch == 1 else y.unflatten(1, (batch, -1)).transpose(0, 1)

    def up_projections(self) -> tuple[Float[Tensor, "H K C"], Float[Tensor, "H V C"]]:
        """W_UK and W_UV of every head, as views."""
        cfg = self.config
        return self.kv_b_proj.weight.unflatten(0, (cfg.num_attention_heads, -1)).split(
            [cfg.qk_nope_head_dim, cfg.v_head_dim], 1
        )


def absorbed_is_cheaper(config: ModelConfig, n_new: int, n_total: int) -> bool:
    """Which form takes fewer multiplications for ``n_new`` queries over ``n_total`` cached tokens.

    Expanded: S up-projections and narrow attention. Absorbed: T up-projections and wide attention.

    Args:
        config: sizes.
        n_new: T, queries.
        n_total: S, cached tokens with the new ones.
    """
    cfg = config
    up = cfg.kv_lora_rank * (cfg.qk_nope_head_dim + cfg.v_head_dim)
    expanded = n_total * up + n_new * n_total * (cfg.qk_head_dim + cfg.v_head_dim)
    absorbed = n_new * up + n_new * n_total * (cfg.latent_dim + cfg.kv_lora_rank)
    return absorbed < expanded
