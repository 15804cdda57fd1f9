"""``dsv3 train --parallel``: trains by several processes, on this machine or (under torchrun) on several.

On one machine this process starts the ranks, watches them, and shows what rank 0 says. Under torchrun the same command
is each rank; where to meet stands in the environment (``MASTER_ADDR``, ``RANK`` and so on).
"""

from __future__ import annotations

import argparse
import io
import math
import os
import shlex
import signal
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from ...config import ModelConfig
from ...errors import ConfigError
from ...model import DeepSeekV3
from ...pipeline.runtime import processes, worker
from ...pipeline.runtime.layout import Layout
from ...pipeline.schedules import SCHEDULES
from ...terminal import plain_console
from . import folder as run_folder
from .interrupt import EXIT_INTERRUPTED
from .parallel import CUTS, Parallel, ParallelTrainer
from .progress import Lines, conclude, introduce

DEFAULT_SEQUENCE_LENGTH = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of a run over several processes."""
    group = parser.add_argument_group("several processes (or the same under torchrun)")
    group.add_argument("--parallel", metavar="LAYOUT", help="pp=4,ep=2,dp=1: ranks of the pipeline, of experts; copies")
    group.add_argument("--schedule", choices=tuple(SCHEDULES), help="of the pipeline (dualpipe; 1f1b where pp is odd)")
    group.add_argument(
        "--microbatches", type=int, help="of one replica in a step, of both directions (as few as the schedule takes)"
    )
    group.add_argument(
        "--recompute", action="store_true", default=None, help="norms and up-projections again in backward"
    )
    group.add_argument(
        "--cut", choices=CUTS,
        help="into stages of equally many operations (default: the same command gives the same numbers everywhere), or "
        "of equal processor time, measured first and recorded with the run",
    )  # fmt: skip
    group.add_argument("--trace", action="store_true", help="keep RUN/trace.json, who did what when, for chrome://tracing")
    parser.set_defaults(batch_size_start=None)


def is_meant(args: argparse.Namespace) -> bool:
    """Whether the options begin or resume a run over several ranks.

    Raises:
        ConfigError: they need --parallel, and it is not given.
    """
    if args.parallel:
        return True
    if args.resume and (Path(args.resume) / run_folder.RUN_FILE).exists():
        return bool(run_folder.read_run(args.resume).get("parallel"))
    given = [name for name in ("schedule", "microbatches", "recompute", "cut", "trace") if getattr(args, name)]
    if given:
        raise ConfigError(f"--{given[0]}: given without --parallel, such as --parallel pp=2")
    return False


def run(args: argparse.Namespace) -> int:
    """Train as the options say: as a rank under torchrun, else with ranks as processes of this machine.

    Returns:
        0, or 130 after Ctrl-C.

    Raises:
        ConfigError: the numbers do not fit; told before a process starts. Dsv3Error: a rank failed.
    """
    parallel = settle(args)
    if dist.is_torchelastic_launched():
        return _as_torchrun_says(args, parallel)
    if not args.resume:
        from .command import folder_of

        run_folder.refuse_existing(folder_of(args))
    work = f"{__name__}:train_rank"
    ends = processes.launch(
        parallel.layout.world, work, [vars(args), parallel.to_dict()], timeout=math.inf, show=0, gentle=True
    )
    return EXIT_INTERRUPTED if ends[0] == "interrupted" else 0


def settle(args: argparse.Namespace) -> Parallel:
    """The layout that the options or the resumed run have, checked; options that depend on it are filled in.

    Raises:
        ConfigError: something does not fit.
    """
    if len(args.balance or ()) > 1:
        raise ConfigError("--balance: several ways are compared by one process; leave --parallel out, or name one")
    if args.device not in (None, "auto", "cpu"):
        raise ConfigError(f"--device: {args.device!r}, expected cpu: a pipeline's processes meet over gloo, on CPUs")
    args.device = "cpu"
    return _resumed(args) if args.resume else _new(args)


def _new(args: argparse.Namespace) -> Parallel:
    from .command import config_of, model_config_of  # it imports this file

    layout = Layout.parse(args.parallel)
    name = args.schedule or _fitting(layout)
    each = args.microbatches if args.microbatches is not None else _fewest(name, layout)
    parallel = Parallel(layout, name, each * layout.replicas, bool(args.recompute), args.cut or CUTS[0])
    _ = parallel.pipeline  # refuses numbers that the schedule cannot have
    if args.batch_size is None:
        args.batch_size = parallel.microbatches
    args.batch_size_start, args.threads = args.batch_size, args.threads or 1
    parallel.refuse(model_config_of(args), config_of(args), args.seq_len or DEFAULT_SEQUENCE_LENGTH)
    return parallel


def _resumed(args: argparse.Namespace) -> Parallel:
    """The run's own layout, or another one with the same micro-batches; cut by the same costs."""
    recorded = run_folder.read_run(args.resume)
    if not recorded.get("parallel"):
        raise ConfigError(
            f"--parallel: {args.parallel!r} for {args.resume}, a run whose steps are computed in one piece; resume it "
            "without --parallel"
        )
    own = Parallel.from_dict(recorded["parallel"])
    layout = Layout.parse(args.parallel) if args.parallel else own.layout
    name = args.schedule or (own.schedule if args.parallel is None or layout.pp == own.layout.pp else _fitting(layout))
    recompute = own.recompute if args.recompute is None else args.recompute
    if args.microbatches is not None and args.microbatches * layout.replicas != own.microbatches:
        raise ConfigError(
            f"--microbatches: {args.microbatches} with {layout}, expected the run's {own.microbatches} in all"
        )
    if args.cut not in (None, own.cut):
        raise ConfigError(
            f"--cut: {args.cut} for {args.resume}, a run whose cut is {own.cut!r}; leave it out, or begin a new run"
        )
    parallel = replace(own, layout=layout, schedule=name, recompute=recompute)
    model, training = ModelConfig.from_dict(recorded["model"]), run_folder.recorded_config(recorded)
    parallel.refuse(model, training, recorded["stream"]["seq_len"])
    return parallel


