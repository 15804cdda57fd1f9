"""dsv3lib and transformers on a busy CPU: the same pass alone, and with two processes beside it that never rest.

    python benchmarks/cpu_busy.py            # about six minutes; writes data/results/cpu-busy-<date>.json
    python benchmarks/cpu_busy.py --quick    # about a minute, one pass; writes nothing unless --out is given

How threads wait for one another decides (``dsv3lib.openmp``), and is read when torch is loaded: so each policy has a
process of its own, with both sides in it. All processes take turns; who waits for his turn sleeps. ``torch's own`` is
what libgomp does where nobody says anything; ``late`` is what the lessons' set-up cell does where torch came first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Not before torch: of the policies one comes from outside, one comes late.
import torch
from measure import Timing, command_line, keep, machine
from ours import CONFIG
from rich.console import Console
from rich.table import Table

from dsv3lib import ModelConfig, openmp

NEIGHBOURS = 2
GOAL = 3.0  # times the idle pass
POLICIES = {
    "dsv3lib's": dict([openmp.POLICY]),
    "late": {},
    "100 rounds": {"GOMP_SPINCOUNT": "100"},
    "1000 rounds": {"GOMP_SPINCOUNT": "1000"},
    "torch's own": {"GOMP_SPINCOUNT": "300000"},
}
PASSES = ("forward 16", "forward 128", "forward 512", "train 8x256")
HARD = ("torch's own", PASSES[1])  # under load its passes take seconds: this one tells all
SIDES = ("ours", "peer")


class Worker:
    """A process with both sides in it, under one policy; it makes a pass when asked, and sleeps otherwise.

    Args:
        policy: a key of ``POLICIES``. config: sizes. threads: of both sides.
    """

    def __init__(self, policy: str, config: ModelConfig, threads: int) -> None:
        kept = {k: v for k, v in os.environ.items() if k not in (*openmp.VARIABLES, "OMP_NUM_THREADS")}
        here = str(Path(__file__).parent)
        code = f"import torch, sys; sys.path.insert(0, {here!r}); import cpu_busy; cpu_busy.serve()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code], env=kept | POLICIES[policy], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._ask({"config": config.to_dict(), "threads": threads, "late": policy == "late"})

    def _ask(self, words: Any) -> Any:
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process ended with {self._process.wait()}; what it said stands above")
        return json.loads(answer)

    def seconds(self, side: str, work: str) -> float:
        """Of one pass."""
        return self._ask([side, work])

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def serve() -> None:
    """The process of a ``Worker``: a line in, a line out."""
    from cpu import Comparison, same

    given = json.loads(sys.stdin.readline())
    torch.set_num_threads(given["threads"])
    if given["late"] and not openmp.cut_spinning():
        raise RuntimeError("this OpenMP is not GNU's: nothing can be done late")
    comparison = Comparison(ModelConfig.from_dict(given["config"]), 0.0, lambda name: None)
    sides = {"ours": comparison.ours, "peer": comparison.peer}
    best: dict[str, Any] = {}

    def run(side: str, work: str) -> Any:
        kind, size = work.split()
        if kind not in ("forward", "train"):
            raise ValueError(f"work: {work!r}, expected 'forward' or 'train' and a size")
        batch, tokens = map(int, size.split("x")) if "x" in size else (1, int(size))
        ids = torch.randint(comparison.config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(0))
        if kind == "train":
            return sides[side].train_step(ids)
        with torch.inference_mode():
            return sides[side].logits(ids, sides[side].cache())

    print("0", flush=True)
    for line in sys.stdin:
        side, work = json.loads(line)
        if work not in best:  # once, when the machine is idle
            kind = "prefill" if work.startswith("forward") else "train"
            best[work], _ = comparison.fastest(kind, lambda w=work: run("peer", w), 2)
            same(run("ours", work), run("peer", work), work)
        comparison.peer.use(best[work])
        begun = time.perf_counter()
        run(side, work)
        print(json.dumps(time.perf_counter() - begun), flush=True)


@contextmanager
def neighbours(n: int) -> Iterator[None]:
    """Processes that compute for as long as this lasts."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        time.sleep(0.3 if busy else 0.0)
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def in_turn(workers: Mapping[str, Worker], works: Sequence[str], budget_s: float) -> dict[tuple[str, str, str], Timing]:
    """Every policy, side and pass in turn, round after round; each round begins with another policy."""
    found: dict[tuple[str, str, str], list[float]] = {}
    names, rounds, begun = list(workers), 0, time.perf_counter()
    while rounds < 3 or time.perf_counter() - begun < budget_s:
        for policy in names[rounds % len(names) :] + names[: rounds % len(names)]:
            for work in works:
                if policy == HARD[0] and work != HARD[1]:  # not measured
                    continue
                for side in SIDES if rounds % 2 else reversed(SIDES):
                    found.setdefault((policy, work, side), []).append(workers[policy].seconds(side, work))
        rounds += 1
    return {key: Timing(tuple(seconds)) for key, seconds in found.items()}


