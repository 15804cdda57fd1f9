"""How a comparison is timed: both sides in turn, medians of many rounds, beside the machine's own limits.

A shared machine is faster in one second than in the next. So nothing is timed alone: the sides take turns,
round after round, each round begins with another side, and what is quoted is a ratio of medians.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsv3lib import gemm, openmp
from dsv3lib.files import write_whole

RESULTS = Path(__file__).resolve().parent.parent / "data" / "results"
Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Seconds of every round, in order.

    Args:
        seconds: one entry a round.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle round, in seconds."""
        return statistics.median(self.seconds)

    def summary(self) -> dict[str, float | int]:
        """Median, fastest and slowest round in milliseconds, and how many rounds there were."""
        return {
            "median_ms": round(1e3 * self.median, 4),
            "min_ms": round(1e3 * min(self.seconds), 4),
            "max_ms": round(1e3 * max(self.seconds), 4),
            "rounds": len(self.seconds),
        }


def seconds_of(call: Call) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleave(
    sides: Mapping[str, Call],
    budget_s: float,
    least: int = 3,
    most: int = 200,
    warm_up: int = 1,
    reset: Call = lambda: None,
) -> dict[str, Timing]:
    """Time several calls in turn until the budget is spent.

    Args:
        sides: what to call, by name.
        budget_s: no new round begins after so many seconds.
        least, most: bounds on the number of rounds; ``least`` is kept even past the budget.
        warm_up: rounds that are not counted.
        reset: called, untimed, before each call.
    """
    names = list(sides)
    for _ in range(warm_up):
        for name in names:
            reset()
            sides[name]()
    found: dict[str, list[float]] = {name: [] for name in names}
    begun, rounds = time.perf_counter(), 0
    while rounds < least or (rounds < most and time.perf_counter() - begun < budget_s):
        first = rounds % len(names)
        for name in names[first:] + names[:first]:
            reset()
            found[name].append(seconds_of(sides[name]))
        rounds += 1
    return {name: Timing(tuple(seconds)) for name, seconds in found.items()}


def matrix_peak(size: int = 1024, budget_s: float = 1.0) -> float:
    """The machine's best FP32 matrix product, in FLOP/s: n x n x n by the quicker library, the fastest of many."""
    a, b, out = (torch.randn(size, size) for _ in range(3))
    sides = {"torch.mm": lambda: torch.mm(a, b, out=out), "gemm.mm": lambda: gemm.mm(a, b)}
    timings = interleave(sides, budget_s, least=5)
    return 2 * size**3 / min(second for timing in timings.values() for second in timing.seconds)


def copy_bandwidth(megabytes: int = 256, budget_s: float = 1.0) -> float:
    """Bytes per second, read and written, of copying memory that no cache holds; the fastest of many."""
    source = torch.ones(megabytes * 2**20 // 4)
    target = torch.empty_like(source)
    timing = interleave({"copy": lambda: target.copy_(source)}, budget_s, least=5)["copy"]
    return 2 * source.nbytes / min(timing.seconds)


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, threads and how they wait, versions, commit and time."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "wait_policy": openmp.IN_FORCE,
        "large_products_by": "oneDNN" if gemm.by_onednn() else "torch's BLAS",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The checkout's commit, with ``+`` where tracked files differ from it; "unknown" outside git."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "../dsv3lib", ".")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a result: the old file stands until the new one is whole."""
    write_whole(path, json.dumps(content, indent=1) + "\n")


def command_line(about: str, name: str, quick: str) -> argparse.ArgumentParser:
    """The options that every comparison on a CPU has: --quick, --threads, --out.

    Args:
        about: the docstring, whose first line describes it. name: of its results. quick: what --quick leaves.
    """
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{quick}, about a minute")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of both sides")
    parser.add_argument("--out", type=Path, help=f"the results file (default: data/results/{name}-<date>.json)")
    return parser


def keep(results: Mapping[str, Any], name: str, chosen: argparse.Namespace, picture: str = "") -> None:
    """Write results where they were asked for; of a run that is not quick beside the others by default.

    Args:
        results: with their ``machine``. name, chosen: as for :func:`command_line`, and what it found.
        picture: the module that draws them into an SVG beside.
    """
    out = chosen.out
    if out is None and not chosen.quick:
        out = RESULTS / f"{name}-{results['machine']['date'][:10]}.json"
    if out is None:
        return
    write_json(out, results)
    print(f"written: {out}")
    if picture:
        importlib.import_module(picture).draw(results, out.with_suffix(".svg"))
        print(f"written: {out.with_suffix('.svg')}")