def _fitting(layout: Layout) -> str:
    return "dualpipe" if layout.pp % 2 == 0 else "1f1b"


def _fewest(name: str, layout: Layout) -> int:
    kind = SCHEDULES[name]
    return max(kind.least * layout.pp, 2 * layout.pp)


# ---- a rank ----------------------------------------------------------------------------------------------


def _as_torchrun_says(args: argparse.Namespace, parallel: Parallel) -> int:
    parallel.layout.refuse_world(int(os.environ.get("WORLD_SIZE", "1")))
    reason = worker.as_torchrun_says(lambda rank: train_rank(rank, vars(args), parallel.to_dict()))
    return EXIT_INTERRUPTED if reason == "interrupted" else 0


def states_told(held: list[tuple[int, int]]) -> str:
    """What sharding the optimizer's states saves, in a line: moments, masters and averaged weights.

    Args:
        held: of each rank, as ``ParallelTrainer.state_bytes`` gives it.
    """
    most, unsharded = (max(column) / 1e6 for column in zip(*held, strict=True))
    return f"optimizer states: {most:,.1f} MB on the fullest rank (ZeRO-1; unsharded {unsharded:,.1f} MB)"


def train_rank(rank: worker.Rank, options: dict[str, Any], fields: dict[str, Any]) -> str:
    """What each rank's process does.

    Args:
        rank: which one. options: of the command. fields: of ``Parallel``.

    Returns:
        "finished" or "interrupted".
    """
    from .command import make_trainer

    asked = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked.set())
    torch.set_num_threads(1)
    args, first = argparse.Namespace(**options), rank.rank == 0
    console = plain_console() if first else Console(file=io.StringIO())
    rank.tell("opening the text")
    make = partial(
        ParallelTrainer, parallel=Parallel.from_dict(fields), rank=rank, asked_to_stop=asked.is_set, trace=args.trace
    )
    trainer = make_trainer(args, console, make)
    held = trainer.state_bytes()
    if first:
        introduce(console, trainer)
        console.print(
            f"{rank.world} ranks, {trainer.parallel.layout}, {trainer.parallel.schedule}, "
            f"{trainer.parallel.microbatches} micro-batches a step, cut: {trainer.parallel.cut}\n{states_told(held)}",
            highlight=False,
        )
    end = trainer.run(callbacks=[Lines(trainer)] if first else [], progress=first and sys.stderr.isatty())
    if end["reason"] == "interrupted":
        if first:
            where = shlex.quote(str(trainer.out))
            console.print(f"Stopped after step {end['step']}; all is saved. Go on with:\n  dsv3 train --resume {where}")
        return end["reason"]
    if trainer.validation is None and trainer.config.validation_batches:
        trainer.validate()
    if first:
        conclude(console, trainer, DeepSeekV3.from_pretrained(trainer.out / run_folder.MODEL_FOLDER))
    return end["reason"]
