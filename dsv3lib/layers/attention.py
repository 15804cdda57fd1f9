"""Multi-head latent attention, in its two equal forms.

Keys and values of all heads are made from one latent c of 512 values a token, and only that latent (with the
one shared rotary key) is cached. *Expanded*, the textbook form: multiply the latents up to full keys and
values, then attend; best where many queries share the work. *Absorbed*: with q·(W_UK c) = (W_UKᵀ q)·c the
up-projection moves to the side of the query, and all heads attend to the latents themselves: multi-query
attention with 576-wide keys and 512-wide values; best where few queries meet many cached tokens. No weights
are multiplied together in advance, the products are only taken in another order (paper §2.1.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor, nn

from ..config import ModelConfig
from ..kernels.elementwise.latent import norm_and_turn
from ..kernels.elementwise.rotary import rope
from ..kernels.toolchain.targets import for_layers
from . import attention_on_kernels as on_kernels
from .cache import LatentCache
from .causal_attention import MOST_TOKENS, causal_attention
from .norm import RMSNorm
from .recompute import Recipes, run
from .rope import apply_rope


@dataclass(frozen=True)
class Step:
    """What all layers of one forward pass share.

    Args:
        turns: RoPE's turns of this call's tokens, [T, R/2], or [B, T, R/2] where rows stand at other positions.
        mask: which of the S cached positions a query sees, [B or 1, 1, T, S]; ``None`` where plain causality
            (T = S) or a single query (T = 1) says it all.
        cache: where latents are kept, or ``None``.
        lengths: valid tokens per row, or ``None`` for all.
        recipes: where norms and up-projections are remembered for recomputation, or ``None`` to save them.
        held: tokens of each row with the new ones, on the cache's device, where kernels read the cache.
    """

    turns: Complex[Tensor, "*BT half"]
    mask: Bool[Tensor, "B 1 T S"] | None = None
    cache: LatentCache | None = None
    lengths: Int[Tensor, " B"] | None = None
    recipes: Recipes | None = None
    held: Int[Tensor, " B"] | None = None


class MultiHeadLatentAttention(nn.Module):
    """MLA (paper §2.1.1, Eqs. 1 to 11).

    Args:
        config: sizes. layer: index of this block's buffer in the cache.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        d, heads, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(d, heads * config.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(d, config.q_lora_rank, bias=bias)  # W_DQ
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
            self.q_b_proj = nn.Linear(
                config.q_lora_rank, heads * config.qk_head_dim, bias=False
            )  # W_UQ, W_QR
        self.kv_a_proj_with_mqa = nn.Linear(d, config.latent_dim, bias=bias)  # W_DKV, W_KR
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, config.rms_norm_eps)
        kv_width = config.qk_nope_head_dim + config.v_head_dim
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, heads * kv_width, bias=False)  # W_UK, W_UV
        self.o_proj = nn.Linear(heads * config.v_head_dim, d, bias=bias)

    def forward(self, x: Float[Tensor, "B T D"], step: Step) -> Float[Tensor, "B T D"]:
        """Attend to this call's tokens and, with a cache, to all before them."""
        latents = self.latents(x, step)
        if step.cache is not None:
            latents = step.cache.append(self.layer, latents, step.lengths)
        c_q = x if self.config.q_lora_rank is None else self.q_a_proj(x)
        q = run(step.recipes, self.queries, c_q, step.turns)
        few = step.cache is not None and absorbed_is_cheaper(self.config, x.shape[1], latents.shape[1])
        if for_layers(x):
            heads = self.by_kernels(q, latents, step, few)
        elif few:
            heads = self.absorbed(q, latents, step.mask)
        else:
            heads = self.expanded(q, latents, step.mask, step.recipes)
        return self.o_proj(heads.flatten(2))

    def latents(self, x: Float[Tensor, "B T D"], step: Step) -> Float[Tensor, "B T latent"]:
        """What is cached of each token: [c_kv; k_rope], the latent normalised, the key turned (Eqs. 1 and 3)."""
        return run(step.recipes, self._norm_and_turn, self.kv_a_proj_with_mqa(x), step.turns)

    def _norm_and_turn(self, c_kv_k_rope: Tensor, turns: Tensor) -> Tensor:
        if for_layers(c_kv_k_rope):
            norm = self.kv_a_layernorm
            return norm_and_turn(c_kv_k_rope, norm.weight, turns, norm.eps)
        c_kv, k_rope = c_kv_k_rope.split([self.config.kv_lora_rank, self.config.qk_rope_head_dim], -1)
        return torch.cat([self.kv_a_layernorm(c_kv), apply_rope(k_rope, turns)], -1)

    def queries(
        self, c_q: Float[Tensor, "B T rank"], turns: Complex[Tensor, "*BT half"]
    ) -> Float[Tensor, "B H T QK"]:
        """Every head's query, content part beside turned rotary part (Eqs. 6 to 9)."""
        q = self.q_proj(c_q) if self.config.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(c_q))
        q = q.unflatten(-1, (self.config.num_attention_heads, self.config.qk_head_dim))
        if for_layers(q):
            # The kernel turns a key too, which here is turned already: a head's rotary part stands in for it.
            return rope(q, q[..., 0, -self.config.qk_rope_head_dim :].detach(), turns)[0].transpose(1, 2)
        q = q.transpose(1, 2)
        q_nope, q_rope = q.split([self.config.qk_nope_head_dim, self.config.qk_rope_head_dim], -1)
        return torch.cat([q_nope, apply_rope(q_rope, turns if turns.ndim == 2 else turns[:, None])], -1)

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
        recipes: Recipes | None = None,
    ) -> Float[Tensor, "B T H V"]:
        """Make every head's keys and values from the latents, then attend (Eq. 10).

        Args:
            q: queries. latents: [c_kv; k_rope] of all S positions.
            mask: which positions each query sees; ``None`` means its own and all before (the T queries are the
                last of the S positions).
        """
        k, v = run(recipes, self.keys_values, latents)
        return scaled_attention(q, k, v, mask, self.config.softmax_scale).transpose(1, 2)

    def absorbed(
        self,
        q: Float[Tensor, "B H T QK"],
        latents: Float[Tensor, "B S latent"],
        mask: Bool[Tensor, "B 1 T S"] | None = None,
    ) -> Float[Tensor, "B T H V"]:
        """Carry queries into the latent space, attend there, carry the result back: equal to ``expanded``.

        q·(W_UK c) = (W_UKᵀ q)·c for the scores, Σ p (W_UV c) = W_UV (Σ p c) for the values. All heads share
        the same keys and values, so heads and queries together are the rows of two plain matrix products.
        """
        cfg = self.config
        w_uk, w_uv = self.up_projections()
        batch, heads, n_new = q.shape[:3]
        q_nope, q_rope = q.split([cfg.qk_nope_head_dim, cfg.qk_rope_head_dim], -1)
        q_latent = q_nope @ w_uk
        q_BxC = (torch.cat([q_latent, q_rope], -1) * cfg.softmax_scale).flatten(1, 2)
        scores = q_BxC @ latents.transpose(1, 2)
        if mask is None and n_new > 1:
            mask = causal_mask(n_new, latents.shape[1], latents.device)
        if mask is not None:
            scores = scores.unflatten(1, (heads, n_new)).masked_fill(~mask, float("-inf")).flatten(1, 2)
        p = scores.softmax(-1, dtype=torch.float32 if scores.element_size() < 4 else None).to(scores.dtype)
        u_BHTC = (p @ latents[..., : cfg.kv_lora_rank]).view(batch, heads, n_new, -1)
        return (u_BHTC @ w_uv.transpose(1, 2)).transpose(1, 2)

    def by_kernels(
        self, q: Float[Tensor, "B H T QK"], latents: Float[Tensor, "B S latent"], step: Step, few: bool
    ) -> Float[Tensor, "B T H V"]:
        """Either form, where there are kernels for it.

        Args:
            q, latents: as for the two forms. few: whether the absorbed one takes fewer multiplications.
        """
        scale = self.config.softmax_scale
        if few and on_kernels.decodes(q):
            pages = step.cache.pages(self.layer)
            return on_kernels.absorbed(q, *self.up_projections(), pages, step.held, scale)
        k, v, k_rope = run(step.recipes, self.parts_of_keys_values, latents)
        return on_kernels.expanded(q, k, v, k_rope, None if step.mask is None else step.held, scale)

    def parts_of_keys_values(
        self, latents: Float[Tensor, "B S latent"]
    ) -> tuple[Float[Tensor, "BS H K"], Float[Tensor, "BS H V"], Float[Tensor, "BS R"]]:
        """Keys' contents, values and the shared rotary key, as views: nothing is put together (Eqs. 2, 4, 5)."""
        cfg = self.config
        c_kv, k_rope = latents.split([cfg.kv_lora_rank, cfg.qk_rope_head_dim], -1)
        kv = self.kv_b_proj(c_kv).flatten(0, 1).unflatten(-1, (cfg.num_attention_heads, -1))
        return *kv.split([cfg.qk_nope_head_dim, cfg.v_head_dim], -1), k_rope.flatten(0, 1)

    def up_projections(self) -> tuple[Float[Tensor, "H K C"], Float[Tensor, "H V C"]]:
        """W_UK and W_UV of every head, as views."""
        cfg = self.config
        return self.kv_b_proj.weight.unflatten(0, (cfg.num_attention_heads, -1)).split(
            [cfg.qk_nope_head_dim, cfg.v_head_dim], 1
        )


