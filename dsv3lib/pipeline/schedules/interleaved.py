"""Interleaved 1F1B: two chunks a rank, so that the pipeline fills with half a stage at a time.

The model is cut into 2·PP chunks, rank r holds chunks r and PP + r. Micro-batches go in groups of at least PP: a
group passes all ranks with chunk 0, then all ranks with chunk 1; backwards the other way. The bubble is half of
1F1B's, the messages twice as many.
"""

from __future__ import annotations

from ..actions import Action, Schedule, looped

CHUNKS = 2


def interleaved(stages: int, microbatches: int) -> Schedule:
    """The interleaved 1F1B schedule with two chunks a rank.

    Args:
        stages: ranks, at least 1.
        microbatches: at least ``stages``; in equal groups, as small as a divisor allows. A multiple of ``stages`` is
            best: a larger group keeps more activations alive.
    """
    size = next(size for size in range(min(stages, microbatches), microbatches + 1) if microbatches % size == 0)
    groups = microbatches // size
    forwards = [
        Action("F", chunk, group * size + i)
        for group in range(groups)
        for chunk in range(CHUNKS)
        for i in range(size)
    ]
    backwards = [
        Action("B", chunk, group * size + i)
        for group in range(groups)
        for chunk in reversed(range(CHUNKS))
        for i in range(size)
    ]
    actions = []
    for rank in range(stages):
        # Twice the way to the last rank, and a whole group through all chunks but the last.
        ahead = min(2 * (stages - rank - 1) + (CHUNKS - 1) * size, len(forwards))
        row = forwards[:ahead]
        for i, backward in enumerate(backwards):
            row += forwards[ahead + i : ahead + i + 1] + [backward]
        actions.append(row)
    return Schedule("interleaved", stages, microbatches, actions, looped(stages, microbatches, CHUNKS))
