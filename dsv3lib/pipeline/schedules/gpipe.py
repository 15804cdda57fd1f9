"""GPipe: all forward passes, then all backward passes.

Simple, and its peak of live activations is every micro-batch of the step.
"""

from __future__ import annotations

from ..actions import Action, Schedule, straight


def gpipe(stages: int, microbatches: int) -> Schedule:
    """GPipe's schedule.

    Args:
        stages: ranks, at least 1. microbatches: at least 1.
    """
    row = [Action("F", 0, i) for i in range(microbatches)] + [Action("B", 0, i) for i in range(microbatches)]
    return Schedule(
        "gpipe", stages, microbatches, [list(row) for _ in range(stages)], straight(stages, microbatches)
    )
