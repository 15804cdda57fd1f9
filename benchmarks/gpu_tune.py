"""Which settings are fastest on this device: each candidate at each shape, the best written down.

Writes ``dsv3lib/kernels/tuned/<device>.json``, which from then on is preferred on that device for the operations
in it. A candidate that does not compile, does not fit or gives another result is passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from gpu_cases import PAGE, mean_relative, noise, uneven
from gpu_peers import difference
from gpu_timing import Stopwatch
from torch import Tensor
from tqdm import tqdm

from dsv3lib import kernels as k
from dsv3lib.kernels import tuning

Settings = Mapping[str, Any]
AGREES = 1e-3


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


def candidates(operation: str, shipped: Sequence[Settings]) -> Iterator[dict[str, Any]]:
    """The shipped rows, and each with other warps, stages and blocks around them."""
    seen = set()
    for row in shipped:
        base = {name: value for name, value in row.items() if name != "when"}
        blocks = [name for name in base if name.startswith("BLOCK_")]
        choices = {
            "num_warps": {4, 8, base.get("num_warps", 4)},
            "num_stages": {2, 3, 4, 5, base.get("num_stages", 3)},
        }
        choices |= {name: {base[name] // 2, base[name], base[name] * 2} - {0, 8} for name in blocks}
        flags = {name: {True, False} for name, value in base.items() if isinstance(value, bool)}
        splits = {name: {1, 2, 4, 8} for name in base if name.startswith("SPLIT")}
        choices |= flags | splits
        names = sorted(choices)
        for values in product(*(sorted(choices[name]) for name in names)):
            row_tried = base | dict(zip(names, values, strict=True))
            key = tuple(sorted(row_tried.items()))
            if key not in seen:
                seen.add(key)
                yield row_tried


def trials(device: torch.device, small: bool = False) -> Iterator[Trial]:
    """The operations whose settings depend on the shape, with the bounds of their rows."""
    n, d = (256, 256) if small else (24576, 7168)
    last = None
    for low, high in ((1, 64), (65, 128), (129, 1024), (1025, 2**31 - 1)):
        m = min(high, 4096)
        if small:
            m = min(m, 40)
        (a, a_s), (b, b_s) = k.quantize_tiles(noise(device, m, d)), k.quantize_blocks(noise(device, n, d))
        bounds = {"M": [low, high]} if high < 2**31 - 1 else {}
        call = lambda s, a=a, a_s=a_s, b=b, b_s=b_s: k.gemm_fp8(a, a_s, b, b_s, settings=s)  # noqa: E731
        expected = k.gemm_fp8_ref(a, a_s, b, b_s)
        last = Trial("gemm_fp8", bounds, {"M": m, "N": n, "K": d}, call, expected, mean_relative)
        yield last
        if small:
            break
    g, m, n, d = (3, 20, 128, 128) if small else (8, 4096, 4096, 7168)
    counts = uneven(device, g, g * m)
    x, w = noise(device, g * m, d), noise(device, g, n, d)
    yield Trial(
        "grouped_gemm", {}, {"G": g, "M": m, "N": n, "K": d},
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
        yield Trial(
            "mla_decode", {"H": [1, 32]} if heads == 16 else {}, {"B": batch, "S": context, "H": heads},
            lambda s, given=given: k.mla_decode(*given, settings=s)[0], k.mla_decode_ref(*given)[0],
        )  # fmt: skip


def tune(watch: Stopwatch, most: int = 60, small: bool = False) -> dict[str, list[dict[str, Any]]]:
    """The fastest settings of each trial.

    Args:
        most: candidates a trial. small: a rehearsal.

    Returns:
        A table for ``tuning.write``: per operation its rows, the one without bounds last.
    """
    table: dict[str, list[dict[str, Any]]] = {}
    for trial in trials(watch.device, small):
        rows = [row for file in tuning.shipped("sm_90") for row in file.get(trial.operation, [])]
        best: tuple[float, dict[str, Any]] | None = None
        tried = list(candidates(trial.operation, rows))[:most]
        for settings in tqdm(tried, f"{trial.operation} {dict(trial.shape)}", leave=False):
            seconds = measured(watch, trial, settings)
            if seconds is not None and (best is None or seconds < best[0]):
                best = seconds, settings
        if best is not None:
            print(f"{trial.operation} {dict(trial.shape)}: {1e6 * best[0]:.1f} µs with {best[1]}")
            table.setdefault(trial.operation, []).append({"when": dict(trial.when), **best[1]})
    return {name: rows for name, rows in table.items() if not rows[-1]["when"]}


def measured(watch: Stopwatch, trial: Trial, settings: dict[str, Any]) -> float | None:
    """Seconds with these settings; ``None`` where they do not work or give another result."""
    try:
        if not trial.matches(trial.call(settings), trial.expected) <= AGREES:
            return None
        return watch.twice(lambda: trial.call(settings)).seconds
    except Exception:  # settings that the compiler, the assembler or the card refuses, each in its own way
        return None
