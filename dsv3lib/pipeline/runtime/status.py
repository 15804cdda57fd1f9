"""What each rank is doing, in a small file that outlives the process: read by whoever watches, after a kill too."""

from __future__ import annotations

import mmap
import os
import threading
import time
from pathlib import Path
from typing import NamedTuple

from ... import errors
from ...errors import Dsv3Error, TrainingError

_SIZE = 4096
BEAT = 0.5
"""Seconds between two signs of life."""


class Seen(NamedTuple):
    """A rank's status.

    Args:
        beat: time of its last sign of life, by the machine's clock; 0 before the first.
        doing: what it does.
        error: with what it failed, or nothing.
    """

    beat: float
    doing: str
    error: str


def status_file(folder: Path, rank: int) -> Path:
    """Where a rank writes."""
    return folder / f"rank-{rank}.status"


def read(folder: Path, rank: int) -> Seen:
    """The status of a rank, empty before its process has begun."""
    path = status_file(folder, rank)
    if not path.exists():
        return Seen(0.0, "starting", "")
    lines = path.read_bytes().rstrip(b"\0").decode(errors="replace").split("\n", 2)
    if len(lines) < 3 or not lines[0]:
        return Seen(0.0, "starting", "")
    return Seen(float(lines[0]), lines[1], lines[2].rstrip("\0"))


def failure(rank: int, doing: str, error: str) -> Dsv3Error:
    """The error of a run whose rank has failed, of the rank's own kind.

    Args:
        rank: which. doing: what. error: "TypeError: …".
    """
    kind = getattr(errors, error.partition(":")[0], TrainingError)
    return kind(f"rank {rank} failed during {doing}: {error}; all ranks were ended")


def is_echo(error: str) -> bool:
    """Whether a rank only saw that another was gone."""
    return error.startswith("DistBackendError") or "onnection" in error or "gloo" in error.lower()


class Status:
    """The writing side, with a thread that beats; a process whose parent is gone ends itself.

    Args:
        folder: of all ranks. rank: whose status it is. parent: process id of whoever watches, or ``None``.
    """

    def __init__(self, folder: Path, rank: int, parent: int | None = None) -> None:
        path = status_file(folder, rank)
        path.write_bytes(b"\0" * _SIZE)
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _SIZE)
        self._lock, self._parent = threading.Lock(), parent
        self._doing, self._error, self._stopped = "starting", "", threading.Event()
        self._write()
        threading.Thread(target=self._beat, daemon=True).start()

    def tell(self, doing: str) -> None:
        """Write down what begins now."""
        self._doing = doing
        self._write()

    def fail(self, error: str) -> None:
        """Write down with what it failed."""
        self._error = error
        self._write()

    def _write(self) -> None:
        with self._lock:
            text = f"{time.time():.3f}\n{self._doing}\n{self._error}".encode()[:_SIZE]
            self._memory[: len(text)] = text
            self._memory[len(text) :] = b"\0" * (_SIZE - len(text))

    def _beat(self) -> None:
        while not self._stopped.wait(BEAT):
            if self._parent is not None and os.getppid() != self._parent:
                os._exit(1)  # nobody watches any more: no orphan stays behind
            self._write()
