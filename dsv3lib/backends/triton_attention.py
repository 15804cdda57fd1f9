"""Attention's two forms on Triton kernels: what ``layers.attention`` computes, handed over as the kernels want it.

The kernels read tokens where they lie. *Absorbed* takes the cache's pages; *expanded* takes all rows of a batch as
packed documents, the shared rotary key once, and the last queries of a row that has more keys. Rows of unequal length
need no mask in either: a row ends where its length says.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..kernels.attention.mla_decode import MOST_NEW, mla_decode
from ..kernels.attention.mla_prefill import mla_prefill

MOST_CALLS = 4  # of the decoding kernel for one call's new tokens; beyond, expanding is the better way
MOST = MOST_CALLS * MOST_NEW  # new tokens


def decodes(q: Float[Tensor, "B H T QK"]) -> bool:
    """Whether the decoding kernel takes these queries: it is made for few, and keeps no gradient."""
    return q.shape[2] <= MOST and not (torch.is_grad_enabled() and q.requires_grad)


def attend_to_pages(
    q: Float[Tensor, "B T H latent"],
    pages: tuple[Tensor, Tensor],
    totals: Int[Tensor, " B"],
    scale: float,
    rank: int,
) -> Float[Tensor, "B T H C"]:
    """Attention of queries in the latent space over the cache's pages.

    The kernel takes four new tokens at a time; what comes later in a row is hidden from those before it by
    the length alone.

    Args:
        q: queries, carried into the latent space.
        pages: of the layer's cache, and each row's in order.
        totals: tokens of each row, the new ones included.
        scale: of the scores.
        rank: C, width of the latent.
    """
    parts, n_new = [], q.shape[1]
    for start in range(0, n_new, MOST_NEW):
        some = q[:, start : start + MOST_NEW]
        seen = totals - (n_new - start - some.shape[1])
        parts.append(mla_decode(some, *pages, seen, scale, rank)[0])
    return torch.cat(parts, 1)


def expanded(
    q: Float[Tensor, "B H T QK"],
    k: Float[Tensor, "BS H K"],
    v: Float[Tensor, "BS H V"],
    k_rope: Float[Tensor, "BS R"],
    totals: Int[Tensor, " B"] | None,
    scale: float,
) -> Float[Tensor, "B T H V"]:
    """Causal attention of the last T positions of each row over all of them; differentiable.

    Args:
        q: queries.
        k: contents of the keys of all rows, one after the other.
        v: values, the same.
        k_rope: the shared part of the keys.
        totals: positions of each row that count, where rows are of unequal length; ``None``: all.
        scale: of the scores.
    """
    batch, _, n_new = q.shape[:3]
    n_total = k.shape[0] // batch
    if totals is None:
        starts, k_starts = borders(batch, n_new, q.device), borders(batch, n_total, q.device)
    else:
        # What lies in a row beyond its end is a document of its own, which nobody asks about.
        first = borders(batch, n_total, q.device)
        k_starts = torch.cat([torch.stack([first[:-1], first[:-1] + totals], 1).flatten(), first[-1:]]).int()
        starts = borders(batch, n_new, q.device).repeat_interleave(2)[1:]
    tokens = q.transpose(1, 2).flatten(0, 1)
    out, _ = mla_prefill(tokens, k, v, starts, scale, k_starts=k_starts, k_rope=k_rope)
    return out.unflatten(0, (batch, n_new))


@lru_cache(maxsize=64)
def borders(rows: int, each: int, device: torch.device) -> Int[Tensor, " borders"]:
    """0, ``each``, 2 · ``each`` … ``rows`` · ``each``, Int32: asked for in every layer, made once."""
    with torch.inference_mode(False):  # begun in inference mode, it may serve training
        return torch.arange(0, rows * each + 1, each, dtype=torch.int32, device=device)
