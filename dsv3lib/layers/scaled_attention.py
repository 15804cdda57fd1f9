"""Scaled dot-product attention, causal over the last queries of a longer context."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


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
    """softmax(scale · q kᵀ) v, by torch (Eq. 10).

    Args:
        q: queries, the last T of S positions.
        k: keys.
        v: values.
        mask: which keys a query sees; without one its own and all before.
        scale: of the scores.
    """
    causal = mask is None and q.shape[2] == k.shape[2]
    if mask is None and 1 < q.shape[2] < k.shape[2]:
        mask = causal_mask(q.shape[2], k.shape[2], q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
