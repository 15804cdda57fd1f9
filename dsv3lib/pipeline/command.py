"""``dsv3 pipeline``: plan a training cluster, show one schedule in time, or run it by processes of this machine."""

from __future__ import annotations

import argparse
import io
import json
import math
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from ..config import PRESETS, ModelConfig
from ..errors import ConfigError, SaveError
from ..files import write_whole
from ..terminal import plain_console
from . import planner
from .closed_form import closed_form
from .runtime import command as processes
from .schedules import SCHEDULES, schedule
from .simulation import Simulation, simulate
from .validation import validate

EXPLANATION = """\
Memory is of the fullest GPU: weights in BF16, gradients in FP32, optimiser states shared among all copies (ZeRO-1), \
activations with the paper's recomputation, in brackets with everything kept. Traffic is what one GPU sends in a step. \
Hours are an estimate for comparing plans: {tflops:g} TFLOP/s in the products is assumed, and the slowest stage sets \
the pace. Without overlapped pairs a pass waits for its all-to-all. ★ is what V3 was trained with."""

LETTERS = {"F": "F", "B": "B", "I": "I", "W": "W", "FB": "X"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``dsv3 pipeline``."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="plan | show | run")
    plan = actions.add_parser("plan", help="compare schedules, PP, EP and DP for a model on a cluster")
    plan.add_argument("--model", default="v3-671b", help="a preset or the path of a config.json (default v3-671b)")
    plan.add_argument("--gpus", type=int, default=2048, help="GPUs in all (default 2048)")
    plan.add_argument("--pp", type=int, nargs="+", default=[8, 16, 32], help="pipeline ranks to try")
    plan.add_argument("--ep", type=int, nargs="+", default=[64], help="GPUs to spread a layer's experts over, to try")
    plan.add_argument("--schedule", nargs="+", default=[*SCHEDULES], help=f"of {', '.join(SCHEDULES)}; all by default")
    plan.add_argument("--batch", type=int, default=15360, help="sequences in a step (default 15360)")
    plan.add_argument("--sequence", type=int, default=4096, help="tokens in a sequence (default 4096)")
    plan.add_argument("--microbatch", type=int, default=1, help="sequences in a micro-batch (default 1)")
    plan.add_argument("--memory", type=float, default=80.0, help="GB of a GPU (default 80)")
    plan.add_argument("--tflops", type=float, default=495.0, help="TFLOP/s that a GPU is assumed to reach")
    plan.add_argument("--json", action="store_true", help="print the plans as JSON")
    show = actions.add_parser("show", help="one schedule: its actions in time, bubble and memory")
    show.add_argument("name", help=f"of {', '.join(SCHEDULES)}")
    show.add_argument("--stages", type=int, default=8, help="pipeline ranks (default 8)")
    show.add_argument("--microbatches", type=int, default=20, help="in a step, of all directions (default 20)")
    show.add_argument("--F", type=float, default=1, help="time of a forward pass (default 1)")
    show.add_argument("--B", type=float, default=2, help="of a whole backward pass (default 2)")
    show.add_argument("--W", type=float, default=1, help="of its part for the weights (default 1)")
    show.add_argument("--FB", type=float, help="of an overlapped pair (default F + B)")
    show.add_argument("--communication", type=float, default=0, help="from one rank to the next (default 0)")
    show.add_argument("--actions", action="store_true", help="print each rank's list of actions")
    show.add_argument("--save", type=Path, metavar="FILE.svg", help="draw the picture into a file")
    processes.add_arguments(actions.add_parser("run", help="a schedule by real processes, beside its simulation"))


def run(arguments: argparse.Namespace) -> int:
    """Plans, shows or runs, and returns 0."""
    return {"plan": _plan, "show": _show, "run": processes.run}[arguments.action](arguments)


def _plan(arguments: argparse.Namespace) -> int:
    preset = arguments.model in PRESETS
    config = ModelConfig.preset(arguments.model) if preset else ModelConfig.from_json(arguments.model)
    cluster = planner.Cluster(arguments.gpus, memory_gb=arguments.memory, tflops=arguments.tflops)
    work = planner.Workload(arguments.batch, arguments.sequence, arguments.microbatch)
    plans, refused = planner.compare_plans(
        config, arguments.schedule, arguments.pp, arguments.ep, cluster, work
    )
    if arguments.json:
        derived = ("memory", "is_papers")
        rows = [asdict(one) | {name: getattr(one, name) for name in derived} for one in plans]
        print(json.dumps({"plans": rows, "refused": refused}, indent=1))
        return 0
    console = plain_console(soft_wrap=False)
    console.print(table_of(plans, f"{arguments.model} on {arguments.gpus:,} GPUs"))
    for line in refused:
        console.print(Text(f"not possible: {line}", style="dim"))
    console.print(Text(EXPLANATION.format(tflops=arguments.tflops), style="dim"))
    return 0


def table_of(plans: list[planner.Plan], title: str) -> Table:
    """The plans, those that do not fit dimmed."""
    shown = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    shown.add_column("schedule", no_wrap=True)
    columns = (
        "PP", "EP", "DP", "micro-\nbatches", "bubble\n%", "weights\n+grads\nGB", "optim.\nGB", "activations\nGB",
        "sum\nGB", "all-to-\nall GB", "pipe\nGB", "DP\nGB", "k hours\nper T",
    )  # fmt: skip
    for heading in columns:
        shown.add_column(heading, justify="right", no_wrap=True)
    for one in plans:
        star = " ★" if one.is_papers else ""
        shown.add_row(
            SCHEDULES[one.schedule].title.replace("interleaved ", "interl. ") + star,
            str(one.pp), str(one.ep), str(one.dp), str(one.microbatches), f"{100 * one.bubble:.1f}",
            f"{one.weights + one.gradients:.0f}", f"{one.optimizer:.1f}",
            f"{one.activations:.0f} ({one.activations_kept:.0f})", f"{one.memory:.0f}",
            f"{one.all_to_all:.0f}", f"{one.pipeline:.0f}", f"{one.data_parallel:.0f}", f"{one.hours / 1000:.0f}",
            style="" if one.fits[0] else "dim",
        )  # fmt: skip
    return shown


def _show(arguments: argparse.Namespace) -> int:
    made = schedule(arguments.name, arguments.stages, arguments.microbatches)
    validate(made)
    simulated = simulate(
        made, arguments.F, arguments.B, arguments.W, arguments.FB, communication=arguments.communication
    )
    console = plain_console(soft_wrap=False)
    if arguments.actions:
        for rank, row in enumerate(made.rows()):
            console.print(Text(f"rank {rank}: {row}"))
    for line in text_timeline(simulated, max(40, console.width - 10)):
        console.print(Text(line), no_wrap=True, crop=True)
    facts = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("rank", "idle time", "peak of live micro-batches"):
        facts.add_column(heading, justify="right")
    for rank, (idle, peak) in enumerate(zip(simulated.bubble, simulated.peak_activations, strict=True)):
        facts.add_row(str(rank), f"{idle:g}", f"{peak:g}")
    console.print(facts)
    form = closed_form(arguments.name)
    formula = form.bubble(arguments.stages, simulated.costs)
    console.print(
        Text(
            f"{SCHEDULES[arguments.name].title}: takes {simulated.makespan:g}, of it idle "
            f"{100 * simulated.bubble_share:.1f} %; the formula {form.formula} gives {formula:g}; "
            f"{simulated.parameter_copies:g} x the parameters"
        )
    )
    if arguments.save:
        _save(simulated, arguments.save)
        console.print(Text(f"drawn into {arguments.save}"))
    return 0


def text_timeline(simulated: Simulation, width: int) -> list[str]:
    """One line a rank: F forward, B backward, I and W its parts, X an overlapped pair, a dot where it waits.

    Args:
        simulated: a schedule in time. width: letters of a line, at most; shorter actions than a letter are merged.
    """
    shortest = min((event.end - event.start for event in simulated.timeline if event.end > event.start), default=1)
    unit = max(float(shortest), float(simulated.makespan) / width)
    lines = []
    for rank, row in enumerate(simulated.by_rank):
        letters = ["·"] * math.ceil(float(simulated.makespan) / unit - 1e-9)
        for event in row:
            begin, end = round(float(event.start) / unit), round(float(event.end) / unit)
            letters[begin:end] = LETTERS[event.action.kind] * (min(end, len(letters)) - begin)
        lines.append(f"{rank:4} {''.join(letters)}")
    return lines


def _save(simulated: Simulation, path: Path) -> None:
    """Draw the timeline into an SVG, whole or not at all."""
    try:
        from ..viz.pipeline import gantt
    except ImportError as error:
        raise ConfigError(f"--save needs matplotlib ({error}); install dsv3lib[lab]") from error
    if path.suffix.lower() != ".svg":
        raise SaveError(f"{path}: expected a name that ends in .svg")
    drawn = io.StringIO()
    gantt(simulated)[0].savefig(drawn, format="svg")
    write_whole(path, drawn.getvalue())
