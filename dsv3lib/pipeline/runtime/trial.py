"""A small model trained by a pipeline of real processes on this machine, to look at: losses, trace, copies, bytes.

    done = trial("dualpipe", stages=4, microbatches=8)     # four processes
    done.timeline                                          # what really happened
    done.simulated                                         # the same schedule at the costs that were measured
    rehearse("dualpipe", 4, 8)                             # the same numbers from threads of this process

All is in FP64, where two sums of the same numbers in another order differ by some 1e-16 and an error by much more.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...config import ModelConfig
from ...model import DeepSeekV3
from ..actions import Schedule
from ..schedules import schedule
from ..simulation import Simulation
from .chunk import MicroBatch
from .engine import Engine, Span, groups_of
from .layout import Layout
from .links import Links, in_threads
from .processes import launch
from .room import require_room
from .timeline import costs_of, simulate_at, timeline
from .worker import Rank

LENGTH, VOCABULARY, RATE = 128, 256, 3e-3
_COUNTED = re.compile(r"(\d+) of \d+: ")


@dataclass(frozen=True)
class Trial:
    """What a run gave.

    Attributes:
        schedule: that was carried out.
        losses: mean over all micro-batches, step by step.
        pids: of each rank's process. peaks: most micro-batches alive on each rank.
        sent_bytes: activations and gradients that each rank sent to another, in all steps.
        spans, cpu: each rank's actions of the last step in time, and their processor time (seconds).
        weights: of each rank, by the whole model's names.
    """

    schedule: Schedule
    losses: list[float]
    pids: list[int]
    peaks: list[int]
    sent_bytes: list[int]
    spans: list[list[Span]]
    cpu: list[list[float]]
    weights: list[dict[str, Tensor]]

    @cached_property
    def timeline(self) -> Simulation:
        """The last step as it was, by the wall clock."""
        return timeline(self.schedule, self.spans)

    @cached_property
    def simulated(self) -> Simulation:
        """The schedule simulated at the costs that this run measured."""
        return simulate_at(self.schedule, costs_of(self.schedule, self.cpu))

    @property
    def drift(self) -> float:
        """The largest difference between two copies of one weight; 0 where copies have stayed equal."""
        first: dict[str, Tensor] = {}
        found = 0.0
        for held in self.weights:
            for name, weight in held.items():
                found = max(found, (weight - first.setdefault(name, weight)).abs().max().item())
        return found


def small_model(stages: int) -> DeepSeekV3:
    """A model of two pieces for each rank, in FP64: blocks, and the head with its MTP module.

    Args:
        stages: ranks of the pipeline.
    """
    config = ModelConfig.preset("nano").replace(num_hidden_layers=2 * stages - 1, vocab_size=VOCABULARY)
    return DeepSeekV3(config, generator=torch.Generator().manual_seed(0)).double()


def micro_batches(count: int) -> list[MicroBatch]:
    """The same random tokens at every call: a model can only learn them by heart."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, VOCABULARY, (1, LENGTH), generator=generator) for _ in range(count)]
    return [MicroBatch(one, one) for one in ids]


def trial(
    name: str = "dualpipe",
    stages: int = 4,
    microbatches: int = 8,
    steps: int = 2,
    on_action: Callable[[int], None] = lambda done: None,
    costs: Sequence[float | int] | None = None,
) -> Trial:
    """Train the small model by ``stages`` processes of this machine.

    Args:
        name: of the schedule. stages, microbatches: its sizes. steps: of the optimiser.
        on_action: called while they run with how many actions have been done since the last call; in all as many as
            the schedule has, times the steps.
        costs: of each piece of the model, for the cut; by default its operations.

    Raises:
        ConfigError: the schedule does not exist in these sizes, or the machine has no memory for the processes.
        TrainingError: a process failed or was ended; it names rank and action.
    """
    plan = schedule(name, stages, microbatches)
    require_room(stages)
    done = [0] * stages

    def seen(doing: Sequence[str]) -> None:
        before = sum(done)
        for rank, words in enumerate(doing):
            if found := _COUNTED.match(words):
                done[rank] = int(found[1])
        on_action(sum(done) - before)

    arguments = (name, stages, microbatches, steps, costs)
    ranks = launch(stages, f"{__name__}:train", arguments, timeout=300, on_poll=seen)
    on_action(steps * sum(map(len, plan.actions)) - sum(done))
    return _together(plan, ranks)


def rehearse(
    name: str = "dualpipe",
    stages: int = 4,
    microbatches: int = 8,
    steps: int = 2,
    links: Callable[[Links], Links] = lambda links: links,
    costs: Sequence[float | int] | None = None,
) -> Trial:
    """The same run by threads of this process: no other process, the same numbers to the last bit.

    Args:
        name, stages, microbatches, steps, costs: as for :func:`trial`.
        links: may change a rank's links to the others.
    """
    made = in_threads(stages, lambda own: _train(lambda _: links(own), name, stages, microbatches, steps, costs))
    return _together(schedule(name, stages, microbatches), made)


def whole(stages: int, microbatches: int) -> float:
    """The loss of the first step by the whole model in one piece, without any pipeline."""
    model, batches = small_model(stages), micro_batches(microbatches)
    with torch.no_grad():
        return sum(model(b.input_ids, labels=b.labels).loss.item() for b in batches) / microbatches


def train(
    rank: Rank, name: str, stages: int, microbatches: int, steps: int, costs: Sequence[float | int] | None
) -> dict[str, Any]:
    """The work of one process."""
    total = steps * len(schedule(name, stages, microbatches).actions[rank.rank])
    done = 0

    def tell(doing: str) -> None:
        nonlocal done
        rank.tell(f"{done} of {total}: {doing}")
        done += "." in doing

    return _train(rank.links, name, stages, microbatches, steps, costs, tell)


def _train(
    links_of: Callable[[Sequence[tuple[int, ...]]], Links],
    name: str,
    stages: int,
    microbatches: int,
    steps: int,
    costs: Sequence[float | int] | None,
    tell: Callable[[str], None] = lambda doing: None,
) -> dict[str, Any]:
    plan, model = schedule(name, stages, microbatches), small_model(stages)
    links = links_of(groups_of(model, plan, Layout(stages), LENGTH, costs))
    engine = Engine(model, plan, Layout(stages), links, LENGTH, tell, costs)
    optimizer = torch.optim.AdamW(engine.parameters.values(), lr=RATE, foreach=False)
    losses, batches = [], iter(micro_batches(microbatches))
    of_routes = [[next(batches) for _ in range(route.microbatches)] for route in plan.routes]
    for _ in range(steps):
        result = engine.step(of_routes)
        engine.clip(1.0)
        optimizer.step()
        losses.append(result.loss)
    return {
        "losses": losses, "pid": os.getpid(), "peak": result.peak_passes, "sent": links.sent_bytes,
        "spans": result.spans, "cpu": result.cpu,
        "weights": {name: p.detach() for name, p in engine.parameters.items()},
    }  # fmt: skip


def _together(plan: Schedule, ranks: list[dict[str, Any]]) -> Trial:
    columns = (
        [one[key] for one in ranks] for key in ("pid", "peak", "sent", "spans", "cpu", "weights")
    )
    return Trial(plan, ranks[0]["losses"], *columns)
