"""Absorbed attention of few tokens over the cached latents (paper §2.1.1; ``layers.attention`` defines it).

Tokens times heads are the rows of two matrix products with the latents.
"""

from __future__ import annotations

import numpy as np
import torch

from .token_weights import ONE_THREAD, asleep, matmul
from .weight_copies import Array

TOGETHER = 8  # tokens at a time: their scores stay in a cache, and they need not meet what comes after


def attend_to_latents(q: Array, past: Array, rank: int) -> Array:
    """softmax(q · latents) c_kv, causal: the last T of S positions look at themselves and before.

    Args:
        q: queries in the latent space that bear the softmax scale, [T, H, C + R].
        past: latents of all positions, [S, C + R].
        rank: C.

    Returns:
        What every head saw of the latents, [T, H, C].
    """
    n_new = len(q)
    if n_new <= TOGETHER:
        return _attend(q, past, rank)
    u = np.empty((*q.shape[:2], rank), q.dtype)
    for start in range(0, n_new, TOGETHER):
        end = min(start + TOGETHER, n_new)
        u[start:end] = _attend(q[start:end], past[: len(past) - n_new + end], rank)
    return u


def _attend(q: Array, past: Array, rank: int) -> Array:
    n_new, heads, width = q.shape
    form = _by_numpy if q.size * len(past) <= ONE_THREAD else _by_torch
    return form(q.reshape(-1, width), past, n_new, rank).reshape(n_new, heads, rank)


def _by_numpy(q: Array, past: Array, n_new: int, rank: int) -> Array:
    """Up to some hundred latents: NumPy begins an operation in a fraction of the time that torch needs."""
    p = np.matmul(q, past.T)
    hide_what_comes_later(p.reshape(n_new, -1, len(past)))
    p -= p.max(1, keepdims=True)
    np.exp(p, p)
    u = np.matmul(p, past[:, :rank])
    u /= p.sum(1, keepdims=True)
    return u


def _by_torch(q: Array, past: Array, n_new: int, rank: int) -> Array:
    """For more: torch's products and its softmax, which is one operation, are quicker than NumPy's."""
    latents = torch.from_numpy(past)
    with asleep(q.size * len(past)):
        scores = torch.mm(torch.from_numpy(q), latents.t())
        hide_what_comes_later(scores.numpy().reshape(n_new, -1, len(past)))
        p = torch.softmax(scores, 1, out=scores)
        return torch.mm(p, latents[:, :rank]).numpy()


def hide_what_comes_later(scores: Array) -> None:
    """Put −inf where a query would see a token after its own.

    Args:
        scores: of the last T positions, [T, H, S']; the last T columns are these positions. Changed in place.
    """
    n_new, _, width = scores.shape
    for t in range(n_new - 1):
        scores[t, :, width - n_new + t + 1 :] = -np.inf


def by_head(x: Array, weight: Array, out: Array) -> None:
    """One product a head, x_h W_h.

    Args:
        x: [T, H, I].
        weight: [H, I, O].
        out: [T, H, O], filled.
    """
    if len(x) == 1:
        np.vecmat(x[0], weight, out=out[0])
    else:
        matmul(x.transpose(1, 0, 2), weight, out.transpose(1, 0, 2))


def rotated(x: Array, rotations: Array) -> Array:
    """RoPE: neighbours in the last dimension are pairs, one complex product each."""
    return (x.view(rotations.dtype) * rotations).view(x.dtype)
