"""The choice of experts for few tokens in NumPy and plain Python (``layers.router.route`` defines it)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import add
from typing import NamedTuple

import numpy as np

from ..config import ModelConfig
from ..errors import InputError
from .weight_copies import Array

ONE_BY_ONE = 2  # tokens: for more, a dozen operations on arrays are quicker than Python


def route_rows(scores: Array, bias: Array, config: ModelConfig) -> tuple[Array, Array]:
    """``router.route``: each token's experts, best first, and their gate values.

    Args:
        scores: sigmoid affinities s, [T, E].
        bias: b, [E].
        config: sizes and switches.

    Returns:
        Int64 [T, A], and gate values [T, A] in the dtype of the scores.

    Raises:
        InputError: a score is NaN.
    """
    if len(scores) > ONE_BY_ONE:
        return route_together(scores, bias, config)
    bias = bias.tolist()
    chosen, gates = zip(*(route_one(row, bias, config) for row in scores.tolist()), strict=True)
    return np.array(chosen, np.int64), np.array(gates, scores.dtype)


def route_together(scores: Array, bias: Array, config: ModelConfig) -> tuple[Array, Array]:
    """All tokens at once, see ``route_rows``."""
    if math.isnan(scores.sum()):
        _refuse_nan(int(np.isnan(scores).sum()), scores.size)
    steered, rows = scores + bias, np.arange(len(scores))[:, None]
    if config.n_group > 1:
        grouped = steered.reshape(len(scores), config.n_group, -1)
        ranked = np.partition(grouped, -2, -1)
        totals = ranked[..., -1] + ranked[..., -2]
        dropped = np.argsort(-totals, -1, "stable")[:, config.topk_group :]
        grouped[rows, dropped] = -np.inf
    chosen = np.argsort(-steered, -1, "stable")[:, : config.num_experts_per_tok]
    gates = scores[rows, chosen]
    if config.norm_topk_prob:
        gates /= gates.sum(-1, keepdims=True) + 1e-20
    return chosen, gates * config.routed_scaling_factor


def route_one(
    scores: Sequence[float], bias: Sequence[float], config: ModelConfig
) -> tuple[list[int], list[float]]:
    """One token in plain Python, which is quicker than arrays for a row of this length.

    Args:
        scores: sigmoid affinities s.
        bias: b.
        config: sizes and switches.

    Returns:
        The experts, best first (the lower index among equals), and their gate values.

    Raises:
        InputError: a score is NaN.
    """
    if math.isnan(sum(scores)):
        _refuse_nan(sum(map(math.isnan, scores)), len(scores))
    steered = list(map(add, scores, bias))
    allowed = range(len(steered))
    if config.n_group > 1:
        size = len(steered) // config.n_group
        starts = range(0, len(steered), size)
        totals = [sum(sorted(steered[start : start + size])[-2:]) for start in starts]
        kept = sorted(range(config.n_group), key=totals.__getitem__, reverse=True)[: config.topk_group]
        allowed = [i for n in sorted(kept) for i in range(starts[n], starts[n] + size)]
    chosen = sorted(allowed, key=steered.__getitem__, reverse=True)[: config.num_experts_per_tok]
    gates = [scores[i] for i in chosen]
    scale = config.routed_scaling_factor
    if config.norm_topk_prob:
        scale /= sum(gates) + 1e-20
    return chosen, [g * scale for g in gates]


def _refuse_nan(count: int, of: int) -> None:
    if count:
        raise InputError(
            f"scores: {count} of {of} are NaN, expected affinities in [0, 1]; "
            "the hidden state or the router's weight is spoilt"
        )


class Visits(NamedTuple):
    """Which token goes where, as a permutation of the T x A visits (``layers.experts.Visits`` in NumPy).

    Args:
        token: of each sorted visit, the token that makes it.
        order: of each sorted visit, its place in the flattened [T, A].
        inverse: of each place, its row among the sorted.
        parts: the visited experts, each with its rows.
    """

    token: Array
    order: Array
    inverse: Array
    parts: list[tuple[int, slice]]


def sort_visits(chosen: Array) -> Visits:
    """Lay all visits of one expert side by side, tokens in order within it.

    Args:
        chosen: experts, [T, A].
    """
    n_new, each = chosen.shape
    if n_new == 1:  # nobody meets another
        order = np.arange(each)
        parts = [(expert, slice(i, i + 1)) for i, expert in enumerate(chosen[0].tolist())]
        return Visits(np.zeros(each, np.int64), order, order, parts)
    flat = chosen.reshape(-1)
    order = np.argsort(flat, kind="stable")
    inverse = np.empty_like(order)
    inverse[order] = np.arange(order.size)
    ends = np.bincount(flat).cumsum().tolist()
    parts = [(i, slice(a, b)) for i, (a, b) in enumerate(zip([0, *ends], ends, strict=False)) if b > a]
    return Visits(order // each, order, inverse, parts)
