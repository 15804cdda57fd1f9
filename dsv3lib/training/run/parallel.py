"""A training run over several ranks: the ``Trainer`` whose forward and backward pass are the pipeline's.

Every rank has a trainer and reads the same text; a step's batch is cut into micro-batches, the same ones whatever the
layout, so that a run can go on at another. Rank 0 alone writes: log, settings, and the rest of each save point. All
that decides what comes next (losses, loads, the measured time, Ctrl-C) is the same on every rank before it is acted on.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from ...checks import require
from ...config import ModelConfig
from ...errors import ConfigError, ScheduleError, TrainingError
from ...model import DeepSeekV3
from ...model.loss import LossWeights
from ...parallel.wires import Flight
from ...pipeline import schedule
from ...pipeline.actions import Action
from ...pipeline.actions import Schedule as PipelineSchedule
from ...pipeline.runtime.chunk import MicroBatch
from ...pipeline.runtime.engine import Engine, Span, groups_of
from ...pipeline.runtime.forward_only import forward_only
from ...pipeline.runtime.layout import Layout, parts_of_ranks
from ...pipeline.runtime.measure import piece_seconds
from ...pipeline.runtime.trace import write_chrome_trace
from ...pipeline.runtime.worker import Rank
from ..loop.balance import update_bias
from ..loop.evaluate import Evaluation, evaluate
from ..loop.gradients import Gradients
from ..loop.optimizer import AdamW
from ..loop.schedule import Schedule
from ..loop.settings import TrainingConfig
from ..loop.trainer import Record, Trainer
from ..loop.zero import ShardedAdamW, refuse_unequal_copies
from ..text.data import Batch, PackedStream
from . import folder as run_folder
from . import save_point, sharded
from .state import STATE_FOLDER, load_counters, save_counters

MOMENTS = "moments"
TRACE_FILE = "trace.json"
CUTS = ("operations", "measured")
"""Ways to cut a model into stages; by default the one with the same numbers on every machine."""
_MEASUREMENTS = 3
"""Runs of each piece: the other ranks wait meanwhile."""
_TRACED_STEPS = 4
_WORDS = {
    "F": "forward", "B": "backward", "I": "backward for inputs", "W": "backward for weights", "FB": "overlapped pair",
}  # fmt: skip


@dataclass(frozen=True)
class Parallel:
    """How a run is spread over ranks.

    Args:
        layout: dp x pp x ep. schedule: of the pipeline.
        microbatches: of a whole step, all directions and replicas together.
        recompute: make norms and up-projections again in backward.
        cut: into stages of equally many "operations", or of equal processor time, "measured".
        costs: of each piece of the model, in seconds, where they have been measured; so the run goes on with its own.

    Raises:
        ConfigError: there is no such cut, or operations with costs.
    """

    layout: Layout
    schedule: str
    microbatches: int
    recompute: bool = False
    cut: str = CUTS[0]
    costs: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        require(self.cut in CUTS, "cut", self.cut, f"one of {', '.join(CUTS)}")
        require(self.costs is None or self.cut == "measured", "costs", self.costs, "none where operations are counted")

    @property
    def pipeline(self) -> PipelineSchedule:
        """Each replica's list of actions.

        Raises:
            ConfigError: there is no such schedule, or not of these numbers.
        """
        require(
            self.microbatches % self.layout.replicas == 0, "microbatches", self.microbatches,
            f"a multiple of ep x dp = {self.layout.ep} x {self.layout.dp} (of the whole step)",
        )  # fmt: skip
        return schedule(self.schedule, self.layout.pp, self.microbatches // self.layout.replicas)

    def refuse(self, model: ModelConfig, training: TrainingConfig, sequence: int) -> None:
        """Refuse what cannot run, before anything is opened or started.

        Args:
            model, training: the run's. sequence: tokens of a sequence.

        Raises:
            ConfigError: names the number that does not fit.
        """
        self.layout.cluster(model)
        parts_of_ranks(model, self.pipeline, sequence, self.costs)
        growing = Schedule(training, 1)
        for step in range(1, training.batch_warmup_steps + 2):
            size = growing.batch_size(step)
            require(
                size % self.microbatches == 0, f"batch size of step {step}", size,
                f"a multiple of the step's {self.microbatches} micro-batches",
            )  # fmt: skip

    def to_dict(self) -> Record:
        """As JSON knows it."""
        return {
            "layout": str(self.layout), "schedule": self.schedule, "microbatches": self.microbatches,
            "recompute": self.recompute, "cut": self.cut, "costs": None if self.costs is None else list(self.costs),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, fields: Record) -> Parallel:
        """From a run's description."""
        costs = fields.get("costs")
        costs = None if costs is None else tuple(costs)
        return cls(**{**fields, "layout": Layout.parse(fields["layout"]), "costs": costs})


