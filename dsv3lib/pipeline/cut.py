"""Where to cut a model into pipeline stages: dynamic programming over contiguous cuts, exact for any costs.

The slowest rank sets the pace of a pipeline. Where a rank has one stage, that is the largest stage. Where it holds two
that mirror one another (DualPipe's two directions, the V of ZBV and DualPipeV: stages s and S − 1 − s), it is the
largest sum of such a pair: the embedding's end and the head's end of the model then lie on one rank, and both count.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

from ..checks import require, require_integer

_ROUNDING = 1e-12
"""Relative difference up to which two sums of the same costs count as equal."""


def least_largest(costs: Sequence[float | int], stages: int) -> float:
    """The cost of the largest stage in the best cut: D[s, j] = min over i < j of max(D[s − 1, i], Σ costs[i:j]).

    Args:
        costs: of the pieces, in order, at least 0. stages: how many; none is empty.

    Raises:
        ConfigError: there are fewer pieces than stages.
    """
    _refuse(costs, stages)
    sums = [0.0, *accumulate(map(float, costs))]
    best = sums  # one stage holds all pieces before j
    for stage in range(2, stages + 1):
        best = [
            min((max(best[i], sums[j] - sums[i]) for i in range(stage - 1, j)), default=float("inf"))
            for j in range(len(sums))
        ]
    return best[-1]


def borders(costs: Sequence[float | int], stages: int, mirrored: bool = False) -> list[int]:
    """Where the best cut lies: stage s holds the pieces from ``borders[s]`` up to ``borders[s + 1]``.

    Args:
        costs: of the pieces, in order, at least 0.
        stages: how many; none is empty.
        mirrored: whether stages s and S − 1 − s lie on one rank; the largest sum of two such is made as small as can
            be, and among cuts that are equal in that the largest stage.

    Raises:
        ConfigError: there are fewer pieces than stages, or mirrored stages of an odd number.
    """
    _refuse(costs, stages)
    if not mirrored:
        return _filled(costs, stages, least_largest(costs, stages))
    require(stages % 2 == 0, "stages", stages, "an even number: each lies on a rank with its mirror image")
    sums = np.array([0.0, *accumulate(map(float, costs))])
    load = _fold(sums, stages // 2, float("inf"))[0]
    return _fold(sums, stages // 2, load * (1 + _ROUNDING))[1]


def _refuse(costs: Sequence[float | int], stages: int) -> None:
    require_integer("stages", stages, 1)
    require(stages <= len(costs), "stages", stages, f"at most the {len(costs)} pieces that compute")


def _filled(costs: Sequence[float | int], stages: int, most: float) -> list[int]:
    """Stages as full as ``most`` allows, from the first on, with a piece left for each that follows."""
    found, load = [0], 0.0
    for at, cost in enumerate(costs):
        left = len(costs) - at  # pieces from this one on, for the stages after the one that is being filled
        if at > found[-1] and (load + cost > most * (1 + _ROUNDING) or left == stages - len(found)):
            found.append(at)
            load = 0.0
        load += cost
    return [*found, len(costs)]


def _fold(sums: np.ndarray, pairs: int, limit: float) -> tuple[float, list[int]]:
    """Pairs of stages taken off both ends, inwards, until nothing is left.

    Without a limit the largest sum of a pair becomes least; with one, no sum exceeds it and the largest stage does.

    Args:
        sums: of the costs before each border. pairs: how many. limit: of a pair's sum.

    Returns:
        the least value, and the borders that reach it.
    """
    count = len(sums) - 1
    value = np.full((count + 1, count + 1), np.inf)  # [pieces off the left end, border of the right end]
    value[0, count] = 0.0
    came: list[dict[tuple[int, int], tuple[int, int]]] = []
    for pair in range(1, pairs + 1):
        after, origin = np.full_like(value, np.inf), {}
        inner = 2 * (pairs - pair)  # stages that still want a piece each
        for i in range(pair, count + 1):
            for j in range(i + inner, count - pair + 1):
                if inner == 0 and i != j:
                    break  # the last pair leaves nothing over
                left, right = sums[i] - sums[:i], sums[j + 1 :] - sums[j]
                both = left[:, None] + right[None, :]
                size = both if limit == np.inf else np.maximum(left[:, None], right[None, :])
                reached = np.where(both <= limit, np.maximum(value[:i, j + 1 :], size), np.inf)
                at = np.unravel_index(reached.argmin(), reached.shape)
                after[i, j] = reached[at]
                origin[i, j] = (int(at[0]), j + 1 + int(at[1]))
        value = after
        came.append(origin)
    middle = min(range(count + 1), key=lambda i: value[i, i])
    outer, here = [], (middle, middle)
    for origin in reversed(came):
        outer.append(here)
        here = origin[here]
    left_side = [0, *(i for i, _ in reversed(outer))]
    right_side = [j for _, j in outer][1:] + [count]
    return float(value[middle, middle]), left_side + right_side


def stage_costs(costs: Sequence[float | int], cut: Sequence[int]) -> list[float]:
    """The cost of each stage of a cut.

    Args:
        costs: of the pieces. cut: from :func:`borders`.
    """
    return [float(sum(costs[begin:end])) for begin, end in pairwise(cut)]
