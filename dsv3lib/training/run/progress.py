"""What a training run says in a terminal: its beginning, a bar and some lines of losses, and its end."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm.auto import tqdm

from ...model import DeepSeekV3
from ..text.mixture import MAX_PASSES
from . import folder as run_folder

if TYPE_CHECKING:
    from ..loop.evaluate import Evaluation
    from ..loop.trainer import Record, Trainer

LINES = 12
"""How many lines of losses a run prints, about."""
_SAMPLES, _PROMPT_TOKENS, _SAMPLE_TOKENS, _TEMPERATURE = 3, 12, 48, 0.7


def show(bar: tqdm, record: Record, total: int | None) -> None:
    """Move the bar on by one step.

    Args:
        bar: of steps. record: the step's. total: steps of the run, if it is known.
    """
    bar.total = total
    loss = record["losses"].get("main", record["loss"])  # where the main model learns, its own says most
    bar.set_postfix_str(
        f"loss {loss:.3f}, MaxVio {max(record['max_violation'], default=0.0):.2f}, "
        f"{record['tokens_per_second']:,.0f} tokens/s", refresh=False,
    )  # fmt: skip
    bar.update()


def introduce(console: Console, trainer: Trainer) -> None:
    """What is trained, on what, for how long and where."""
    counts, config = trainer.parameter_counts, trainer.config
    length = f"{trainer.total_steps} steps" if trainer.total_steps else f"{config.minutes:g} minutes"
    console.print(
        f"DeepSeek-V3, {counts['main'] / 1e6:.1f}M parameters ({counts['active'] / 1e6:.1f}M active a token), "
        f"MTP {counts['mtp'] / 1e6:.1f}M more, on {trainer.device.type}, {config.threads} threads\n"
        f"text: {', '.join(trainer.stream.domain_names)}\n"
        f"{length}, {config.batch_size} x {trainer.stream.seq_len} tokens a step, run folder {trainer.out}",
        highlight=False,
    )
    if trainer.steps_done:
        console.print(f"resumed after step {trainer.steps_done}", highlight=False)


class Lines:
    """Prints a line of losses about a dozen times a run, above the progress bar."""

    def __init__(self, trainer: Trainer) -> None:
        self._next = trainer.steps_done + 1
        self._exhausted = {n for n, passes in trainer.stream.passes().items() if passes > MAX_PASSES}

    def __call__(self, trainer: Trainer, record: Record) -> None:
        for name, passes in trainer.stream.passes().items():
            if passes > MAX_PASSES and name not in self._exhausted:
                self._exhausted.add(name)
                tqdm.write(
                    f"domain {name} is exhausted: read {MAX_PASSES:g} times, more of it teaches little",
                    sys.stdout,
                )
        step, total = record["step"], trainer.total_steps
        if step < self._next and step != total:
            return
        self._next = step + max(1, (total or trainer.config.warmup_steps * LINES // 2) // LINES)
        parts = [f"{name} {value:.3f}" for name, value in record["losses"].items() if name != "balance"]
        tqdm.write(
            f"step {step:>5}{f'/{total}' if total else '':6} loss {record['loss']:.3f}  {'  '.join(parts)}  "
            f"MaxVio {max(record['max_violation'], default=0.0):.2f}  lr {record['learning_rate']:.1e}  "
            f"{record['tokens_per_second']:,.0f} tokens/s",
            file=sys.stdout,
        )
        sys.stdout.flush()


def conclude(console: Console, trainer: Trainer, model: DeepSeekV3 | None = None) -> None:
    """What the model has become: validation, some text of its own, and where it is.

    Args:
        console: to print on. trainer: of the finished run. model: whole, where the trainer's is not.
    """
    if trainer.validation is not None and trainer.validation.domains:
        console.print(validation_table(trainer.validation))
    for name, prompt, written in samples(trainer, model or trainer.model):
        console.print(Text.assemble((f"\n{name}: ", "bold"), (prompt, "dim"), written))
    folder = shlex.quote(str(trainer.out / run_folder.MODEL_FOLDER))
    console.print(f"\nThe model is in {folder}; let it write: dsv3 generate {folder}", highlight=False)


def validation_table(evaluation: Evaluation) -> Table:
    """Loss and bits per byte by domain, as a table."""
    table = Table(title="validation, on documents that training never saw")
    for heading in ("domain", "loss (nats per token)", "bits per byte", "tokens"):
        table.add_column(heading, justify="left" if heading == "domain" else "right")
    for name, domain in evaluation.domains.items():
        table.add_row(name, f"{domain.loss:.3f}", f"{domain.bits_per_byte:.3f}", f"{domain.tokens:,}")
    table.add_row(
        "all", f"{evaluation.loss:.3f}", "", f"{sum(d.tokens for d in evaluation.domains.values()):,}"
    )
    return table


def samples(trainer: Trainer, model: DeepSeekV3) -> list[tuple[str, str, str]]:
    """What the model writes after the first words of validation documents: (domain, prompt, continuation)."""
    found, stream = [], trainer.stream
    generator = torch.Generator(trainer.device).manual_seed(trainer.config.seed)
    for name in stream.domain_names:
        batches = stream.validation_batches(name, 1, 1)
        if not batches or len(found) == _SAMPLES:
            continue
        prompt = batches[0].input_ids[:, :_PROMPT_TOKENS].to(trainer.device)
        ids = model.generate(
            prompt, max_new_tokens=_SAMPLE_TOKENS, temperature=_TEMPERATURE, generator=generator,
            stop_tokens=[stream.tokenizer.eos_id],
        )  # fmt: skip
        both = ids[0].tolist()
        found.append(
            (
                name,
                stream.tokenizer.decode(both[:_PROMPT_TOKENS]),
                stream.tokenizer.decode(both[_PROMPT_TOKENS:]),
            )
        )
    return found
