"""One decode step of one layer, both forms of attention: timed here, and counted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from ..config import ModelConfig
from ..layers.attention import MultiHeadLatentAttention
from ..model.costs import attention_flops_per_cached_token

FORMS = ("expanded", "absorbed")


def timed_milliseconds(
    config: ModelConfig, contexts: Sequence[int], device: torch.device
) -> dict[str, list[float]]:
    """Milliseconds of one new token's attention in one layer, by form and cached tokens.

    The layer's input is made narrow, which saves memory; what is timed does not depend on it.

    Args:
        config: sizes of the heads. contexts: cached tokens. device: where it is computed.
    """
    from ..course.stopwatch import milliseconds

    layer = MultiHeadLatentAttention(config.replace(hidden_size=64, q_lora_rank=None), layer=0).to(device)
    q = torch.randn(1, config.num_attention_heads, 1, config.qk_head_dim, device=device)
    past = torch.randn(1, max(contexts), config.latent_dim, device=device)
    return {
        form: [milliseconds(partial(getattr(layer, form), q, past[:, :n]), device) for n in contexts]
        for form in FORMS
    }


def counted_millions(config: ModelConfig, contexts: Sequence[int]) -> dict[str, list[float]]:
    """Millions of operations of the same, what does not grow with the context included.

    Args:
        config: sizes. contexts: cached tokens.
    """
    per_token = {form: attention_flops_per_cached_token(config, form) for form in FORMS}
    once = (
        2 * config.num_attention_heads * config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)
    )
    fixed = {"expanded": 0, "absorbed": once}  # W^UK on the query and W^UV on the mixture, one time each
    return {form: [(fixed[form] + n * per_token[form]) / 1e6 for n in contexts] for form in FORMS}
