"""``dsv3 pipeline run``: a schedule carried out by processes of this machine, beside its simulation."""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from ...errors import ConfigError, SaveError
from ...files import write_whole
from ...terminal import plain_console
from ..schedules import SCHEDULES, schedule
from .layout import Part, parts_of_ranks
from .measure import PieceSeconds, piece_seconds
from .timeline import idle_shares
from .trace import write_chrome_trace
from .trial import LENGTH, Trial, micro_batches, small_model, trial

EXPLANATION = """\
Wall clock: as it ran, with all processes on this machine's cores. Simulated: each action at the processor time that \
it took, as if every rank had a core to itself. Order: the run's, held against the schedule's, action by action."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``dsv3 pipeline run``."""
    parser.add_argument("name", help=f"of {', '.join(SCHEDULES)}")
    parser.add_argument("--stages", type=int, default=4, help="pipeline ranks, a process each (default 4)")
    parser.add_argument("--microbatches", type=int, default=8, help="in a step, of all directions (default 8)")
    parser.add_argument("--steps", type=int, default=3, help="of the optimiser; the last is shown (default 3)")
    parser.add_argument(
        "--cut", choices=("measured", "operations"), default="measured",
        help="into stages of equal processor time, measured first (default), or of equally many operations",
    )  # fmt: skip
    parser.add_argument("--save", type=Path, metavar="FILE.svg", help="draw run and simulation into a file")
    parser.add_argument("--trace", type=Path, metavar="FILE.json", help="write a Chrome trace, for Perfetto")


def run(arguments: argparse.Namespace) -> int:
    """Runs the processes, prints what they did, and returns 0.

    Raises:
        ConfigError: no such schedule, or no room for the processes. SaveError: a file has another ending than its kind.
    """
    for path, suffix in ((arguments.save, ".svg"), (arguments.trace, ".json")):
        if path is not None and path.suffix.lower() != suffix:
            raise SaveError(f"{path}: expected a name that ends in {suffix}")
    sizes = (arguments.name, arguments.stages, arguments.microbatches)
    plan, costs, model = schedule(*sizes), None, small_model(arguments.stages)
    if arguments.cut == "measured":
        found = piece_seconds(model, micro_batches(1)[0])
        costs = [piece.total for piece in found]
        _report_pieces(found, parts_of_ranks(model.config, plan, LENGTH, costs))
    total = arguments.steps * sum(map(len, plan.actions))
    with tqdm(unit="action", desc=arguments.name, total=total, dynamic_ncols=True, disable=None) as shown:
        done = trial(*sizes, arguments.steps, shown.update, costs)
    report(done)
    if arguments.save:
        _save(done, arguments.save)
    if arguments.trace:
        write_chrome_trace(arguments.trace, done.spans)
    return 0


def _report_pieces(found: Sequence[PieceSeconds], parts: Sequence[dict[int, Part]]) -> None:
    """What each piece of the model takes, and which rank holds it."""
    console = plain_console(soft_wrap=False)
    facts = Table(box=box.SIMPLE, pad_edge=False)
    facts.add_column("piece")
    for heading in ("F ms", "I ms", "W ms", "on ranks"):
        facts.add_column(heading, justify="right")
    for number, piece in enumerate(found):
        last = number == len(found) - 1
        ranks = (
            rank
            for rank, chunks in enumerate(parts)
            for part in chunks.values()
            if (part.last if last else number in part.blocks)
        )
        times = (f"{1000 * seconds:.1f}" for seconds in (piece.forward, piece.inputs, piece.weights))
        facts.add_row(piece.name, *times, " and ".join(map(str, sorted(ranks))))
    console.print(facts)


def report(done: Trial) -> None:
    """Print a run: losses, and for each rank its process, idle shares, peak and traffic."""
    console = plain_console(soft_wrap=False)
    real, simulated = done.timeline, done.simulated
    facts = Table(box=box.SIMPLE, pad_edge=False)
    for heading in (
        "rank", "process", "idle, wall %", "idle, simulated %", "peak of live micro-batches", "KB sent",
    ):  # fmt: skip
        facts.add_column(heading, justify="right")
    for rank, (wall, alone) in enumerate(zip(idle_shares(real), idle_shares(simulated), strict=True)):
        sent = f"{done.sent_bytes[rank] / 1000:,.0f}"
        facts.add_row(
            str(rank), str(done.pids[rank]), f"{100 * wall:.1f}", f"{100 * alone:.1f}", str(done.peaks[rank]), sent
        )
    console.print(facts)
    losses = ", ".join(f"{loss:.6f}" for loss in done.losses)
    actions = sum(map(len, done.schedule.actions))
    console.print(Text(f"losses: {losses}; copies of a weight differ by at most {done.drift:g}"))
    console.print(Text(f"all {actions} actions of the last step in the schedule's order on every rank"))
    console.print(
        Text(f"the step took {1000 * real.makespan:.0f} ms; simulated {1000 * simulated.makespan:.0f} ms")
    )
    console.print(Text(EXPLANATION, style="dim"))


def _save(done: Trial, path: Path) -> None:
    try:
        from ...viz.pipeline_trace import traces
    except ImportError as error:
        raise ConfigError(f"--save needs matplotlib ({error}); install dsv3lib[lab]") from error
    drawn = io.StringIO()
    traces(done.timeline, done.simulated)[0].savefig(drawn, format="svg")
    write_whole(path, drawn.getvalue())
