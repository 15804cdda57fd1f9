"""``dsv3 train``: trains a small DeepSeek-V3 on real text and leaves a model that writes."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from ...config import ModelConfig
from ...devices import HELP, find_device
from ...errors import ConfigError, DataError
from ...fp8.recipe import NAMES as RECIPES
from ...model import DeepSeekV3
from ...terminal import plain_console
from ..loop.balance import DEFAULT_SPEED, PAPER_SPEED, WAYS, balance_settings
from ..loop.comparison import compare, comparison_table
from ..loop.settings import TrainingConfig
from ..loop.trainer import Record, Trainer
from ..text.data import DEFAULT_FIM_RATE, PackedStream
from ..text.folder import open_domains
from ..text.full_text import FULL_WEIGHTS
from ..text.mixture import MAX_PASSES, cap_passes
from ..text.tokenizer import Tokenizer, default_tokenizer, train_tokenizer
from . import extension_command, parallel_command
from . import folder as run_folder
from .interrupt import EXIT_INTERRUPTED
from .progress import LINES, Lines, conclude, introduce

PRESETS = ("nano", "tiny", "tiny-v3")
TEXTS = ("full", "small")
DEFAULT_MINUTES = 2.0
DEFAULT_SEQUENCE_LENGTH = 128
# A run of minutes wants many small steps. Tiny, 100,000 tokens, learning rate 2e-3: validation loss 5.76 with 4
# sequences a step, 5.84 growing from 2 to 8, 5.86 with 8; with 8, 5.93 at 4e-3.
DEFAULT_BATCH_SIZE = 4
# Which of the command's options are fields of TrainingConfig, under the same name.
_TRAINING_OPTIONS = (
    "steps", "tokens", "minutes", "seed", "batch_size", "batch_size_start", "learning_rate", "warmup_steps",
    "bias_speed", "aux_loss_alpha", "mtp_loss_weight", "checkpoint_every", "validate_every", "threads", "fp8",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options; those left out have the run's own value, or the default of a new run."""
    model = parser.add_argument_group("model")
    model.add_argument("--preset", choices=PRESETS, help="size of the model (tiny)")
    model.add_argument("--config", metavar="FILE", help="a config.json instead of a preset")
    model.add_argument("--no-mtp", action="store_true", default=None, help="without the MTP module")
    length = parser.add_argument_group("length").add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help=f"train so long ({DEFAULT_MINUTES:g})")
    length.add_argument("--steps", type=int, help="train so many steps")
    length.add_argument("--tokens", type=int, help="train on so many tokens")
    text = parser.add_argument_group("text")
    text.add_argument("--data", metavar="FOLDER", help="your own text instead of the text of this machine")
    text.add_argument(
        "--text", choices=TEXTS, help="how much of this machine's text: small opens at once, full (the default) "
        "takes some seconds",
    )  # fmt: skip
    text.add_argument("--without", nargs="+", metavar="DOMAIN", help="built-in domains to leave out")
    text.add_argument("--seq-len", type=int, help=f"tokens in a sequence ({DEFAULT_SEQUENCE_LENGTH})")
    text.add_argument(
        "--fim-rate", type=float, help=f"share of documents told with a hole ({DEFAULT_FIM_RATE})"
    )
    text.add_argument(
        "--max-passes", type=float, metavar="N", help=f"most passes over a domain ({MAX_PASSES:g}); its share of "
        "the tokens is cut where a run of given length would read it more often",
    )  # fmt: skip
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--batch-size", type=int, help=f"sequences a step ({DEFAULT_BATCH_SIZE})")
    recipe.add_argument("--learning-rate", type=float, help="the peak")
    recipe.add_argument("--warmup-steps", type=int, help="steps of linear rise")
    recipe.add_argument(
        "--balance", nargs="+", choices=tuple(WAYS), metavar="WAY",
        help=f"how the experts' load is balanced: {', '.join(WAYS)} (V3's recipe: the bias, and a very weak "
        "loss beside it); two or more are trained one after the other and compared",
    )  # fmt: skip
    recipe.add_argument(
        "--bias-speed",
        type=float,
        help=f"γ of the routers' bias ({DEFAULT_SPEED}; paper: {PAPER_SPEED}); 0: off",
    )
    recipe.add_argument("--aux-loss-alpha", type=float, help="α of the balance loss")
    recipe.add_argument("--mtp-loss-weight", type=float, help="λ of the MTP loss (0.3)")
    recipe.add_argument("--seed", type=int, help="of weights and text (0)")
    recipe.add_argument(
        "--fp8",
        choices=RECIPES,
        help="recipe of the linear layers' products (none); tile is V3's, with BF16 moments",
    )
    run = parser.add_argument_group("run")
    run.add_argument("--out", metavar="RUN", help="folder of the new run (runs/PRESET)")
    run.add_argument("--resume", metavar="RUN", help="go on with the run in this folder")
    run.add_argument("--checkpoint-every", type=int, metavar="STEPS", help="between save points")
    run.add_argument("--validate-every", type=int, metavar="STEPS", help="between validations (at the end)")
    run.add_argument("--threads", type=int, help="threads on the CPU")
    run.add_argument("--device", help=HELP)
    parallel_command.add_arguments(parser)
    extension_command.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Train as the options say.

    Returns:
        0, or 130 after Ctrl-C.

    Raises:
        Dsv3Error: an option, the text or the run's folder cannot be used; training diverged; the disk is
        full.
    """
    console = plain_console()
    if extension_command.is_meant(args):
        return extension_command.run(args, console, lambda trainer: [Lines(trainer)])
    if parallel_command.is_meant(args):
        return parallel_command.run(args)
    if len(args.balance or ()) > 1:
        return _compare(args, console)
    if not args.resume:
        run_folder.refuse_existing(folder_of(args))
    trainer = make_trainer(args, console)
    introduce(console, trainer)
    end = trainer.run(callbacks=[Lines(trainer)], progress=sys.stderr.isatty())
    if end["reason"] == "interrupted":
        console.print(
            f"Stopped after step {end['step']}; all is saved. Go on with:\n"
            f"  dsv3 train --resume {shlex.quote(str(trainer.out))}",
            highlight=False,
        )
        return EXIT_INTERRUPTED
    if trainer.validation is None and trainer.config.validation_batches:
        trainer.validate()  # the run was finished before: its model is measured again
    conclude(console, trainer)
    return 0


# ---- making the trainer ----------------------------------------------------------------------------------


def make_trainer(args: argparse.Namespace, console: Console, make: Callable[..., Trainer] = Trainer) -> Trainer:
    """The trainer that the options ask for: of a new run, or of the one to be resumed.

    Args:
        args: the options. console: for notes. make: called as ``Trainer`` is.
    """
    return _resumed(args, make) if args.resume else _begun(args, console, make)


def folder_of(args: argparse.Namespace) -> Path:
    """The folder of a new run."""
    return Path(args.out or Path("runs") / (args.preset or "tiny"))


def config_of(args: argparse.Namespace) -> TrainingConfig:
    """The training settings of a new run."""
    options = {name: getattr(args, name) for name in _TRAINING_OPTIONS if getattr(args, name) is not None}
    if not {"steps", "tokens", "minutes"} & options.keys():
        options["minutes"] = DEFAULT_MINUTES
    options.setdefault("batch_size", DEFAULT_BATCH_SIZE)
    options["bf16_moments"] = options.get("fp8", "none") != "none"
    if args.balance:
        options |= balance_settings(args.balance[0], args.bias_speed, args.aux_loss_alpha)
    return TrainingConfig(**options)


def model_config_of(args: argparse.Namespace) -> ModelConfig:
    """The model of a new run, its vocabulary aside, which is the tokenizer's."""
    found = ModelConfig.from_json(args.config) if args.config else ModelConfig.preset(args.preset or "tiny")
    return found.replace(num_nextn_predict_layers=0) if args.no_mtp else found


