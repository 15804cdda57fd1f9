"""The four ways to balance, side by side: same weights, same text, same order; only the balancing differs.

    outcomes = compare(fresh, TrainingConfig(steps=120), ways=("none", "bias"))
    rich.print(comparison_table(outcomes))

What the runs are asked: how far is the fullest expert over the mean (MaxVio, in each batch and over many),
how evenly are all loaded (entropy), who gets how many tokens, and what did it cost in language-model loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from rich.table import Table
from torch import Tensor

from ...errors import TrainingError
from ...model import DeepSeekV3
from ..run.folder import weights_fingerprint
from ..text.data import PackedStream
from .balance import WAYS, balance_settings, load_entropy, max_violation
from .evaluate import Evaluation
from .settings import TrainingConfig
from .trainer import Record, Trainer

# A model, the text for it, and where the text came from: made anew for each run.
Fresh = Callable[[], tuple[DeepSeekV3, PackedStream, dict[str, Any]]]
TAIL_SHARE = 0.25
"""The last part of a run that its summary looks at: by then balancing has had time to act."""


@dataclass(frozen=True)
class Outcome:
    """What one way to balance came to.

    Attributes:
        way: one of ``balance.WAYS``. start: fingerprint of weights and text, the same for all that are compared.
        records: the steps' records, as the run's log has them. validation: after the last step; ``None`` if
            the settings ask for none. model: the trained model.
    """

    way: str
    start: tuple[str, str]
    records: list[Record]
    validation: Evaluation | None
    model: DeepSeekV3

    @property
    def load(self) -> Int[Tensor, "steps layers E"]:
        """Tokens per expert, by step and mixture layer."""
        return torch.tensor([record["expert_load"] for record in self.records])

    @property
    def batch_violation(self) -> Float[Tensor, "steps layers"]:
        """MaxVio of each single batch: it decides how long the slowest device keeps the others waiting."""
        return max_violation(self.load)

    @property
    def loss(self) -> Float[Tensor, " steps"]:
        """Cross-entropy of the main head in nats per token; no auxiliary loss is in it."""
        return torch.tensor([record["losses"]["main"] for record in self.records], dtype=torch.float64)

    def tail(self) -> Outcome:
        """The same run, its last quarter alone."""
        last = max(1, round(len(self.records) * TAIL_SHARE))
        return dataclasses.replace(self, records=self.records[-last:])

    def global_violation(self) -> Float[Tensor, " layers"]:
        """MaxVio of the load summed over all steps at hand: whether some expert is hardly trained at all."""
        return max_violation(self.load.sum(0))

    def summary(self) -> dict[str, float]:
        """The run's last quarter in five numbers: violations are the mean over layers, losses nats a token."""
        tail = self.tail()
        return {
            "batch_violation": tail.batch_violation.mean().item(),
            "global_violation": tail.global_violation().mean().item(),
            "entropy": load_entropy(tail.load.sum(0)).mean().item(),
            "loss": tail.loss.mean().item(),
            "validation_loss": float("nan") if self.validation is None else self.validation.loss,
        }


def compare(
    fresh: Fresh,
    config: TrainingConfig,
    ways: Sequence[str] = tuple(WAYS),
    *,
    speed: float | None = None,
    alpha: float | None = None,
    out: Path | None = None,
    on_step: Callable[[str, Record], None] | None = None,
) -> list[Outcome]:
    """Train once in each way to balance, all else equal.

    Args:
        fresh: makes the model and the text anew; it must give the same ones every time.
        config: the settings that the runs share; what concerns balance is replaced by each way's own.
        ways: which, in this order.
        speed: γ of "bias". alpha: α of "sequence" and "batch".
        out: a folder in which each run gets a folder of its own, named after its way.
        on_step: called with the way and the record after each step.

    Raises:
        ConfigError: an unknown way, or a number out of range.
        TrainingError: ``fresh`` gave another model or text the second time; a run diverged.
    """
    outcomes: list[Outcome] = []
    for way in ways:
        changes = balance_settings(
            way, speed if way == "bias" else None, alpha if way in ("sequence", "batch") else None
        )
        settings = dataclasses.replace(config, **changes)
        model, stream, source = fresh()
        start = (weights_fingerprint(model), repr(stream.state_dict()))
        refuse_unequal([*outcomes, Outcome(way, start, [], None, model)])
        folder = None if out is None else Path(out) / way
        trainer = Trainer(model, stream, settings, out=folder, source=source)
        records = []
        for record in trainer:
            records.append(record)
            if on_step is not None:
                on_step(way, record)
        if not trainer.finished:
            raise TrainingError(f"{way}: interrupted after step {trainer.steps_done}; nothing to compare")
        outcomes.append(Outcome(way, start, records, trainer.validation, model))
    return outcomes


def refuse_unequal(outcomes: Iterable[Outcome]) -> None:
    """Refuse to compare runs that did not begin alike.

    Raises:
        TrainingError: weights or text differ; it is said which.
    """
    outcomes = list(outcomes)
    for other in outcomes[1:]:
        for what, ours, theirs in zip(("weights", "text"), outcomes[0].start, other.start, strict=True):
            if ours != theirs:
                raise TrainingError(
                    f"{what}: {outcomes[0].way!r} and {other.way!r} did not start from the same, so that their "
                    "difference would say nothing about balance; seed the model and the stream in fresh()"
                )


def comparison_table(outcomes: Sequence[Outcome]) -> Table:
    """The summaries as a table for the terminal."""
    table = Table(
        title=f"the last {TAIL_SHARE:.0%} of each run; MaxVio and entropy are means over the layers"
    )
    for heading in ("balance", "MaxVio per batch", "MaxVio global", "entropy", "loss", "validation loss"):
        table.add_column(heading, justify="left" if heading == "balance" else "right")
    for outcome in outcomes:
        numbers = outcome.summary().values()
        table.add_row(f"{outcome.way}: {WAYS[outcome.way]}", *(f"{value:.3f}" for value in numbers))
    return table
