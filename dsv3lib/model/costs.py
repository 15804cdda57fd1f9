"""What a configuration costs: floating-point operations per token by part, and cached bytes.

Counted from the sizes alone, so that 671B costs nothing to ask about. A multiply-add is two operations;
norms, softmax and other elementwise work are left out, as is usual (they are under one percent).
"""

from __future__ import annotations

from typing import Literal

from ..config import ModelConfig

Form = Literal["expanded", "absorbed"]


def attention_flops_per_cached_token(config: ModelConfig, form: Form) -> int:
    """Operations that one new query spends, in one layer, on each token already in the cache.

    Expanded decoding multiplies every cached latent up to keys and values again at every step; absorbed
    decoding compares the query with the latents as they lie (paper §2.1.1; V3: 33.6 against 0.279 MFLOP).

    Args:
        config: sizes. form: which of the two.
    """
    heads = config.num_attention_heads
    if form == "absorbed":
        return 2 * heads * (config.latent_dim + config.kv_lora_rank)
    up = 2 * config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    return up + 2 * heads * (config.qk_head_dim + config.v_head_dim)


def forward_flops(config: ModelConfig, context: int) -> dict[str, int]:
    """Operations of the forward pass for one token of a long sequence, by part.

    Keys and values are made once per token here, as in training and prefill.

    Args:
        config: sizes. context: tokens that this one attends to, itself included.

    Returns:
        "attention" (its projections), "attention_core" (scores and values), "dense", "shared_experts",
        "routed_experts" (the chosen ones), "router", "head"; the main model alone, without MTP modules.
    """
    d, heads, layers = config.hidden_size, config.num_attention_heads, config.num_hidden_layers
    n_moe = layers - config.first_k_dense_replace
    q_in = d if config.q_lora_rank is None else config.q_lora_rank
    projections = (
        (0 if config.q_lora_rank is None else d * config.q_lora_rank)
        + q_in * heads * config.qk_head_dim
        + d * config.latent_dim
        + config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
        + heads * config.v_head_dim * d
    )
    expert = 3 * d * config.moe_intermediate_size
    multiply_adds = {
        "attention": layers * projections,
        "attention_core": layers * context * heads * (config.qk_head_dim + config.v_head_dim),
        "dense": config.first_k_dense_replace * 3 * d * config.intermediate_size,
        "shared_experts": n_moe * config.n_shared_experts * expert,
        "routed_experts": n_moe * config.num_experts_per_tok * expert,
        "router": n_moe * config.n_routed_experts * d,
        "head": config.vocab_size * d,
    }
    return {part: 2 * count for part, count in multiply_adds.items()}


def cache_bytes_per_token(config: ModelConfig, bytes_per_value: int = 2) -> int:
    """Bytes that MLA keeps of one token over all layers (V3 in BF16: 70,272)."""
    return config.num_hidden_layers * config.latent_dim * bytes_per_value


def training_flops(config: ModelConfig, tokens: int, context: int) -> int:
    """Operations of training on ``tokens``: forward, and twice that backward; MTP and recomputation left out."""
    return 3 * tokens * sum(forward_flops(config, context).values())
