"""Start the ranks of a run as processes of this machine, and watch them: a fault of one ends all, and says where.

A rank that is killed, raises, or stops showing signs of life (SIGSTOP, a machine that hangs) is named with what it was
doing. Whatever happens, no process stays behind.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...checks import require_integer
from ...errors import ConfigError, Dsv3Error, TrainingError
from . import status

SILENCE = 8.0
"""Seconds without a sign of life after which a rank counts as stopped."""
STARTING = 60.0
"""Seconds that a process may take to its first sign of life: imports on a busy machine."""
GRACE = 2.0
"""Seconds in which other ranks may still say what they saw, after the first has failed."""
MOST = 16
"""Processes on one machine, if nothing else is said: each holds some 400 MB before its first tensor."""
_POLL = 0.1


def launch(
    world: int,
    work: str,
    arguments: Sequence[Any] = (),
    timeout: float | int = 600,
    most: int = MOST,
    on_start: Callable[[list[int]], None] = lambda pids: None,
    on_poll: Callable[[list[str]], None] = lambda doing: None,
    show: int | None = None,
    gentle: bool = False,
) -> list[Any]:
    """Run a function in each of ``world`` processes.

    Args:
        world: processes.
        work: "module:function"; called with a ``worker.Rank`` and the arguments.
        arguments: what torch.save can write.
        timeout: seconds after which the run is ended.
        most: refuse more processes than this.
        on_start: called with the process ids, rank by rank.
        on_poll: called again and again with what each rank is doing, for a progress bar.
        show: the rank whose output goes where this process's own does.
        gentle: hand the first Ctrl-C on to the ranks, which end when they can; a second one ends them.

    Returns:
        What each rank's function returned.

    Raises:
        ConfigError: more processes than ``most``; or what the first rank that failed refused so.
        TrainingError: a rank was killed, stopped or raised; it names rank, action and cause.
    """
    require_integer("world", world, 1)
    if world > most:
        raise ConfigError(f"processes: {world}, expected at most {most} on this machine")
    with tempfile.TemporaryDirectory(prefix="dsv3-ranks-") as name:
        folder = Path(name)
        torch.save({"work": work, "arguments": tuple(arguments)}, folder / "task.pt")
        # The parent holds the store, on a port that the system chooses: none can be in use.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        started: list[subprocess.Popen] = []
        try:
            for rank in range(world):
                started.append(_start(folder, rank, world, store.port, shown=rank == show))
            on_start([process.pid for process in started])
            watch = _watch_gently if gentle else _watch
            watch(started, folder, timeout, on_poll)
            return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(world)]
        finally:
            _end(started)
            del store


def _start(folder: Path, rank: int, world: int, port: int, shown: bool) -> subprocess.Popen:
    numbers = map(str, (rank, world, port, os.getpid()))
    # A process group of its own: Ctrl-C reaches the parent alone, which then ends them all.
    with (folder / f"output-{rank}.txt").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "dsv3lib.pipeline.runtime.worker", str(folder), *numbers],
            stdin=subprocess.DEVNULL, stdout=None if shown else output, stderr=None if shown else output,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": _loopback()},
        )  # fmt: skip


def _loopback() -> str:
    return "lo" if sys.platform.startswith("linux") else "lo0"


def _watch_gently(
    started: list[subprocess.Popen], folder: Path, timeout: float | int, on_poll: Callable[[list[str]], None]
) -> None:
    """As :func:`_watch`; the first Ctrl-C asks the ranks to end by themselves."""
    try:
        _watch(started, folder, timeout, on_poll)
    except KeyboardInterrupt:
        for process in started:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        _watch(started, folder, timeout, on_poll)


def _watch(
    started: list[subprocess.Popen],
    folder: Path,
    timeout: float | int,
    on_poll: Callable[[list[str]], None] = lambda doing: None,
) -> None:
    """Return when all have ended well; raise when one has not."""
    begun = time.time()
    while True:
        codes = [process.poll() for process in started]
        if all(code == 0 for code in codes):
            return
        now = time.time()
        if any(code not in (None, 0) for code in codes):
            killed = [rank for rank, code in enumerate(codes) if code is not None and code < 0]
            if not killed:
                time.sleep(GRACE if len(started) > 1 else 0.0)
            raise _failure([process.poll() for process in started], folder)
        every = [status.read(folder, rank) for rank in range(len(started))]
        on_poll([seen.doing for seen in every])
        for rank, (code, seen) in enumerate(zip(codes, every, strict=True)):
            silent = now - seen.beat if seen.beat else now - begun - STARTING
            if code is None and silent > SILENCE:
                raise TrainingError(
                    f"rank {rank} stopped during {seen.doing}: no sign of life for {SILENCE:g} s; all ranks were "
                    "ended"
                )
        if now - begun > timeout:
            doing = "; ".join(f"rank {r}: {status.read(folder, r).doing}" for r in range(len(started)))
            raise TrainingError(f"the run took longer than {timeout:g} s and was ended ({doing})")
        time.sleep(_POLL)


def _failure(codes: list[int | None], folder: Path) -> Dsv3Error:
    """The error of the rank that failed first: a killed one, else the one whose own error is no lost connection."""
    seen = {rank: status.read(folder, rank) for rank, code in enumerate(codes) if code not in (None, 0)}
    for rank, one in seen.items():
        if codes[rank] < 0 and not one.error:
            return TrainingError(
                f"rank {rank} was killed (signal {-codes[rank]}) during {one.doing}; all ranks were ended"
            )
    own = [rank for rank, one in seen.items() if one.error and not status.is_echo(one.error)]
    rank = min(own or seen, key=lambda rank: seen[rank].beat)
    text = seen[rank].error or f"ended with status {codes[rank]}"
    if not seen[rank].error:
        text += ": " + (folder / f"output-{rank}.txt").read_text(errors="replace")[-500:]
    return status.failure(rank, seen[rank].doing, text)


def _end(started: list[subprocess.Popen]) -> None:
    """Kill what still runs (a stopped process too), with its children, and wait for it."""
    for process in started:
        if process.poll() is None:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        process.wait()
