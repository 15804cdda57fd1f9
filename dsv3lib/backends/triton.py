"""Triton kernels, put where the layers ask: a GPU's fast forms, and the same kernels interpreted on a CPU in tests."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor, nn

from ..kernels.attention.mla_decode import PAGE
from ..kernels.elementwise.gated import swiglu
from ..kernels.elementwise.latent import norm_and_turn
from ..kernels.elementwise.norms import add_rms_norm, rms_norm
from ..kernels.elementwise.rotary import rope
from ..kernels.matmul.grouped_gemm import grouped_gemm
from ..kernels.moe.gate_kernel import gate
from ..kernels.moe.permutation import permute, unpermute
from ..layers.cache import LatentCache
from ..layers.experts import Experts, Visits
from ..layers.norm import RMSNorm
from ..layers.operations import Dispatched
from ..layers.router import Router
from ..layers.step import Step
from ..numerics import TILE
from ..recompute import run
from . import triton_attention
from .chosen import Chosen

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Triton(Chosen):
    """FP32, BF16 and FP16 on a GPU."""

    name = "triton"
    dtypes = DTYPES
    page = PAGE
    attention = ("triton", "mla_prefill, rope")
    decoding = ("triton", "mla_decode over the cache's pages, rope")
    replaces = MappingProxyType(
        {
            RMSNorm: "rms_norm, add_rms_norm; norm_and_turn for the cached latent",
            Router: "gate",
            Experts: "permute, grouped_gemm, swiglu, unpermute",
        }
    )

    # ---- norms and RoPE ------------------------------------------------------------------------------

    def norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        """RMSNorm in one launch."""
        return rms_norm(x, norm.weight, norm.eps) if self.stands_for(norm, x) else norm(x)

    def add_norm(self, norm: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The residual's addition and the norm behind it in one pass."""
        if not self.stands_for(norm, x):
            return super().add_norm(norm, x, residual)
        return add_rms_norm(x, residual, norm.weight, norm.eps)

    def latents(self, norm: nn.Module, c_kv_k_rope: Tensor, rotations: Tensor) -> Tensor:
        """The latent's norm and the shared key's RoPE in one pass."""
        if not self.stands_for(norm, c_kv_k_rope):
            return super().latents(norm, c_kv_k_rope, rotations)
        return norm_and_turn(c_kv_k_rope, norm.weight, rotations, norm.eps)

    def rotate_queries(self, q: Tensor, rotations: Tensor) -> Tensor:
        """RoPE on all heads in one pass, without the shared key, which was rotated with its norm."""
        return rope(q, None, rotations)[0].transpose(1, 2)

    # ---- attention -----------------------------------------------------------------------------------

    def reads_cache(self, n_new: int, absorb: bool, cache: LatentCache) -> bool:
        """The decoding kernel multiplies FP8 latents by their scales on the way, where whole tiles lie in a row."""
        whole = cache.config.kv_lora_rank % TILE == 0
        return absorb and whole and n_new <= triton_attention.MOST and not torch.is_grad_enabled()

    def absorbed(self, attention: nn.Module, q: Tensor, latents: Tensor, step: Step) -> Tensor:
        """Decoding over the cache's pages, for few new tokens without a gradient; else over keys and values."""
        if step.cache.format == "fp8" and not self.reads_cache(q.shape[2], True, step.cache):
            return self.expanded(attention, q, latents, step)
        if not triton_attention.decodes(q):
            return self.expanded(attention, q, latents, step)
        cfg = attention.config
        q_nope, q_rope = q.split([cfg.qk_nope_head_dim, cfg.qk_rope_head_dim], -1)
        parts = attention.into_latent(q_nope), q_rope
        q_latent = torch.cat([x.transpose(1, 2) for x in parts], -1)
        pages = step.cache.pages(attention.layer)
        u_BTHC = triton_attention.attend_to_pages(
            q_latent, pages, step.totals, cfg.softmax_scale, cfg.kv_lora_rank
        )
        return attention.out_of_latent(u_BTHC.transpose(1, 2)).transpose(1, 2)

    def expanded(self, attention: nn.Module, q: Tensor, latents: Tensor, step: Step) -> Tensor:
        """Keys and values stay where the up-projection wrote them, the shared key where it lies."""
        cfg = attention.config
        c_kv, k_rope = latents.split([cfg.kv_lora_rank, cfg.qk_rope_head_dim], -1)
        kv = run(step.recompute, attention.kv_b_proj, c_kv).flatten(0, 1)
        k, v = kv.unflatten(-1, (cfg.num_attention_heads, -1)).split(
            [cfg.qk_nope_head_dim, cfg.v_head_dim], -1
        )
        totals = None if step.mask is None else step.totals
        return triton_attention.expanded(q, k, v, k_rope.flatten(0, 1), totals, cfg.softmax_scale)

    # ---- the mixture ---------------------------------------------------------------------------------

    def route(self, router: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Affinities, choice and gate values in one launch."""
        if not self.stands_for(router, x):
            return router(x)
        cfg = router.config
        return gate(
            router.logits(x), router.e_score_correction_bias,
            top_k=cfg.num_experts_per_tok, n_group=cfg.n_group, topk_group=cfg.topk_group,
            norm=cfg.norm_topk_prob, scale=cfg.routed_scaling_factor,
        )  # fmt: skip

    def dispatch(self, experts: nn.Module, x: Tensor, indices: Tensor, weights: Tensor) -> Dispatched:
        """Rows copied to their experts; how many an expert gets never leaves the GPU."""
        if not self.intact(experts, Experts) or x.dtype not in DTYPES:
            return super().dispatch(experts, x, indices, weights)
        rows, counts, positions = permute(x, indices, experts.gate_up_proj.shape[0])
        return Dispatched(rows, indices, weights, Visits(None, None, positions, counts))

    def experts(self, experts: nn.Module, sent: Dispatched) -> Tensor:
        """Two grouped products and the activation between them."""
        if not self.stands_for(experts, sent.rows):
            return super().experts(experts, sent)
        counts = sent.visits.counts
        hidden = swiglu(grouped_gemm(sent.rows, experts.gate_up_proj, counts))
        return grouped_gemm(hidden, experts.down_proj, counts)

    def combine(self, answers: Tensor, sent: Dispatched) -> Tensor:
        """Each token's weighted sum, gathered in a fixed order."""
        if sent.visits is None or sent.visits.order is not None:
            return super().combine(answers, sent)  # they were not dispatched by a kernel
        return unpermute(answers, sent.visits.inverse, sent.weights)
