"""Absorbed attention of few tokens over the cached latents, in NumPy (paper §2.1.1; ``layers.attention`` defines it).

Tokens times heads are the rows of two matrix products with the latents. A longer context is cut into pieces, whose
products NumPy does one after the other at one call.
"""

from __future__ import annotations

import numpy as np

from . import token_weights
from .token_weights import ONE_THREAD, matmul
from .weight_copies import Array

# Latents at a time. So small a product is done where its operands lie (OpenBLAS, AVX-512), a larger one copies
# them into another order first, which for a few heads takes longer than the product.
PIECE_VALUES, PIECE_LEAST = 10_240, 64
PIECE_SMALLEST = 24  # where a piece is cut so that its scores are few enough for that
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
    at_once = q.size * len(past) <= ONE_THREAD
    return _attend_by_pieces(q, past, rank, len(past) if at_once else piece_of(q.shape[0] * q.shape[1], q.shape[2]))


def piece_of(rows: int, width: int) -> int:
    """How many latents are taken at a time.

    Args:
        rows: queries times heads. width: of a latent.
    """
    piece = max(PIECE_LEAST, PIECE_VALUES // width)
    in_place = token_weights.SMALL_RESULT // rows
    return min(piece, in_place) if token_weights.IN_PLACE and in_place >= PIECE_SMALLEST else piece


def _attend_by_pieces(q: Array, past: Array, rank: int, piece: int) -> Array:
    """The same, with pieces that every query sees all of, and a rest."""
    n_new, heads, latent_dim = q.shape
    n_total, rows = len(past), n_new * heads
    whole = (n_total - n_new) // piece
    pieces, rest = past[: whole * piece].reshape(whole, piece, latent_dim), past[whole * piece :]
    q = q.reshape(rows, latent_dim)
    p = matmul(q, rest.T, np.empty((rows, len(rest)), q.dtype))
    hide_what_comes_later(p.reshape(n_new, heads, -1))
    top = p.max(1, keepdims=True)
    if whole:
        p_whole = matmul(q, pieces.transpose(0, 2, 1), np.empty((whole, rows, piece), q.dtype))
        top = np.maximum(top, p_whole.max(0).max(1, keepdims=True))
        p_whole -= top
        np.exp(p_whole, p_whole)
    p -= top
    np.exp(p, p)
    total = p.sum(1, keepdims=True)
    u = matmul(p, rest[:, :rank], np.empty((rows, rank), q.dtype))
    if whole:
        total += p_whole.sum(0).sum(1, keepdims=True)
        u += matmul(p_whole, pieces[..., :rank], np.empty((whole, rows, rank), q.dtype)).sum(0)
    u /= total
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
