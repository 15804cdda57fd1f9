"""Who sees whom among packed documents, as one span of numbers a token.

A mask for T queries and S keys would be T·S bits; but within packed documents, causal or not, the keys that a
query sees lie side by side, and so do the queries that see a key. Two numbers a token say it all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Int32
from torch import Tensor


class Spans(NamedTuple):
    """Query t sees keys key_from[t] to key_to[t] - 1; key s is seen by queries query_from[s] to query_to[s] - 1.

    Both say the same. A token that sees none, or that none sees, has an empty span.
    """

    key_from: Int32[Tensor, " T"]
    key_to: Int32[Tensor, " T"]
    query_from: Int32[Tensor, " S"]
    query_to: Int32[Tensor, " S"]


def attention_spans(
    starts: Int32[Tensor, " borders"],
    k_starts: Int32[Tensor, " borders"],
    n_queries: int,
    n_keys: int,
    causal: bool,
) -> Spans:
    """Spans from the documents' borders, on the device and without waiting for it.

    A document's n queries are the last n of its m keys: query i sees the first m - n + i + 1.

    Args:
        starts: borders of the documents' queries.
        k_starts: borders of the documents' keys.
        n_queries: T; queries past the last border belong to no document.
        n_keys: S; keys past the last border belong to no document.
        causal: whether the future is hidden.
    """
    q, q_in, q_first, q_end, lead, key_first, key_end = _documents(starts, k_starts, n_queries)
    key_to = torch.minimum(key_end, key_first + lead + (q - q_first) + 1) if causal else key_end
    key_from = torch.where(q_in, key_first, 0)
    key_to = torch.where(q_in, torch.maximum(key_to, key_first), 0)

    k, k_in, key_first, _, shift, q_first, q_end = _documents(k_starts, starts, n_keys)
    # Here the lead is negative: key j is first seen by query j - (m - n).
    query_from = torch.maximum(q_first, q_first + (k - key_first) + shift) if causal else q_first
    query_from = torch.where(k_in, torch.minimum(query_from, q_end), 0)
    return Spans(key_from, key_to, query_from, torch.where(k_in, q_end, 0))


def _documents(own: Tensor, other: Tensor, count: int) -> tuple[Tensor, ...]:
    """Of each token: its number, whether it is in a document, that document's first and end on its own side, how
    many tokens more the other side has, and the document's first and end there."""
    token = torch.arange(count, dtype=torch.int32, device=own.device)
    if own.numel() < 2:
        nothing = torch.zeros_like(token)
        return token, nothing.bool(), nothing, nothing, nothing, nothing, nothing
    document = torch.searchsorted(own[1:].contiguous(), token, right=True)
    inside = (document < own.numel() - 1) & (token >= own[0])
    document = document.clamp(max=own.numel() - 2)
    first, end, other_first, other_end = (
        own[document],
        own[document + 1],
        other[document],
        other[document + 1],
    )
    return token, inside, first, end, (other_end - other_first) - (end - first), other_first, other_end
