"""``dsv3 train --extend``: begins or resumes the two-phase context extension of a checkpoint."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from ...errors import ConfigError
from ...model import DeepSeekV3
from ..loop.context_extension import METHODS
from ..loop.trainer import Trainer
from . import extension
from . import folder as run_folder
from .interrupt import EXIT_INTERRUPTED

DEFAULT_STEPS = 20
DEFAULT_TOKENS_A_STEP = 4096
# Options of `dsv3 train` that belong to a run from the beginning, not to an extension.
_NOT_HERE = (
    "preset", "config", "no_mtp", "minutes", "tokens", "data", "text", "without", "seq_len", "fim_rate", "max_passes",
    "warmup_steps", "balance", "bias_speed", "aux_loss_alpha", "mtp_loss_weight", "validate_every", "batch_size",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of an extension."""
    group = parser.add_argument_group("context extension (§4.3)")
    group.add_argument("--extend", type=int, metavar="TOKENS", help="extend the context of --from to so many tokens")
    group.add_argument("--from", dest="base", metavar="FOLDER", help="the run or checkpoint to extend")
    group.add_argument("--yarn-factor", type=float, help="how many times the frequencies are stretched (V3: 40)")
    group.add_argument(
        "--extend-method", choices=tuple(METHODS), help=f"yarn (the default), or for comparison: "
        f"{', '.join(f'{name} ({what})' for name, what in METHODS.items() if name != 'yarn')}",
    )  # fmt: skip
    group.add_argument("--trained-length", type=int, metavar="TOKENS", help="where --from does not say it")
    group.add_argument("--tokens-per-step", type=int, help=f"in both phases ({DEFAULT_TOKENS_A_STEP})")


def is_meant(args: argparse.Namespace) -> bool:
    """Whether the options begin or resume an extension."""
    if args.resume and extension.is_extension(args.resume):
        return True
    given = [f"--{n}" for n in ("extend", "from") if getattr(args, "base" if n == "from" else n) is not None]
    if len(given) == 1:
        missing = "--from" if given == ["--extend"] else "--extend"
        raise ConfigError(f"{given[0]}: given without {missing}; an extension needs a checkpoint and a length")
    return bool(given)


def run(args: argparse.Namespace, console: Console, tell: Callable[[Trainer], list]) -> int:
    """Begin or resume an extension, and run its phases to the end.

    Args:
        args: the options. console: for messages. tell: makes the callbacks that print a phase's progress.

    Returns:
        0, or 130 after Ctrl-C.

    Raises:
        Dsv3Error: an option, the checkpoint or the folder cannot be used.
    """
    out = Path(args.resume) if args.resume else _begun(args)
    plan, trainer = extension.read(out), None
    schedule = ", then ".join(f"{p.steps} steps of {p.batch_size} x {p.length} tokens" for p in plan.phases)
    console.print(f"extending {plan.base} with {METHODS[plan.method]}: {schedule}", highlight=False)
    for trainer in extension.trainers(out, args.device, args.threads):
        console.print(f"{trainer.out.name}, after step {trainer.steps_done} of {trainer.total_steps}", highlight=False)
        end = trainer.run(callbacks=tell(trainer), progress=sys.stderr.isatty())
        if end["reason"] == "interrupted":
            console.print(f"Stopped; all is saved. Go on with:\n  dsv3 train --resume {shlex.quote(str(out))}")
            return EXIT_INTERRUPTED
    model = shlex.quote(str(out / f"phase-{len(plan.phases)}" / run_folder.MODEL_FOLDER))
    console.print(f"The model reads {plan.target} tokens. It is in {model}; let it write: dsv3 generate {model}")
    return 0


def _begun(args: argparse.Namespace) -> Path:
    given = [name for name in _NOT_HERE if getattr(args, name, None) is not None]
    if given:
        raise ConfigError(
            f"--{given[0].replace('_', '-')}: {getattr(args, given[0])!r} given beside --extend, which takes text and "
            "model from what it extends; leave it out"
        )
    base = extension.find_base(args.base, args.trained_length)
    method = args.extend_method or "yarn"
    factor = args.yarn_factor if args.yarn_factor is not None else args.extend / base.trained
    out = Path(args.out or f"{args.base.rstrip('/')}-{args.extend}-{method}")
    plan = extension.Extension(
        base=str(base.model), base_weights=run_folder.weights_fingerprint(DeepSeekV3.from_pretrained(base.model)),
        method=method, trained=base.trained, target=args.extend, factor=factor, steps=args.steps or DEFAULT_STEPS,
        tokens_a_step=args.tokens_per_step or DEFAULT_TOKENS_A_STEP,
        learning_rate=args.learning_rate or base.learning_rate, seed=args.seed or 0,
        checkpoint_every=args.checkpoint_every, text=base.text,
    )  # fmt: skip
    extension.begin(out, plan)
    return out
