"""ZB1P, the memory-equal zero-bubble schedule (ZB-H1): 1F1B with the backward pass split.

Only the inputs' part I of a backward pass is waited for by the rank before. The weights' part W can come later: rank r
puts it off by r micro-batches, so every rank has work left for the time in which 1F1B would wait at the end. What is
put off stays alive: PP micro-batches on every rank.
"""

from __future__ import annotations

from ..actions import Action, Schedule, straight


def zb1p(stages: int, microbatches: int) -> Schedule:
    """The ZB1P schedule.

    Args:
        stages: ranks, at least 1. microbatches: at least 1.
    """
    actions = []
    for rank in range(stages):
        ahead = min(stages - rank - 1, microbatches)
        row = [Action("F", 0, i) for i in range(ahead)]
        for i in range(microbatches):
            if ahead + i < microbatches:
                row.append(Action("F", 0, ahead + i))
            row.append(Action("I", 0, i))
            if i >= rank:
                row.append(Action("W", 0, i - rank))
        done = max(microbatches - rank, 0)
        actions.append(row + [Action("W", 0, i) for i in range(done, microbatches)])
    return Schedule("zb1p", stages, microbatches, actions, straight(stages, microbatches))
