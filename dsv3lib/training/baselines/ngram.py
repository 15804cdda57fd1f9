"""N-gram language model with interpolated modified Kneser-Ney smoothing (Chen & Goodman, 1999).

With c the count of an n-gram (lower orders: of how many different tokens it follows, the *continuation count*;
the plain count where it begins a document),

    p_n(w | h) = max(c(hw) − D(c(hw)), 0) / Σ_v c(hv)  +  γ(h) · p_{n−1}(w | h')

where h' is h without its first token, D takes three values by order (for counts of 1, 2, and 3 or more) from the
counts of counts, and γ(h) = Σ_v min(D(c(hv)), c(hv)) / Σ_v c(hv) gives back exactly what was taken: p sums to one
over the vocabulary. A context never seen hands over to the next shorter one; p_0 is uniform.

Everything is an array: an n-gram is the number of its first n − 1 tokens times V plus its last, looked up by
binary search. Four million tokens take about five seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from dsv3lib.errors import DataError

DEFAULT_ORDER = 5
_DISCOUNTS = 3


@dataclass(frozen=True)
class _Table:
    """The n-grams of one order: ``keys`` sorted; ``count`` of each; by context the sum and the mass γ."""

    keys: Int[np.ndarray, " n"]
    count: Float[np.ndarray, " n"]
    discount: Float[np.ndarray, " 4"]
    total: Float[np.ndarray, " contexts"]
    backoff: Float[np.ndarray, " contexts"]


class KneserNey:
    """Counts token sequences and scores others.

    Args:
        sequences: arrays of token ids; no n-gram crosses from one to the next.
        vocab_size: V. order: n, 1 or more.
        bos_id: the token that begins a document: what it begins has no other left neighbour, so its n-grams
            keep their plain counts.

    Raises:
        DataError: there is no token, one is outside the vocabulary, or the order is below 1.
    """

    def __init__(
        self, sequences: Iterable[np.ndarray], vocab_size: int, order: int = DEFAULT_ORDER,
        bos_id: int | None = None,
    ) -> None:  # fmt: skip
        if order < 1:
            raise DataError(f"n-gram: order is {order}; it must be at least 1")
        self.vocab_size, self.order = vocab_size, order
        tokens, starts = _joined(sequences, vocab_size)
        ids = [np.zeros(len(tokens), dtype=np.int64)]  # order 0: the empty context, number 0
        keys, raw, places, begins = [], [], [], []
        for n in range(1, order + 1):
            before = _shifted(ids[n - 1]) if n > 1 else ids[0]
            if n > 1:
                before[starts] = -1
            key = np.where(before < 0, -1, before * vocab_size + tokens)
            unique, where, inverse, counts = np.unique(
                key, return_index=True, return_inverse=True, return_counts=True
            )
            empty = int(len(unique) > 0 and unique[0] < 0)
            ids.append(inverse.reshape(-1).astype(np.int64) - empty)
            keys.append(unique[empty:])
            raw.append(counts[empty:].astype(np.float64))
            places.append(where[empty:])
            begins.append(tokens[where[empty:] - (n - 1)] == (-1 if bos_id is None else bos_id))
        self._tables = []
        for n in range(1, order + 1):
            count = raw[n - 1]
            if n < order:  # of each different (n+1)-gram, one occurrence votes for the n-gram that it ends in
                votes = ids[n][places[n]]
                follows = np.bincount(votes, minlength=len(count)).astype(np.float64)
                count = np.where(begins[n - 1], count, follows)
            contexts = 1 if n == 1 else len(keys[n - 2])
            self._tables.append(_table(keys[n - 1], count, contexts, vocab_size))

    def probabilities(self, tokens: Int[np.ndarray, " T"]) -> Float[np.ndarray, " T"]:
        """p(token i | the tokens before it in this sequence), for every i; the first has no context."""
        tokens = np.asarray(tokens, dtype=np.int64)
        p = np.full(len(tokens), 1.0 / self.vocab_size)
        contexts = np.zeros(len(tokens), dtype=np.int64)  # of order n - 1, ending before i
        for n, table in enumerate(self._tables, start=1):
            if n > 1:
                contexts = _shifted(found)  # noqa: F821  of the order before
            found = _lookup(table.keys, contexts, tokens, self.vocab_size)
            known = contexts >= 0
            known[known] &= table.total[contexts[known]] > 0
            count = np.zeros(len(tokens))
            count[found >= 0] = table.count[found[found >= 0]]
            kept = np.maximum(count - _discount_of(table.discount, count), 0.0)
            context = contexts[known]
            p[known] = kept[known] / table.total[context] + table.backoff[context] * p[known]
        return p

    def distribution(self, context: list[int]) -> Float[np.ndarray, " V"]:
        """p(w | context) for every w: sums to one. Slow; for looking and for tests."""
        last = context[-(self.order - 1) :] if self.order > 1 else []
        return np.array([self.probabilities(np.array([*last, w]))[-1] for w in range(self.vocab_size)])


def unigram(tokens: Int[np.ndarray, " n"], vocab_size: int) -> Float[np.ndarray, " V"]:
    """Frequencies of the tokens, one added to each count (Laplace), so that none is impossible."""
    counts = np.bincount(tokens, minlength=vocab_size) + 1.0
    return counts / counts.sum()


def _joined(sequences: Iterable[np.ndarray], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """All tokens in one array, and where each sequence begins."""
    parts = [np.asarray(part, dtype=np.int64) for part in sequences]
    parts = [part for part in parts if len(part)]
    if not parts:
        raise DataError("n-gram: there is no token to count; give at least one sequence that is not empty")
    tokens = np.concatenate(parts)
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise DataError(
            f"n-gram: token ids go from {tokens.min()} to {tokens.max()}, expected 0 to {vocab_size - 1}; were "
            "they made with another tokenizer?"
        )
    return tokens, np.cumsum([0, *map(len, parts[:-1])])


def _shifted(ids: np.ndarray) -> np.ndarray:
    """What stood one place before; -1 (none) before the first."""
    return np.concatenate([[-1], ids[:-1]])[: len(ids)]


def _table(keys: np.ndarray, count: np.ndarray, contexts: int, vocab_size: int) -> _Table:
    discount = _discounts(count)
    context = keys // vocab_size
    taken = np.minimum(_discount_of(discount, count), count)
    total = np.bincount(context, weights=count, minlength=contexts).astype(np.float64)  # int where empty
    mass = np.bincount(context, weights=taken, minlength=contexts).astype(np.float64)
    return _Table(keys, count, discount, total, mass / np.maximum(total, 1e-300))


def _discounts(count: np.ndarray) -> np.ndarray:
    """D by count (0, 1, 2, 3 or more): D_k = k − (k + 1)·Y·t_{k+1} / t_k, Y = t_1 / (t_1 + 2·t_2).

    t_k is how many n-grams have the count k. Where one of them is none, the formula has nothing to say and a
    discount of 0.75 stands in (Kneser and Ney's own, about).
    """
    t = [float((count == k).sum()) for k in range(_DISCOUNTS + 2)]
    if min(t[1:]) == 0.0:
        return np.array([0.0, 0.75, 0.75, 0.75])
    y = t[1] / (t[1] + 2 * t[2])
    values = [k - (k + 1) * y * t[k + 1] / t[k] for k in range(1, _DISCOUNTS + 1)]
    return np.array([0.0, *(min(max(v, 0.05), k) for k, v in enumerate(values, start=1))])


def _discount_of(discount: np.ndarray, count: np.ndarray) -> np.ndarray:
    return discount[np.minimum(count, _DISCOUNTS).astype(np.int64)]


def _lookup(keys: np.ndarray, contexts: np.ndarray, tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Number of each n-gram in its table, -1 where it (or its context) was never seen."""
    if not len(keys):
        return np.full(len(tokens), -1, dtype=np.int64)
    wanted = contexts * vocab_size + tokens
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where((contexts >= 0) & (keys[at] == wanted), at, -1)
