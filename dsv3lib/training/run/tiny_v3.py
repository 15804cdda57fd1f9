"""The training run of tiny-v3, the checkpoint that the project ships: ``make checkpoint``.

Everything of the paper's recipe is on: MLA, sixteen routed experts in groups with the bias that balances them
(and V3's very weak sequence-wise loss beside it), two MTP modules, fill-in-the-middle, packed documents, AdamW
with a warm-up and a cosine to zero. The text is the full built-in text, no domain read more than four times; the
tokenizer, of 2,048 tokens, is trained on it first.

The same command on the same machine gives the same losses, and goes on after a kill from the last save point.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ...config import ModelConfig
from ...errors import ConfigError
from ...model import DeepSeekV3
from ..loop.settings import TrainingConfig
from ..loop.trainer import Record, Trainer
from ..text.data import PackedStream
from ..text.domains import builtin_domains
from ..text.full_text import FULL_WEIGHTS
from ..text.mixture import cap_passes
from ..text.tokenizer import Tokenizer, train_tokenizer
from . import folder as run_folder
from .interrupt import exit_code

PRESET = "tiny-v3"
DEFAULT_TOKENS = 6_000_000
"""The shipped run's length: about 80 minutes of one core, and the dense twin's 60 beside it."""
MOST_TOKENS = 12_000_000
"""More than any run by the clock reads here: the length that the mixture's cap on passes reckons with."""
CONSTANT_SHARE = 0.7
SEQUENCE_LENGTH, BATCH_SIZE, WARMUP_STEPS = 256, 4, 50
SEED = 0
_LINE_EVERY = 25  # steps


def settings(
    minutes: float | int | None = None,
    tokens: int | None = None,
    threads: int = 1,
    decay_after: int | None = None,
) -> TrainingConfig:
    """The run's recipe; only its length and the number of threads are free.

    The learning rate is constant for seven tenths of the run and falls to zero by a cosine: of the time, where
    minutes are given (the length is decided when the fall begins), else of the tokens.

    Args:
        minutes, tokens: the length, one of them; by default the shipped run's ``DEFAULT_TOKENS``. threads: torch's.
        decay_after: with tokens, the last step of the constant phase, to repeat a run that the clock has ended.

    Raises:
        ConfigError: ``decay_after`` with minutes, or outside the run.
    """
    constant = CONSTANT_SHARE
    if minutes is None and tokens is None:
        tokens = DEFAULT_TOKENS
    if decay_after is not None:
        steps = -(-(tokens or 0) // (BATCH_SIZE * SEQUENCE_LENGTH))
        if not WARMUP_STEPS <= decay_after < steps:
            raise ConfigError(
                f"decay_after: {decay_after}, expected a step from {WARMUP_STEPS} to the run's {steps}, and tokens"
            )
        constant = (decay_after - WARMUP_STEPS) / (steps - WARMUP_STEPS)
    length: dict[str, Any] = {"tokens": tokens, "constant_share": constant, "cosine_share": 1 - constant}
    if tokens is None:
        length = {"minutes": minutes, "decide_at": CONSTANT_SHARE, "constant_share": 0.0,
                  "cosine_share": 1.0}  # fmt: skip
    return TrainingConfig(
        **length, seed=SEED, threads=threads,
        batch_size=BATCH_SIZE, batch_size_start=BATCH_SIZE, batch_warmup_steps=0,
        learning_rate=2e-3, warmup_steps=WARMUP_STEPS,
        rest_share=0.0, rest_ratio=0.0, tail_ratio=0.0, weight_decay=0.1,
        mtp_loss_weight=0.3, mtp_loss_weight_late=0.3, bias_speed=1e-2, aux_loss_alpha=1e-4,
        ema_decay=0.0, checkpoint_every=200, validation_batches=10,
    )  # fmt: skip


def dense_twin(config: ModelConfig) -> ModelConfig:
    """The same model without a mixture: every main layer is dense, as wide as what one token meets on average.

    The MTP modules, which take no part in what is compared, stay as they are.
    """
    per_token = config.moe_intermediate_size * (config.num_experts_per_tok + config.n_shared_experts)
    n, dense = config.num_hidden_layers, config.first_k_dense_replace
    width = round((config.intermediate_size * dense + per_token * (n - dense)) / n)
    return config.replace(first_k_dense_replace=n, intermediate_size=width)


def trainer(out: Path, config: TrainingConfig | None = None, dense: bool = False) -> Trainer:
    """The trainer of a new run in ``out``, or of the run that is there already.

    Args:
        out: the run's folder. config: of ``settings``; by default that of the run that is there, or its defaults.
        dense: the dense twin instead.

    Raises:
        Dsv3Error: the text is not there, or ``out`` holds another run.
    """
    resume = out.exists()
    if config is None:
        config = run_folder.recorded_config(run_folder.read_run(out)) if resume else settings()
    domains = builtin_domains(text="full", seed=SEED)
    shape = ModelConfig.preset(PRESET)
    tokenizer = (
        Tokenizer.from_pretrained(out / run_folder.TOKENIZER_FOLDER)
        if resume
        else train_tokenizer(domains, shape.vocab_size, seed=SEED)
    )
    stream = PackedStream(domains, tokenizer, SEQUENCE_LENGTH, seed=SEED, weights=FULL_WEIGHTS)
    for note in cap_passes(stream, max(config.tokens or 0, MOST_TOKENS)):
        print(f"note: {note}", flush=True)
    model = DeepSeekV3(dense_twin(shape) if dense else shape, generator=torch.Generator().manual_seed(SEED))
    source = {"data": None, "without": [], "text": "full"}
    return Trainer(model, stream, config, out=out, resume=resume, source=source)


def train(out: Path, config: TrainingConfig | None = None, dense: bool = False) -> bool:
    """Train to the end, or go on; a line every 25 steps. True when the run is finished, False when interrupted."""
    run = trainer(out, config, dense)
    run.run([_tell], progress=sys.stderr.isatty())
    return run.finished


def main(arguments: list[str] | None = None) -> int:
    """Train tiny-v3, or go on training it; the command line of this file."""
    parser = argparse.ArgumentParser(prog="python -m dsv3lib.training.run.tiny_v3", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs") / PRESET, help="the run's folder")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="the run's length by the clock")
    length.add_argument("--tokens", type=int, help=f"the run's length in tokens ({DEFAULT_TOKENS:,})")
    parser.add_argument(
        "--decay-after", type=int, metavar="STEP", help="with --tokens: last step of the constant phase, to repeat a "
        "run by the clock exactly",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, help="torch's threads, part of the run (1)")
    parser.add_argument("--dense", action="store_true", help="the dense twin of equal active parameters")
    options = parser.parse_args(arguments)
    given = {name: getattr(options, name) for name in ("minutes", "tokens", "threads", "decay_after")}
    given = {name: value for name, value in given.items() if value is not None}
    return exit_code(lambda: train(options.out, settings(**given) if given else None, options.dense))


def _tell(run: Trainer, record: Record) -> None:
    if record["step"] % _LINE_EVERY == 0 or run.finished:
        losses = "  ".join(
            f"{name} {value:.3f}" for name, value in record["losses"].items() if name != "balance"
        )
        tqdm.write(
            f"step {record['step']}/{run.total_steps}  {losses}  lr {record['learning_rate']:.1e}  "
            f"MaxVio {max(record['max_violation'], default=0.0):.2f}  {run.seconds:,.0f} s",
            file=sys.stdout,
        )
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
