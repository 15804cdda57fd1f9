"""Which settings are fastest on this device, found by walking uphill from those that ship.

From the best shipped row one setting is changed at a time, and what is faster is kept, until nothing is or the
time is over. Writes ``dsv3lib/kernels/tuned/<device>.json``, whose rows are preferred on that device; shapes that
were not tried find the shipped rows behind them. Settings that do not compile, do not fit or give another result
are passed over.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from gpu_peers import difference
from gpu_timing import Stopwatch
from gpu_work import PAGE, mean_relative, noise, uneven
from torch import Tensor
from tqdm import tqdm

from dsv3lib import kernels as k
from dsv3lib.kernels.toolchain import tuning

Settings = Mapping[str, Any]
AGREES = 1e-3
CHOICES: Mapping[str, Sequence[int]] = MappingProxyType(
    {
        "num_stages": (2, 3, 4, 5, 6),
        "num_warps": (4, 8),
        "HALVES": (1, 2),
        "SWAP": (0, 1),
        "TMA": (0, 1),
        "BLOCK_M": (32, 64, 128, 256),
        "BLOCK_N": (32, 64, 128, 256),
        "BLOCK_K": (32, 64, 128),
        "BLOCK_ROWS": (16, 32, 64),
        "PER_PROCESSOR": (1, 2, 3),
        "GROUP": (4, 8, 16),
    }
)


@dataclass
class Trial:
    """One operation at one shape: the call with given settings, and the bounds its winner gets.

    Args:
        operation: as in the files of settings. when: bounds of the row. shape: for the report.
        call: runs with settings. expected: the result of any right settings.
    """

    operation: str
    when: Mapping[str, Sequence[int]]
    shape: Mapping[str, int]
    call: Callable[[dict[str, Any]], Tensor]
    expected: Tensor
    matches: Callable[[Tensor, Tensor], float] = difference


def neighbours(settings: Settings) -> Iterator[dict[str, Any]]:
    """The same with one setting changed."""
    for name, values in CHOICES.items():
        for value in values:
            if name in settings and settings[name] != value:
                yield {**settings, name: value}


def trials(device: torch.device, small: bool = False) -> Iterator[Trial]:
    """The operations whose settings depend on the shape, with the bounds of their rows."""
    n, d = (256, 256) if small else (24576, 7168)
    for low, high in ((1, 64), (65, 128), (129, 1024), (1025, 2**31 - 1)):
        m = 40 if small else min(high, 4096)
        (a, a_s), (b, b_s) = k.quantize_tiles(noise(device, m, d)), k.quantize_blocks(noise(device, n, d))
        yield Trial(
            "gemm_fp8", {"M": [low, high], "TILED": [0, 0], "OUT": [2, 2]}, {"M": m, "N": n, "K": d},
            lambda s, given=(a, a_s, b, b_s): k.gemm_fp8(*given, settings=s),
            k.gemm_fp8_ref(a, a_s, b, b_s), mean_relative,
        )  # fmt: skip
        if small:
            break
    g, m, n, d = (3, 20, 128, 128) if small else (8, 4096, 4096, 7168)
    counts = uneven(device, g, g * m)
    x, w = noise(device, g * m, d), noise(device, g, n, d)
    yield Trial(
        "grouped_gemm", {"M": [g * m // 4, 4 * g * m], "ALIGNED": [1, 1]}, {"G": g, "M": m, "N": n, "K": d},
        lambda s: k.grouped_gemm(x, w, counts, settings=s), k.grouped_gemm_ref(x, w, counts),
    )  # fmt: skip
    for heads in (16, 128):
        batch, context, c, r = (2, 70, 128, 16) if small else (128, 8192, 512, 64)
        pages = -(-context // PAGE)
        cache = noise(device, batch * pages, PAGE, c + r)
        table = torch.arange(batch * pages, device=device, dtype=torch.int32).view(batch, pages)
        lengths = torch.full((batch,), context, device=device, dtype=torch.int32)
        q = noise(device, batch, 1, heads, c + r)
        given = (q, cache, table, lengths, 0.1, c)
        rows = [1, 32] if heads == 16 else [33, 512]
        yield Trial(
            "mla_decode", {"rows": rows, "bytes": [2, 2]}, {"B": batch, "S": context, "H": heads},
            lambda s, given=given: k.mla_decode(*given, settings=s)[0], k.mla_decode_ref(*given)[0],
        )  # fmt: skip


def tune(
    watch: Stopwatch, generation: str, budget_s: float = 45.0, small: bool = False
) -> dict[str, list[dict[str, Any]]]:
    """The fastest settings of each trial, before the rows that ship.

    Args:
        generation: whose rows to start from. budget_s: seconds a trial. small: a rehearsal.

    Returns:
        A table for ``tuning.write``.
    """
    table: dict[str, list[dict[str, Any]]] = {}
    for trial in trials(watch.device, small):
        shipped = [dict(row) for row in tuning.read(tuning.FOLDER / f"{generation}.json")[trial.operation]]
        best = climb(watch, trial, shipped, budget_s)
        if best is not None:
            print(f"{trial.operation} {dict(trial.shape)}: {1e6 * best[0]:.1f} µs with {best[1]}")
            found = {"when": {name: list(bounds) for name, bounds in trial.when.items()}, **best[1]}
            rows = table.setdefault(trial.operation, shipped)
            rows.insert(len(rows) - len(shipped), found)
    return table


def climb(
    watch: Stopwatch, trial: Trial, shipped: Sequence[Settings], budget_s: float
) -> tuple[float, dict[str, Any]] | None:
    """Seconds and settings at the top of the hill, or ``None`` where not even a shipped row works."""
    until = time.perf_counter() + budget_s
    seen: dict[str, float] = {}

    def seconds(settings: dict[str, Any]) -> float:
        key = repr(sorted(settings.items()))
        if key not in seen:
            seen[key] = measured(watch, trial, settings)
        return seen[key]

    starts = [{name: value for name, value in row.items() if name != "when"} for row in shipped]
    best = min(starts, key=seconds)
    climbing = True
    with tqdm(desc=f"{trial.operation} {dict(trial.shape)}", unit="setting", leave=False) as bar:
        while climbing and time.perf_counter() < until:
            climbing = False
            for settings in neighbours(best):
                bar.update()
                if seconds(settings) < seconds(best):
                    best, climbing = settings, True
                    break
                if time.perf_counter() > until:
                    break
    return None if seconds(best) == math.inf else (seconds(best), best)


def measured(watch: Stopwatch, trial: Trial, settings: dict[str, Any]) -> float:
    """Seconds with these settings; infinity where they do not work or give another result."""
    try:
        if not trial.matches(trial.call(settings), trial.expected) <= AGREES:
            return math.inf
        return watch.twice(lambda: trial.call(settings)).seconds
    except Exception:  # settings that the compiler, the assembler or the card refuses, each in its own way
        return math.inf
