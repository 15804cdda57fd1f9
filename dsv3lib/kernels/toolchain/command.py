"""``dsv3 kernels``: what the machine code of each kernel holds, on a computer that need not have a GPU."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context

from rich import box
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from ...errors import KernelError
from ...terminal import plain_console
from . import aot, tuning

EXPLANATION = """\
Registers are counted per thread: 255 is the most, and 128 leave room for 512 threads on a multiprocessor. \
Spilled are the bytes that a thread keeps in memory because its registers do not suffice: slow, and none in \
what ships for sm_90. Shared is what a block of threads takes of a multiprocessor's fast memory; it decides \
how many blocks run side by side. The instruction multiplies matrices: wgmma is Hopper's, for four warps at \
once and out of shared memory; mma.sync the older one, for a single warp; tcgen05 is Blackwell's. e4m3 means \
FP8 operands, at twice the rate of bf16."""


@dataclass(frozen=True)
class Line:
    """One row of the table: a kernel, how it was built, and what the code holds."""

    operation: str
    variant: str
    generation: str
    settings: str
    registers: int
    spilled: int
    shared: int
    warps: int
    instruction: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``dsv3 kernels``."""
    parser.add_argument(
        "families", nargs="*", metavar="FAMILY", help=f"of {', '.join(aot.FAMILIES)}; all by default"
    )
    parser.add_argument(
        "--generation",
        choices=[*tuning.GENERATIONS, "all"],
        default="sm_90",
        help="sm_90, Hopper, by default",
    )
    parser.add_argument("--json", action="store_true", help="print the table as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Compiles what was asked for and prints the table; returns 0."""
    unknown = [family for family in arguments.families if family not in aot.FAMILIES]
    if unknown:
        raise KernelError(f"no kernels called {', '.join(unknown)}; there are: {', '.join(aot.FAMILIES)}")
    generations = tuning.GENERATIONS if arguments.generation == "all" else (arguments.generation,)
    lines = list(compile_lines(tuple(arguments.families) or tuple(aot.FAMILIES), generations))
    if arguments.json:
        print(json.dumps([asdict(line) for line in lines], indent=1))
    else:
        console = plain_console(soft_wrap=False)
        console.print(table(lines))
        console.print(Text(EXPLANATION, style="dim"))
    return 0


def compile_lines(
    families: Sequence[str], generations: Sequence[str], progress: bool = True
) -> Iterator[Line]:
    """Compile kernels, several at a time, and give a line for each as it is ready, in order.

    Args:
        families: files of ``kernels``.
        generations: such as "sm_90".
        progress: whether to show a bar.

    Raises:
        KernelError: Triton is missing, or a kernel does not compile.
    """
    aot.require_compiler()
    families, generations = tuple(families), tuple(generations)
    count = sum(1 for _ in aot.builds(families, generations))
    workers = min(os.cpu_count() or 1, count)
    if workers <= 1 or count <= 4:  # a new process costs more than compiling a few
        work = (_line(families, generations, i) for i in range(count))
        yield from tqdm(work, "compiling", count, disable=not progress, leave=False)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        work = pool.map(_line, [families] * count, [generations] * count, range(count))
        yield from tqdm(work, "compiling", count, disable=not progress, leave=False)


def _line(families: tuple[str, ...], generations: tuple[str, ...], index: int) -> Line:
    """The line of one build, found by its place: a jitted function cannot be handed to another process."""
    return line_of(next(b for i, b in enumerate(aot.builds(families, generations)) if i == index))


def line_of(build: aot.Build) -> Line:
    """Compile one kernel and say what its code holds."""
    made = aot.compile_build(build)
    sizes = [f"{k.removeprefix('num_').lower()} {v}" for k, v in build.row.items() if k != "when"]
    return Line(
        build.specimen.operation,
        build.specimen.variant,
        build.generation,
        ", ".join(build.bounds + sizes),
        made.registers,
        made.spilled,
        made.shared,
        made.warps,
        made.instruction,
    )


def table(lines: Sequence[Line]) -> Table:
    """The lines as a table, settings under the name, spills in red."""
    shown = Table(title="dsv3 kernels", title_justify="left", box=box.SIMPLE, pad_edge=False)
    several = len({line.generation for line in lines}) > 1
    shown.add_column("operation", overflow="fold", ratio=1)
    if several:
        shown.add_column("for")
    for heading in ("registers", "spilled", "shared"):
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column("instruction", no_wrap=True)
    for line in lines:
        name = Text(" ".join(filter(None, (line.operation, line.variant))))
        name.append(f"\n  {line.settings}", style="dim")
        generation = [line.generation] if several else []
        spilled = Text(str(line.spilled), style="red" if line.spilled else "")
        shared = f"{line.shared / 1024:.0f} KiB"
        shown.add_row(name, *generation, str(line.registers), spilled, shared, line.instruction or "–")
    return shown