def _begun(args: argparse.Namespace, console: Console, make: Callable[..., Trainer]) -> Trainer:
    if args.preset and args.config:
        raise ConfigError(
            f"--config: {args.config!r} given beside --preset {args.preset}, expected one of them"
        )
    config = config_of(args)
    model, stream, source = _model_and_text(args, config, console)
    return make(model, stream, config, out=folder_of(args), source=source)


def _model_and_text(
    args: argparse.Namespace, config: TrainingConfig, console: Console
) -> tuple[DeepSeekV3, PackedStream, dict[str, Any]]:
    """A fresh model and a fresh stream of text, as the options say, and where the text came from."""
    model_config = model_config_of(args)
    data = None if args.data is None else str(Path(args.data).resolve())
    source = {"data": data, "without": list(args.without or ()), "text": _or(args.text, TEXTS[0])}
    domains, notes = open_domains(data, source["without"], text=source["text"])
    tokenizer = _tokenizer_for(data, domains, model_config.vocab_size, notes)
    stream = PackedStream(
        domains, tokenizer, _or(args.seq_len, DEFAULT_SEQUENCE_LENGTH), seed=config.seed,
        fim_rate=_or(args.fim_rate, DEFAULT_FIM_RATE),
        weights=_full_weights(domains) if data is None and source["text"] == "full" else None,
    )  # fmt: skip
    notes += cap_passes(stream, _tokens_of(config, stream.seq_len), _or(args.max_passes, MAX_PASSES))
    for note in notes:
        console.print(Text(f"note: {note}", style="yellow"))
    model = _fresh_model(_with_tokens_of(tokenizer, model_config, console), config.seed, args.device)
    return model, stream, source