def run(
    config: ModelConfig, works: Sequence[str], budget_s: float, policies: Sequence[str] = tuple(POLICIES),
    threads: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure, show the table, return the results for the file."""
    begun, threads = time.perf_counter(), threads or os.cpu_count()
    workers = {policy: Worker(policy, config, threads) for policy in policies}
    try:
        in_turn(workers, works, 0.0)  # finds the peer's backends, fills allocators
        loads = {}
        for n in (0, NEIGHBOURS):
            with neighbours(n):
                loads[n] = in_turn(workers, works, budget_s)
    finally:
        for worker in workers.values():
            worker.close()
    columns = []
    for (policy, work, side), idle in loads[0].items():
        busy = loads[NEIGHBOURS][policy, work, side]
        times = round(busy.median / idle.median, 3)
        columns.append(
            {"policy": policy, "variables": POLICIES[policy], "work": work, "side": side, "times_as_long": times,
             "idle": idle.summary(), "busy": busy.summary()}
        )  # fmt: skip
    Console(width=140).print(table(columns))
    import transformers

    return {
        "what": f"dsv3lib and transformers alone and beside {NEIGHBOURS} busy processes, by OpenMP's wait policy",
        "machine": {**machine(), "threads": threads, "transformers": transformers.__version__},
        "seconds": round(time.perf_counter() - begun, 1),
        "goal": {"times_as_long": GOAL, "policy": "dsv3lib's", "work": HARD[1], "side": "ours"},
        "columns": columns,
    }


def table(columns: list[dict[str, Any]]) -> Table:
    """The columns as rows for a terminal."""
    shown = Table(title=f"A pass alone and beside {NEIGHBOURS} busy processes (medians; goal: at most {GOAL:g} times)")
    for name in ("pass", "policy", "side", "idle ms", "busy ms", "times as long", "slowest ms"):
        shown.add_column(name, justify="left" if name in ("pass", "policy", "side") else "right")
    for c in sorted(columns, key=lambda c: PASSES.index(c["work"]) if c["work"] in PASSES else 0):
        idle, busy = c["idle"]["median_ms"], c["busy"]["median_ms"]
        shown.add_row(
            c["work"], c["policy"], c["side"], f"{idle:.1f}", f"{busy:.1f}", f"{c['times_as_long']:.2f}",
            f"{c['busy']['max_ms']:.0f}",
        )  # fmt: skip
    return shown


def main() -> None:
    """The command line."""
    parser = command_line(__doc__, "cpu-busy", f"{HARD[1]} alone")
    parser.set_defaults(threads=None)  # each side's process has one a core
    chosen = parser.parse_args()
    works, budget_s = ([HARD[1]], 10.0) if chosen.quick else (PASSES, 120.0)
    results = run(CONFIG, works, budget_s, threads=chosen.threads)
    keep(results, "cpu-busy", chosen)


if __name__ == "__main__":
    main()
