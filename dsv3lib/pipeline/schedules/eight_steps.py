"""The eight steps of DualPipe, for one rank: the order of the public repository deepseek-ai/DualPipe.

``near`` is the direction that enters the pipeline at the rank's own end (its own 0), ``far`` the other one. With N
ranks to the middle and h = the rank's distance from its end:

    1  F near                  × 2(N − h − 1)      fill
    2  F near, F far           × h + 1             both directions
    3  I far, W far, F far     × N − h − 1         the first gradients; split, because the next rank waits for them
    4  [F near & B far], [F far & B near]
                               × c − 2N + h + 1    the long middle, all overlapped
    5  B far, [F far & B near] × N − h − 1         no forward of the near direction is left
    6  B far, B near           × h + 1             the first h + 1 of these 2(h + 1) whole, then inputs only
    7  W, I near               × N − h − 1         weights that waited fill the gaps
    8  W                       × h + 1             the rest of them, oldest first

On the middle ranks (h = N − 1) the first pair of step 4 is not overlapped, F then B: there the backward pass needs
what the forward pass before it has only just sent.
"""

from __future__ import annotations

from ..actions import Action
from .queue import ActionQueue


def eight_steps(
    depth: int, h: int, microbatches: int, near: int = 0, split_step_6: bool = True
) -> list[Action]:
    """The actions of one rank.

    Args:
        depth: N, ranks from an end of the pipeline to its middle.
        h: the rank's distance from its end, 0 to N − 1.
        microbatches: c, those of one direction; at least 2·N.
        near: the number of the direction (or chunk) that the rank's own end begins with.
        split_step_6: False keeps all backward passes of step 6 whole: what the −3W of the bubble would lose.
    """
    far, do = 1 - near, ActionQueue()
    inner = depth - h - 1
    for _ in range(2 * inner):  # 1
        do.forward(near)
    for _ in range(h + 1):  # 2
        do.forward(near)
        do.forward(far)
    for _ in range(inner):  # 3
        do.split_backward(far)
        do.forward(far)
    for i in range(microbatches - 2 * depth + h + 1):  # 4
        if i == 0 and inner == 0:
            do.forward(near)
            do.backward(far)
        else:
            do.overlapped(near, far)
        do.overlapped(far, near)
    for _ in range(inner):  # 5
        do.backward(far)
        do.overlapped(far, near)
    for i in range(2 * (h + 1)):  # 6
        whole = i < h + 1 or not split_step_6
        (do.backward if whole else do.inputs)(near if i % 2 else far)
    for _ in range(inner):  # 7
        if do.deferred:
            do.oldest_weights()
        do.inputs(near)
    while do.deferred:  # 8
        do.oldest_weights()
    return do.actions