def absorbed_is_cheaper(config: ModelConfig, n_new: int, n_total: int) -> bool:
    """Which form takes fewer multiplications for ``n_new`` queries over ``n_total`` cached tokens.

    Expanded: S up-projections and narrow attention. Absorbed: T up-projections and wide attention.
    """
    cfg = config
    up = cfg.kv_lora_rank * (cfg.qk_nope_head_dim + cfg.v_head_dim)
    expanded = n_total * up + n_new * n_total * (cfg.qk_head_dim + cfg.v_head_dim)
    absorbed = n_new * up + n_new * n_total * (cfg.latent_dim + cfg.kv_lora_rank)
    return absorbed < expanded


def causal_mask(n_new: int, n_total: int, device: torch.device) -> Bool[Tensor, "T S"]:
    """True where the last ``n_new`` of ``n_total`` positions may look: at themselves and before."""
    return torch.ones(n_new, n_total, dtype=torch.bool, device=device).tril(n_total - n_new)


def scaled_attention(
    q: Float[Tensor, "B H T QK"],
    k: Float[Tensor, "B H S QK"],
    v: Float[Tensor, "B H S V"],
    mask: Bool[Tensor, "*B 1 T S"] | None,
    scale: float,
) -> Float[Tensor, "B H T V"]:
    """softmax(scale · q kᵀ) v; without a mask, causal over the last T of S.

    On the CPU, short causal sequences go in blocks of rows, see ``causal_attention``. All else goes through
    torch's fused kernel. The CPU's asks for values as wide as the keys, and without them torch would write
    the whole T x S score matrix: zeros fill them up, which cost little beside that.
    """
    n_new, n_total, width = q.shape[2], k.shape[2], v.shape[3]
    causal = mask is None and n_new == n_total
    on_cpu = q.device.type == "cpu"
    if on_cpu and causal and n_new <= MOST_TOKENS and q.element_size() >= 4:
        flat = (x.flatten(0, 1) for x in (q, k, v))
        return causal_attention(*flat, scale).unflatten(0, q.shape[:2])
    if mask is None and 1 < n_new < n_total:
        mask = causal_mask(n_new, n_total, q.device)
    if on_cpu and width < k.shape[3]:
        v = F.pad(v, (0, k.shape[3] - width))
    heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    return heads[..., :width]
