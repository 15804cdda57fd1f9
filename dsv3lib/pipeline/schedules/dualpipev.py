"""DualPipeV: DualPipe cut in half and folded into a V, so that each rank keeps one copy of its parameters.

Rank r of PP holds chunks r and 2·PP − 1 − r of a model in 2·PP chunks, and plays rank r of a DualPipe with 2·PP ranks:
what was the other direction there is the second arm of the V here, and the middle ranks' neighbour is the rank itself.
"""

from __future__ import annotations

from ..actions import Schedule, vee
from .eight_steps import eight_steps


def dualpipev(stages: int, microbatches: int) -> Schedule:
    """DualPipeV's schedule.

    Args:
        stages: ranks, at least 1. microbatches: at least 2 · ``stages``.
    """
    actions = [eight_steps(stages, rank, microbatches) for rank in range(stages)]
    return Schedule("dualpipev", stages, microbatches, actions, vee(stages, microbatches))
