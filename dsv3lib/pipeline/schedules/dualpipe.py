"""DualPipe: two copies of the model, micro-batches fed from both ends, forward and backward overlapped (paper §3.2.1).

Rank r holds stages r and PP − 1 − r. Half of the micro-batches enter at rank 0 (direction 0), half at the last rank
(direction 1), so that almost always a forward pass of one direction can run beside a backward pass of the other: while
one of them communicates, the other computes. The price is a second copy of the parameters.
"""

from __future__ import annotations

from ..actions import Schedule, both_ways
from .eight_steps import eight_steps


def dualpipe(stages: int, microbatches: int, split_step_6: bool = True) -> Schedule:
    """DualPipe's schedule, from the eight steps.

    Args:
        stages: ranks, PP, even. microbatches: of both directions together, even, at least 2 · ``stages``.
        split_step_6: False keeps all backward passes of step 6 whole (an experiment; the bubble grows).
    """
    actions = []
    for rank in range(stages):
        second_half = rank >= stages // 2  # its own end is the last rank's: direction 1 is near
        h = min(rank, stages - 1 - rank)
        actions.append(eight_steps(stages // 2, h, microbatches // 2, int(second_half), split_step_6))
    return Schedule("dualpipe", stages, microbatches, actions, both_ways(stages, microbatches))