def _with_tokens_of(tokenizer: Tokenizer, config: ModelConfig, console: Console) -> ModelConfig:
    """A configuration whose vocabulary and special tokens are the tokenizer's, and a line where they were not."""
    own = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    changed = [f"{name} {getattr(config, name)} -> {i}" for name, i in own.items() if getattr(config, name) != i]
    if changed:
        console.print(Text(f"note: special tokens as in the tokenizer: {', '.join(changed)}", style="yellow"))
    return config.replace(vocab_size=tokenizer.vocab_size, **own)


def _compare(args: argparse.Namespace, console: Console) -> int:
    """Train once in each way to balance, from the same weights on the same text; each run has its folder."""
    if args.resume:
        raise ConfigError("--balance: several ways are compared from the start, not with --resume; name one")
    if args.minutes is not None or not (args.steps or args.tokens):
        raise ConfigError(
            "--balance: runs that are compared must be of equal length; give --steps or --tokens, not --minutes"
        )
    options = {name: getattr(args, name) for name in _TRAINING_OPTIONS if getattr(args, name) is not None}
    speed, alpha = options.pop("bias_speed", None), options.pop("aux_loss_alpha", None)
    out = Path(args.out or Path("runs") / f"{args.preset or 'tiny'}-balance")
    config = TrainingConfig(**options)

    def fresh() -> tuple[DeepSeekV3, PackedStream, dict[str, Any]]:
        return _model_and_text(args, config, console)

    ways = list(dict.fromkeys(args.balance))
    for way in ways:
        run_folder.refuse_existing(out / way)
    out.mkdir(parents=True, exist_ok=True)

    def tell(way: str, record: Record) -> None:
        every = max(1, (config.steps or LINES) // LINES)
        if record["step"] % every == 0 or record["step"] == 1:
            console.print(
                f"{way:9} step {record['step']:>5} loss {record['losses']['main']:.3f}  "
                f"MaxVio {max(record['max_violation'], default=0.0):.2f}", highlight=False,
            )  # fmt: skip

    outcomes = compare(fresh, config, ways, speed=speed, alpha=alpha, out=out, on_step=tell)
    console.print(comparison_table(outcomes))
    console.print(f"The runs are in {out}; look into one with: dsv3 watch {shlex.quote(str(out / ways[-1]))}")
    return 0


def _resumed(args: argparse.Namespace, make: Callable[..., Trainer]) -> Trainer:
    """The trainer of a recorded run. Options given again are held against the record by ``Trainer``."""
    if args.out is not None and Path(args.out) != Path(args.resume):
        raise ConfigError(f"--out: {args.out!r} given beside --resume {args.resume}, expected one of them")
    out = Path(args.resume)
    recorded = run_folder.read_run(out)
    config, text, source = run_folder.recorded_config(recorded), recorded["stream"], recorded["source"]
    given = {name: getattr(args, name) for name in _TRAINING_OPTIONS if getattr(args, name) is not None}
    if {"steps", "tokens", "minutes"} & given.keys():
        given = {"steps": None, "tokens": None, "minutes": None, **given}
    if args.balance:
        given |= balance_settings(args.balance[0], args.bias_speed, args.aux_loss_alpha)
    config = dataclasses.replace(config, **given)
    model_config = ModelConfig.from_dict(recorded["model"])
    if args.preset or args.config:
        wanted = ModelConfig.from_json(args.config) if args.config else ModelConfig.preset(args.preset)
        depth = (
            model_config.num_nextn_predict_layers if args.no_mtp is None else wanted.num_nextn_predict_layers
        )
        of_the_tokenizer = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
        kept = {name: getattr(model_config, name) for name in of_the_tokenizer}
        model_config = wanted.replace(num_nextn_predict_layers=depth, **kept)
    if args.no_mtp:
        model_config = model_config.replace(num_nextn_predict_layers=0)
    # The folder may have been moved or renamed since; whether it is the same text is seen by its fingerprint.
    data = source["data"] if args.data is None else args.data
    without = source["without"] if args.without is None else args.without
    shares = dict(zip(recorded["domains"], text["weights"], strict=True))
    # Runs begun before there was a choice have the small text, and say nothing of it.
    own_name = None if source["data"] is None else Path(source["data"]).name
    domains, _ = open_domains(data, without, text=_or(args.text, source.get("text", "small")), own_name=own_name)
    stream = PackedStream(
        domains,
        Tokenizer.from_pretrained(out / run_folder.TOKENIZER_FOLDER),
        _or(args.seq_len, text["seq_len"]),
        seed=config.seed,
        fim_rate=_or(args.fim_rate, text["fim_rate"]),
        validation_share=text["validation_share"],
        # With other domains the run is another one; ``Trainer`` says so.
        weights=shares if shares.keys() == {domain.name for domain in domains} else None,
    )
    return make(_fresh_model(model_config, config.seed, args.device), stream, config, out=out, resume=True)


def _tokenizer_for(data: str | None, domains: list, vocab_size: int, notes: list[str]) -> Tokenizer:
    """The course's tokenizer; for anybody's own text one trained on it, where it is enough for that."""
    if data is None:
        return default_tokenizer()
    try:
        return train_tokenizer(domains, vocab_size)
    except DataError as error:
        notes.append(f"the course's own tokenizer is used: {error}")
        return default_tokenizer()


def _fresh_model(config: ModelConfig, seed: int, device: str | None) -> DeepSeekV3:
    where = find_device(device)
    # Weights are drawn on the CPU: the same seed gives the same model everywhere.
    return DeepSeekV3(config, generator=torch.Generator().manual_seed(seed)).to(where)


def _full_weights(domains: list) -> dict[str, float]:
    return {domain.name: FULL_WEIGHTS[domain.name] for domain in domains}


def _tokens_of(config: TrainingConfig, sequence_length: int) -> int | None:
    """How many tokens a run reads, about; None where the clock decides."""
    if config.steps is not None:
        return config.steps * config.batch_size * sequence_length
    return config.tokens


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
