"""ZBV, the V-shaped zero-bubble schedule: two chunks a rank, down to the last rank and back up, backward split.

Rank r holds chunks r and 2·PP − 1 − r, so rank 0 holds both ends of the model and can start the backward pass of a
micro-batch as soon as its forward pass comes home. With F = I = W a rank does not wait between its first action and
its last. The memory is 1F1B's.
"""

from __future__ import annotations

from ..actions import Action, Schedule, vee
from .queue import ActionQueue


def zbv(stages: int, microbatches: int) -> Schedule:
    """The ZBV schedule.

    Args:
        stages: ranks, at least 1. microbatches: at least 2 · ``stages``.
    """
    actions = [_of_rank(stages, rank, microbatches) for rank in range(stages)]
    return Schedule("zbv", stages, microbatches, actions, vee(stages, microbatches))


def _of_rank(stages: int, rank: int, microbatches: int) -> list[Action]:
    do = ActionQueue()
    for _ in range(2 * (stages - rank) - 1):  # fill: down the V
        do.forward(0)
    for _ in range(rank):  # both arms of the V
        do.forward(1)
        do.forward(0)
    for _ in range(stages - rank):  # the first gradients come up the second arm
        do.forward(1)
        do.split_backward(1)
    while do.count("F", 0) < microbatches:
        do.forward(0)
        do.split_backward(0)
        do.forward(1)
        do.split_backward(1)
    while do.count("F", 1) < microbatches:
        do.split_backward(0)
        do.forward(1)
        do.split_backward(1)
    for _ in range(rank):  # drain: weights wait
        do.inputs(0)
        do.inputs(1)
    for _ in range(stages - rank):
        do.inputs(0)
        do.oldest_weights()
    while do.deferred:
        do.oldest_weights()
    return do.actions