class ParallelTrainer(Trainer):
    """Trains over several ranks; each makes one with the same arguments.

    Args:
        model: whole, with the same weights on every rank; this rank keeps its part. stream: the same text on all.
        config: the run's settings. parallel: layout, schedule, micro-batches. rank: which of them this is.
        asked_to_stop: whether somebody wants the run to end after this step.
        trace: keep ``RUN/trace.json``, what each rank did when in the latest steps, for chrome://tracing.
        **of_trainer: ``out``, ``resume``, ``tokenizer``, ``source``, as for ``Trainer``. ``out`` is one folder that all
            ranks see.

    Raises:
        ConfigError: the numbers do not fit, or the ranks have other settings, weights or text than one another.
        TrainingError, CheckpointError, SaveError: as for ``Trainer``.
    """

    def __init__(
        self,
        model: DeepSeekV3,
        stream: PackedStream,
        config: TrainingConfig,
        parallel: Parallel,
        rank: Rank,
        asked_to_stop: Callable[[], bool] = lambda: False,
        trace: bool = False,
        **of_trainer: Any,
    ) -> None:
        self.parallel, self._member, self._asked_to_stop = parallel, rank, asked_to_stop
        # Of each step, of each rank: its actions, its blocks' stages, its exchanges with other experts' ranks.
        self._spans: deque[list[tuple[list[Span], list[Span], list[Flight]]]] | None = (
            deque(maxlen=_TRACED_STEPS) if trace else None
        )
        parallel.layout.refuse_world(rank.world)
        parallel.refuse(model.config, config, stream.seq_len)
        super().__init__(model, stream, config, **of_trainer)

    # ---- before the first step ---------------------------------------------------------------------------

    def _prepare(self) -> None:
        self.model.recompute = self.parallel.recompute
        self._initial_weights = run_folder.weights_fingerprint(self.model)
        member, plan = self._member, self.parallel.pipeline
        self._refuse_other_ranks()
        if self.parallel.cut == "measured" and self.parallel.costs is None:
            self.parallel = replace(self.parallel, costs=self._measured())
        layout, sequence, costs = self.parallel.layout, self.stream.seq_len, self.parallel.costs
        self.links = member.links(groups_of(self.model, plan, layout, sequence, costs))
        self.engine = Engine(self.model, plan, layout, self.links, sequence, self._tell, costs)

    def _measured(self) -> tuple[float, ...]:
        """What each piece of the model costs rank 0, told to all: ranks that each measured would cut differently."""
        self._tell("measuring")
        mine = ()
        if self._member.rank == 0:
            shape = (max(1, self.config.batch_size // self.parallel.microbatches), self.stream.seq_len)
            ids = torch.randint(self.model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
            found = piece_seconds(self.model, MicroBatch(ids, ids, torch.zeros_like(ids)), _MEASUREMENTS)
            mine = tuple(piece.total for piece in found)
        return self._member.gather_objects(mine)[0]

    def _refuse_other_ranks(self) -> None:
        """Settings are compared before ranks form groups by them."""
        mine = super()._describe({}) | {"initial_weights": self._initial_weights, "parallel": self.parallel.to_dict()}
        compared = ("parallel", "training", "model", "stream", "recipe", "initial_weights")
        every = self._member.gather_objects({name: mine[name] for name in compared})
        for rank, other in enumerate(every):
            for part in compared:
                found = run_folder.first_difference(every[0][part], other[part], part)
                if found is not None:
                    name, first, here = found
                    raise ConfigError(
                        f"{name}: rank {rank} has {here!r}, rank 0 has {first!r}; start all ranks with the same "
                        "command, on the same text"
                    )

    def _describe(self, source: Record) -> Record:
        described = super()._describe(source)
        return described | {"initial_weights": self._initial_weights, "parallel": self.parallel.to_dict()}

    def _open(self, recorded: Record | None, source: Record) -> None:
        self._tell("opening the run's folder")
        if self.links.rank == 0:
            super()._open(recorded, source)
        elif recorded is not None:
            self._go_on(recorded, self._describe(source))
        steps = self.links.gather_objects(self.steps_done)
        if len(set(steps)) > 1 or not (self.out / run_folder.RUN_FILE).exists():
            raise ConfigError(
                f"out: {self.out} holds the run on rank 0 and is another folder on rank {self.links.rank}; give all "
                "machines one shared folder"
            )

    def _load_state(self, folder: Path) -> None:
        sharded.read_model(self.model, folder)
        moments = folder / STATE_FOLDER / MOMENTS
        sharded.read_shards(self._state_tensors(), moments, "optimizer state")
        load_counters(self, folder / STATE_FOLDER)

    def _state_tensors(self) -> dict[str, Tensor]:
        tensors = self.optimizer.state_tensors()
        if self.average is not None:
            tensors |= {f"average.{name}": tensor for name, tensor in self.average.tensors.items()}
        return sharded.split_by_name(self.model, tensors)

    def _make_optimizer(self) -> tuple[ShardedAdamW, frozenset[str]]:
        make = partial(AdamW.of, self.config)
        optimizer = ShardedAdamW(self.engine.parameters, self.engine.holders, self.links.process_group, make)
        return optimizer, optimizer.elsewhere

    def state_bytes(self) -> list[tuple[int, int]]:
        """Of each rank: bytes of moments, masters and averaged weights here, and what all of its copies' would be.

        All ranks call it.
        """
        whole = self.optimizer.unsharded_bytes()
        if self.average is not None:
            whole += sum(4 * p.numel() for p in self.engine.parameters.values())  # FP32
        return self.links.gather_objects((sum(t.nbytes for t in self._state_tensors().values()), whole))

    # ---- steps -------------------------------------------------------------------------------------------

    def _tell(self, doing: str) -> None:
        self._member.tell(f"step {self.steps_done + 1}: {in_words(doing)}")

    def __iter__(self) -> Iterator[Record]:
        """Train to the end, or until a rank is asked to stop; all ranks end after the same step."""
        while not self.finished:
            record = self.step()
            stop = any(self.links.gather_objects(self._asked_to_stop()))
            if stop and not self.finished:
                self.stop("interrupted")
            yield record
            if stop:
                return

    def _gradients(self, batch: Batch, weights: LossWeights) -> Gradients:
        self._refuse_other_text(batch)
        result = self.engine.step(self._shared_out(batch), weights)
        self._tell("clipping")
        norm = self.engine.clip(self.config.gradient_clip)
        self._tell("optimizer")
        if self._spans is not None:
            flights = [] if result.experts is None else result.experts.flights
            self._spans.append(self.links.gather_objects((result.spans, result.stages, flights)))
        layers, experts = self.model.config.moe_layers, self.model.config.n_routed_experts
        load = _by_layer(result.loads, layers, experts)
        names, domains = self.stream.domain_names, batch.domain_ids[:, 0]  # a row is of one domain
        by_domain = {
            name: _by_layer(
                {layer: rows[domains == which].sum(0) for layer, rows in result.loads_of_rows.items()}, layers, experts
            ).tolist()
            for which, name in enumerate(names)
        }
        of_ranks = [
            {str(layer): counted.tolist() for layer, counted in sorted(of_rank.items())}
            for of_rank in result.loads_of_ranks
        ]
        return Gradients(result.loss, result.losses, norm, load, by_domain, {"rank_load": of_ranks})

    def _shared_out(self, batch: Batch) -> list[list[MicroBatch]]:
        """This replica's micro-batches, by route."""
        rows = len(batch.input_ids) // self.parallel.microbatches
        columns = (batch.input_ids, batch.labels, batch.document_ids)
        every = [MicroBatch(*part) for part in zip(*(t.split(rows) for t in columns), strict=True)]
        begin = self.engine.replica * self.engine.schedule.microbatches
        routes = []
        for route in self.engine.schedule.routes:
            routes.append(every[begin : begin + route.microbatches])
            begin += route.microbatches
        return routes

    def _refuse_other_text(self, batch: Batch) -> None:
        self._tell("comparing text")
        mine = zlib.crc32(batch.document_ids.numpy().tobytes(), zlib.crc32(batch.input_ids.numpy().tobytes()))
        for rank, other in enumerate(self.links.gather_objects(mine)):
            if other != mine:
                raise TrainingError(
                    f"step {self.steps_done + 1}: rank {rank} has read other text than rank {self.links.rank}; all "
                    "ranks must read the same files, unchanged while the run lasts"
                )

    def _update_biases(self, load: Int64[Tensor, "layers E"], speed: float | int) -> None:
        for layer, of_layer in zip(self.model.config.moe_layers, load, strict=True):
            block = self.model.model.layers[layer]
            if hasattr(block, "mlp"):  # this rank has the layer
                update_bias(block.mlp.gate, of_layer, speed, centre=self.config.centre_bias)

    def _agreed(self, value: float | int) -> float | int:
        return self.links.gather_objects(value)[0]

    def _evaluate(self) -> Evaluation:
        self._tell("validating")
        layers, experts = self.model.config.moe_layers, self.model.config.n_routed_experts

        def forward(batch: Batch) -> tuple[float, Tensor]:
            losses, loads = forward_only(self.engine, MicroBatch(batch.input_ids, batch.labels, batch.document_ids))
            return losses["main"], _by_layer(loads, layers, experts)

        return evaluate(self.model, self.stream, self.config.validation_batches, forward=forward)

    # ---- what is written ---------------------------------------------------------------------------------

    def save(self) -> Path | None:
        """Write a save point, each rank its part; without a folder do nothing.

        Raises:
            SaveError: it cannot be written; those before stand, and the log too.
            TrainingError: ranks that hold the same weights hold different ones; nothing is written.
        """
        if self.out is None:
            return None
        self._tell("saving")
        refuse_unequal_copies(self.engine.parameters, self.engine.holders, self.links)
        target = save_point.savepoint_folder(self.out, self.steps_done)
        if self.links.gather_objects(not target.exists())[0]:
            if self.links.rank == 0:
                super().save()
            else:
                self._write_shards(save_point.unfinished_folder(target))
            self.links.gather_objects(None)  # it has its name: whatever comes now, it stands
        if self._spans and self.links.rank == 0:
            columns = (
                [[one for step in self._spans for one in step[rank][column]] for rank in range(self.links.world)]
                for column in range(3)
            )
            write_chrome_trace(self.out / TRACE_FILE, *columns)
        return target

    def _fill(self, folder: Path) -> None:
        self._write_shards(folder)
        sharded.write_index(folder)
        sharded.write_config(self.model, folder)
        self.tokenizer.save(folder)
        save_counters(self, folder / STATE_FOLDER)

    def _write_shards(self, folder: Path) -> None:
        self.links.gather_objects(None)  # rank 0 has made the folder
        sharded.write_shards(sharded.model_tensors(self.model), folder)
        sharded.write_shards(self._state_tensors(), folder / STATE_FOLDER / MOMENTS)

    def _fill_model(self, folder: Path) -> None:
        DeepSeekV3.from_pretrained(save_point.latest_savepoint(self.out)).save_pretrained(folder)
        self.tokenizer.save(folder)

    def _save_model(self) -> None:
        if self._member.rank == 0:
            super()._save_model()


def in_words(doing: str) -> str:
    """What a rank does, for people: "F0.2" is "forward of micro-batch 2, direction 0 (F0.2)"."""
    try:
        action = Action.parse(doing)
    except ScheduleError:
        return doing
    singles = [
        f"{_WORDS[one.kind]} of micro-batch {one.microbatch}, direction {one.direction}" for one in action.singles()
    ]
    return f"{' and '.join(singles)} ({doing})"


def _by_layer(loads: dict[int, Tensor], layers: tuple[int, ...] | range, experts: int) -> Int64[Tensor, "layers E"]:
    """Loads by layer as one table; a layer that did not run has zeros."""
    nothing = torch.zeros(experts, dtype=torch.int64)
    return torch.stack([loads.get(layer, nothing).cpu() for layer in layers])
