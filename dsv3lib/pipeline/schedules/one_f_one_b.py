"""1F1B: a few forward passes to fill the pipeline, then one forward and one backward in turn, then the rest.

Rank r runs PP − r − 1 forward passes ahead, so at most PP − r micro-batches are alive there, however many the step has.
"""

from __future__ import annotations

from ..actions import Action, Schedule, straight


def one_f_one_b(stages: int, microbatches: int) -> Schedule:
    """The 1F1B schedule.

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
            row.append(Action("B", 0, i))
        actions.append(row)
    return Schedule("1f1b", stages, microbatches, actions, straight(stages, microbatches))
