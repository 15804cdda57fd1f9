"""The training loop: one step is one method that reads like the paper's recipe.

    trainer = Trainer(model, stream, TrainingConfig(steps=200))
    for record in trainer:          # a notebook draws while it trains
        ...

or ``trainer.run()`` with a progress bar. With ``out`` the run has a folder: a log line for every step, save
points, and after a kill at any moment ``Trainer(…, out=folder, resume=True)`` continues to the same losses,
bit for bit, on the same machine: weights, moments, average, the text's place and the random generators are
restored, and the order of every sum with them (threads are part of the settings).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from tqdm.auto import tqdm

from ...errors import InputError, TrainingError
from ...fp8 import Recipe
from ...linear import set_recipe
from ...model import DeepSeekV3
from ...model.loss import LossWeights
from ..run import folder as run_folder
from ..run import log as runlog
from ..run import save_point
from ..run.interrupt import deferred_interrupt
from ..run.progress import show
from ..run.state import load_state, save_state
from ..text.data import Batch, PackedStream
from ..text.tokenizer import Tokenizer
from .average import WeightAverage
from .balance import load_entropy, max_violation, update_bias
from .evaluate import Evaluation, evaluate
from .gradients import Gradients, gradients
from .optimizer import AdamW
from .schedule import Schedule, steps_for_seconds, steps_for_tokens
from .settings import TrainingConfig
from .zero import ShardedAdamW

Record = dict[str, Any]
Callback = Callable[["Trainer", Record], None]
MEASURING_SHARE = 0.1
"""Of a run by the clock, the most that may pass before its length is fixed: a slow machine shows itself soon."""


class Trainer:
    """Trains a model on a stream of text.

    Args:
        model: trained in place, on the device where it is.
        stream: gives the batches.
        config: the run's settings.
        out: the run's folder; without one nothing is written.
        resume: go on with the run in ``out``.
        tokenizer: saved beside the model, by default the stream's.
        source: where the text came from, for whoever resumes the run; written down, not compared.

    Raises:
        TrainingError: ``out`` holds something already; or, resuming, it holds no run or another one.
        CheckpointError: the save point is damaged. SaveError: the folder cannot be written.
    """

    def __init__(
        self,
        model: DeepSeekV3,
        stream: PackedStream,
        config: TrainingConfig,
        out: str | Path | None = None,
        resume: bool = False,
        tokenizer: Tokenizer | None = None,
        source: Record | None = None,
    ) -> None:
        if resume and out is None:
            raise TrainingError("resume: given without the folder of a run (out)")
        self.model, self.stream, self.parameter_counts = model, stream, model.parameter_counts()
        self.out = None if out is None else Path(out)
        self.tokenizer = tokenizer if tokenizer is not None else stream.tokenizer
        recorded = run_folder.read_run(self.out) if resume else None
        self.config = _with_threads(config, recorded)
        self.device = next(model.parameters()).device
        self.steps_done, self.tokens_seen, self.seconds = 0, 0, 0.0
        self.validation: Evaluation | None = None
        self._sequence_seconds: list[float] = []  # of this process's warm-up steps
        self._within_step = False
        if self.config.fp8 is not None:
            model.recipe = Recipe.named(self.config.fp8)
            set_recipe(model, model.recipe)
        model.recipe.refuse(self.device)
        self._prepare()
        self.optimizer, elsewhere = self._make_optimizer()
        decay = self.config.ema_decay
        self.average = WeightAverage(model, decay, leave_out=elsewhere) if decay > 0 else None
        self.schedule = Schedule(self.config, self._given_length())
        self._log: runlog.RunLog | None = None
        if self.out is not None:
            self._open(recorded, source or {})

    # ---- use -----------------------------------------------------------------------------------------

    @property
    def total_steps(self) -> int | None:
        """N; ``None`` while a run by the clock is warming up."""
        return self.schedule.total_steps

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.total_steps is not None and self.steps_done >= self.total_steps

    def __iter__(self) -> Iterator[Record]:
        """Train to the end, yielding each step's record when the step is done.

        Ctrl-C (or Jupyter's interrupt) during a step ends the iteration after that step, with a save point.
        """
        while not self.finished:
            with deferred_interrupt() as interrupt:
                record = self.step()
                if interrupt.requested and not self.finished:
                    self.stop("interrupted")
            yield record
            if interrupt.requested:
                return

    def run(self, callbacks: Iterable[Callback] = (), progress: bool = True) -> Record:
        """Train to the end.

        Args:
            callbacks: called as ``callback(trainer, record)`` after each step.
            progress: show a bar (a widget in a notebook).

        Returns:
            The ``end`` record; its ``reason`` is "finished" or "interrupted".

        Raises:
            TrainingError: a loss or gradient is not finite; the last save point stands.
            SaveError: log or save point cannot be written; the one before stands.
        """
        if self.finished:
            return self._end_record("finished")
        interrupted = True  # the loop below ends early only by an interrupt
        with tqdm(total=self.total_steps, initial=self.steps_done, disable=not progress, unit="step",
                  dynamic_ncols=True) as bar:  # fmt: skip
            try:
                for record in self:
                    show(bar, record, self.total_steps)
                    for callback in callbacks:
                        callback(self, record)
                interrupted = not self.finished
            except KeyboardInterrupt:
                if self._within_step:  # pressed twice: the step is not whole and cannot be saved
                    raise
                if not self.finished:
                    with deferred_interrupt():
                        self.stop("interrupted")
                interrupted = not self.finished
        return self._end_record("interrupted" if interrupted else "finished")

    def step(self) -> Record:
        """One training step, with what is due after it: validation, save point, the end of the run.

        Returns:
            The step's record, as the log has it.

        Raises:
            TrainingError: the run is finished; or a loss or gradient is not finite (weights are untouched).
        """
        if self.finished:
            raise TrainingError(
                f"step {self.steps_done + 1}: the run is finished; its length is {self.total_steps}"
            )
        self._within_step = True
        record = self._train_step()
        self._write(record)
        self._decide_length()
        due = self.config.validate_every is not None and self.steps_done % self.config.validate_every == 0
        if (due or self.finished) and self.config.validation_batches:
            self.validate()
        if self.finished:
            self.stop("finished")
        elif self.config.checkpoint_every is not None and self.steps_done % self.config.checkpoint_every == 0:
            self.save()
        self._within_step = False
        return record

    def validate(self) -> Evaluation:
        """Validation loss of each domain; logged."""
        self.validation = self._evaluate()
        self._write({"kind": "validation", "step": self.steps_done, **self.validation.to_dict()})
        return self.validation

    def stop(self, reason: str) -> None:
        """Save and close the log; the run can be resumed if it is not finished."""
        self.save()
        if self.finished:
            self._save_model()
        self._write(self._end_record(reason))

    # ---- a step --------------------------------------------------------------------------------------

    def _train_step(self) -> Record:
        started = time.perf_counter()
        schedule, step = self.schedule, self.steps_done + 1
        batch = self.stream.next_batch(schedule.batch_size(step))
        self.model.train()
        weights = self.loss_weights(step)
        self.optimizer.zero_grad()
        try:
            found = self._gradients(batch, weights)
        except InputError as error:  # a router met NaN before there was a loss to look at
            raise TrainingError(f"step {step}: {error}; {self._what_stands()}") from error
        for name, value in {**found.losses, "total": found.loss}.items():
            self._refuse_not_finite(step, f"loss ({name})", value)
        self._refuse_not_finite(step, "gradient norm", found.norm)
        self.optimizer.step(schedule.learning_rate(step))
        speed = schedule.bias_speed(step)
        self._update_biases(found.load, speed)
        if self.average is not None:
            self.average.update(self.model)
        self.steps_done = step
        tokens = batch.input_ids.numel()
        self.tokens_seen += tokens
        elapsed = self._agreed(time.perf_counter() - started)
        self.seconds += elapsed
        if self.total_steps is None:
            self._sequence_seconds.append(elapsed / len(batch.input_ids))
        return {
            "kind": "step",
            "step": step,
            "tokens": self.tokens_seen,
            "loss": found.loss,
            "losses": found.losses,
            "learning_rate": schedule.learning_rate(step),
            "gradient_norm": found.norm,
            "batch_size": len(batch.input_ids),
            "mtp_loss_weight": weights.mtp,
            "bias_speed": speed,
            "expert_load": found.load.tolist(),
            "domain_load": found.domain_load,
            "max_violation": max_violation(found.load).tolist(),
            "load_entropy": load_entropy(found.load).tolist(),
            "seconds": elapsed,
            "tokens_per_second": tokens / elapsed,
            **found.more,
        }

    # What a run over several ranks does in another way (``run/parallel.py``).

    def _prepare(self) -> None:
        """The last moment before optimizer and average take hold of the model's parameters."""

    def _make_optimizer(self) -> tuple[AdamW | ShardedAdamW, frozenset[str]]:
        """The optimizer, and which parameters another rank updates and averages."""
        return AdamW.of(self.config, self.model.named_parameters()), frozenset()

    def _gradients(self, batch: Batch, weights: LossWeights) -> Gradients:
        return gradients(self.model, batch, weights, self.config.gradient_clip, self.stream.domain_names)

    def _update_biases(self, load: Int64[Tensor, "layers E"], speed: float) -> None:
        for router, router_load in zip(self.model.routers(), load, strict=True):
            update_bias(router, router_load, speed, centre=self.config.centre_bias)

    def _evaluate(self) -> Evaluation:
        return evaluate(self.model, self.stream, self.config.validation_batches)

    def _agreed(self, value: float | int) -> float | int:
        """A measured time, on which the run's length may depend."""
        return value

    def _describe(self, source: Record) -> Record:
        return run_folder.describe_run(self.model, self.stream, self.config, source)

    def loss_weights(self, step: int) -> LossWeights:
        """λ and α of a step; the model's own α where the settings leave it.

        Args:
            step: from 1.
        """
        alpha = self.model.aux_loss_alpha if self.config.aux_loss_alpha is None else self.config.aux_loss_alpha
        return LossWeights(self.schedule.mtp_loss_weight(step), alpha, self.config.aux_loss_over)

    def _refuse_not_finite(self, step: int, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise TrainingError(
                f"step {step}: {what} is {value}, expected a finite number; {self._what_stands()}. A lower "
                "learning rate or a longer warm-up is the usual way out"
            )

    def _what_stands(self) -> str:
        kept = None if self.out is None else save_point.latest_savepoint(self.out)
        where = f"the last save point is {kept}" if kept else "there is no save point yet"
        return f"the weights were not changed by this step, {where}"

    # ---- the run's length ----------------------------------------------------------------------------

    def _given_length(self) -> int | None:
        if self.config.tokens is not None:
            return steps_for_tokens(self.config, self.stream.seq_len, self.config.tokens)
        return self.config.steps

    def _decide_length(self) -> None:
        """Fix the length of a run by the clock once it is measured, on the disk before in memory."""
        config = self.config
        if self.total_steps is not None:
            return
        budget = config.minutes * 60.0
        if config.decide_at is not None:
            if self.steps_done < config.warmup_steps or self.seconds < config.decide_at * budget:
                return
        elif self.steps_done < config.warmup_steps and self.seconds < MEASURING_SHARE * budget:
            return
        recent = self._sequence_seconds[len(self._sequence_seconds) // 2 :]  # the first steps are slower
        total = steps_for_seconds(config, self.steps_done, budget - self.seconds, median(recent))
        if self._log is not None:
            run_folder.record_length(self.out, total, self.steps_done)
        self.schedule = Schedule(config, total, self.steps_done)
        self._write_plan()

    def _write_plan(self) -> None:
        self._write({"kind": "plan", "step": self.steps_done, "total_steps": self.total_steps})

    # ---- the run's folder ----------------------------------------------------------------------------

    def _open(self, recorded: Record | None, source: Record) -> None:
        now = self._describe(source)
        if recorded is None:
            run_folder.begin_run(self.out, now, {"kind": "header", **now}, self.tokenizer)
        else:
            self._go_on(recorded, now)
            runlog.cut_log(self.out, self.steps_done)
            save_point.remove_outdated(self.out, self.config.keep_checkpoints)
        self._log = runlog.RunLog(self.out / runlog.FILE_NAME)
        if self.total_steps is not None and runlog.read_log(self.out).plan is None:
            self._write_plan()
        if self.finished:
            self._save_model()

    def _go_on(self, recorded: Record, now: Record) -> None:
        """Put the trainer where the run's last save point found it."""
        found = save_point.latest_savepoint(self.out)
        run_folder.refuse_another_run(recorded, now, with_weights=found is None)
        run_folder.warn_of_other_versions(recorded, now)
        if recorded["total_steps"] is not None:
            self.schedule = Schedule(self.config, recorded["total_steps"], recorded["decided_after"])
        if found is not None:
            self._load_state(found)

    def _load_state(self, folder: Path) -> None:
        load_state(self, folder)

    def save(self) -> Path | None:
        """Write a save point and remove those that are too old; without a folder do nothing.

        Raises:
            SaveError: it cannot be written; those before stand, and the log too.
        """
        if self.out is None:
            return None
        self._log.sync()  # a save point must never know of a step that the log does not
        target = save_point.savepoint_folder(self.out, self.steps_done)
        if not target.exists():
            save_point.write_folder(target, self._fill)
        save_point.remove_outdated(self.out, self.config.keep_checkpoints)
        return target

    def _fill(self, folder: Path) -> None:
        self._fill_model(folder)
        save_state(self, folder / "training")

    def _fill_model(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save(folder)

    def _save_model(self) -> None:
        if self.out is not None and not (self.out / run_folder.MODEL_FOLDER).exists():
            save_point.write_folder(self.out / run_folder.MODEL_FOLDER, self._fill_model)

    def _write(self, record: Record) -> None:
        if self._log is not None:
            self._log.write(record)

    def _end_record(self, reason: str) -> Record:
        return {"kind": "end", "step": self.steps_done, "reason": reason, "seconds": self.seconds}


def _with_threads(config: TrainingConfig, recorded: Record | None) -> TrainingConfig:
    """Settle the number of threads: as given, else as recorded, else torch's own."""
    threads = config.threads
    if threads is None and recorded is not None:
        threads = run_folder.recorded_config(recorded).threads
    threads = threads or torch.get_num_threads()
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    return dataclasses.replace(config, threads=threads)
