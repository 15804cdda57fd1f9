"""What changes during a run: learning rate, batch size, λ of the MTP loss and γ of the bias update (§4.2).

Step s counts from 1. The warm-up is W steps long and knows nothing of the run's length N; what comes after is a
function of the share (s − D − 1) / (N − D). Where N is given, D is W. A run by the clock trains at once, measures
itself, and fixes N after step D: at the end of the warm-up, or when a tenth of its time is gone, whichever comes
first; with ``decide_at``, when that share of its time is gone. N and D are written down before step D + 1:
whoever resumes the run, at any step, finds either no N and no step that needed it, or the N that every later
step used.

*Differs from the paper*: shares are of steps after the warm-up, the paper's of tokens. At its sizes (2000 of
about 240,000 steps) the two are alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...errors import TrainingError
from .settings import TrainingConfig


@dataclass(frozen=True)
class Schedule:
    """The four curves of a run.

    Args:
        config: the run's settings.
        total_steps: N; ``None`` while a run by the clock has not decided it (then only s ≤ W is known).
        decided_after: D; ``None`` is W.
    """

    config: TrainingConfig
    total_steps: int | None
    decided_after: int | None = None

    def share(self, step: int) -> float:
        """Share of the run after step D that lies before ``step``: 0 up to D, below 1 to the end.

        Raises:
            TrainingError: the step lies after the warm-up and the length of the run is not decided.
        """
        begin = self.config.warmup_steps if self.decided_after is None else self.decided_after
        # By the clock with a late decision: all is constant until N is known, whatever the step.
        late = self.config.decide_at is not None and self.total_steps is None
        if step <= begin or late:
            return 0.0
        if self.total_steps is None:
            raise TrainingError(f"step {step}: the run's length must be decided by step {begin}, it is not")
        return (step - begin - 1) / max(1, self.total_steps - begin)

    def learning_rate(self, step: int) -> float:
        """Linear rise, constant, cosine, rest and tail.

        With p the share and x = (p − constant) / cosine, the cosine phase is
        peak·(r + (1 − r)·(1 + cos πx) / 2), r the rest's ratio.
        """
        config = self.config
        peak = config.learning_rate * min(1.0, step / config.warmup_steps)
        share, constant = self.share(step), config.constant_share
        cosine_end = constant + config.cosine_share
        if share < constant:
            ratio = 1.0
        elif share < cosine_end:
            x = (share - constant) / config.cosine_share
            ratio = config.rest_ratio + (1.0 - config.rest_ratio) * (1.0 + math.cos(math.pi * x)) / 2.0
        elif share < cosine_end + config.rest_share:
            ratio = config.rest_ratio
        else:
            ratio = config.tail_ratio
        return peak * ratio

    def batch_size(self, step: int) -> int:
        """Sequences in this step: a straight line from the starting size to the whole, then constant."""
        config = self.config
        done = 1.0 if step > config.batch_warmup_steps else (step - 1) / config.batch_warmup_steps
        return round(config.batch_size_start + (config.batch_size - config.batch_size_start) * done)

    def mtp_loss_weight(self, step: int) -> float:
        """λ: its first value while the learning rate is constant, its late one from then on."""
        early = self.share(step) < self.config.constant_share
        return self.config.mtp_loss_weight if early else self.config.mtp_loss_weight_late

    def bias_speed(self, step: int) -> float:
        """γ until the cosine has ended, then 0: the last steps train with a still router bias."""
        moving = self.share(step) < self.config.constant_share + self.config.cosine_share
        return self.config.bias_speed if moving else 0.0


def steps_for_tokens(config: TrainingConfig, sequence_length: int, tokens: int) -> int:
    """The fewest steps that see at least ``tokens`` tokens, the growing batch counted."""
    return _steps_until(config, tokens / sequence_length, at_least=True)


def steps_for_seconds(
    config: TrainingConfig, steps_done: int, seconds_left: float, seconds_per_sequence: float
) -> int:
    """The length N of a run by the clock: what is done plus what fits, and at least one step more."""
    done = sum(Schedule(config, None).batch_size(step) for step in range(1, steps_done + 1))
    budget = done + max(0.0, seconds_left) / seconds_per_sequence
    return max(steps_done + 1, _steps_until(config, budget, at_least=False))


def _steps_until(config: TrainingConfig, sequences: float, at_least: bool) -> int:
    schedule, step, seen = Schedule(config, None), 0, 0
    while step < config.batch_warmup_steps and seen < sequences:
        step += 1
        seen += schedule.batch_size(step)
    if seen < sequences:  # every further step is a whole batch
        more = (sequences - seen) / config.batch_size
        return step + (math.ceil(more) if at_least else math.floor(more))
    return step if at_least or seen == sequences else step - 1
