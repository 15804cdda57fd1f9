"""Absorbed attention of few tokens over the cached latents, in NumPy (paper §2.1.1; ``layers.attention`` defines it).

Tokens times heads are the rows of two matrix products with the latents. A longer context is cut into pieces, whose
products NumPy does one after the other at one call.
"""

from __future__ import annotations

import numpy as np

from .token_weights import ONE_THREAD, matmul
from .weight_copies import Array

# Latents at a time. So small a product is done where its operands lie (OpenBLAS, AVX-512), a larger one copies
# them into another order first, which for a few heads takes longer than the product.
PIECE_VALUES, PIECE_LEAST = 10_240, 64
TOGETHER = 32  # queries at a time: those before them need not meet what comes after


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
    at_once = q.size * len(past) <= ONE_THREAD or len(past) - len(q) < _piece(q.shape[-1])
    return _attend_at_once(q, past, rank) if at_once else _attend_by_pieces(q, past, rank)


def _piece(latent_dim: int) -> int:
    return max(PIECE_LEAST, PIECE_VALUES // latent_dim)


def _attend_at_once(q: Array, past: Array, rank: int) -> Array:
    n_new, heads, latent_dim = q.shape
    rows = n_new * heads
    p = matmul(q.reshape(rows, latent_dim), past.T, np.empty((rows, len(past)), q.dtype))
    hide_what_comes_later(p.reshape(n_new, heads, -1))
    p -= p.max(1, keepdims=True)
    np.exp(p, p)
    u = matmul(p, past[:, :rank], np.empty((rows, rank), q.dtype))
    u /= p.sum(1, keepdims=True)
    return u.reshape(n_new, heads, rank)


def _attend_by_pieces(q: Array, past: Array, rank: int) -> Array:
    n_new, heads, latent_dim = q.shape
    n_total, rows = len(past), n_new * heads
    piece = _piece(latent_dim)
    whole = (n_total - n_new) // piece  # pieces that every query sees all of; the last one holds what is left
    left = n_total - whole * piece
    pieces, rest = past[: whole * piece].reshape(whole, piece, latent_dim), past[whole * piece :]
    q = q.reshape(rows, latent_dim)
    p = np.empty((whole + 1, rows, piece + n_new - 1), q.dtype)
    matmul(q, pieces.transpose(0, 2, 1), p[:whole, :, :piece])
    matmul(q, rest.T, p[whole, :, :left])
    p[:whole, :, piece:] = -np.inf
    p[whole, :, left:] = -np.inf
    hide_what_comes_later(p[whole].reshape(n_new, heads, -1)[:, :, :left])
    p -= p.max(0).max(1, keepdims=True)
    np.exp(p, p)
    seen = np.empty((whole + 1, rows, rank), q.dtype)
    matmul(p[:whole, :, :piece], pieces[..., :rank], seen[:whole])
    matmul(p[whole, :, :left], rest[:, :rank], seen[whole])
    u = seen.sum(0)
    u /= p.sum(0).sum(1, keepdims=True)
    return u.reshape(n_new, heads, rank)


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
