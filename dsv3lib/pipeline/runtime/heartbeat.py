"""Heartbeats between ranks that torchrun started: a rank that is silent, gone or has failed ends all, and is named.

Every rank writes what it does, and that it lives, into the store through which the process group has met; a thread of
its own does so twice a second, whatever the rank computes (torch's operations leave Python's lock). The same thread
reads the others' beats. Silence is counted in the rounds of whoever watches: no clocks of two machines are compared,
and of a machine that was paused as a whole nobody is suspected.

A stopped process cannot end itself, and torchrun waits 30 s before it kills one. So each rank has a watchdog process
beside it (``guardian``), on its own machine, which does it sooner.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from ...errors import Dsv3Error
from . import status
from .status import BEAT

SILENT_BEATS = 16
"""Rounds without a beat after which a rank counts as stopped, and is killed by its watchdog: 8 s."""
SILENT_AFTER_FAULT = 8
"""As many where an exchange has failed: then somebody is gone, and the one whose beats do not go on is it."""
GRACE = 1.0
"""Seconds in which a rank may still end by itself, done or with an error of its own, after another has failed."""
_LEFT = "left"


class Heartbeat:
    """A rank's sign of life in the ranks' store, and its watch over the others'.

    Args:
        store: of the process group that is about to be made: all ranks have written when it stands.
        rank: whose it is. world: how many there are.
        end: ends this process, with a message.
    """

    def __init__(
        self, store: dist.Store, rank: int, world: int, end: Callable[[str], None] | None = None
    ) -> None:
        self._store, self._rank, self._world = dist.PrefixStore("heartbeat", store), rank, world
        self._end = end or _end_process
        self._doing, self._patience = "joining", SILENT_BEATS
        self._left, self._parent = threading.Event(), os.getppid()
        self._last: list[bytes] = [b""] * world
        self._missed = [0] * world
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._guardian: subprocess.Popen | None = None
        for key, value in (("beat", "0"), ("end", ""), ("doing", self._doing)):
            self._store.set(f"{key}/{rank}", value)

    def start(self) -> None:
        """Beat and watch from now on; every rank has made its heartbeat."""
        self._guardian = _watchdog(self._rank)
        self._thread.start()

    def tell(self, doing: str) -> None:
        """Write down what begins now: exact for a rank that stops in the midst of it."""
        self._doing = doing
        self._store.set(f"doing/{self._rank}", doing)

    def leave(self) -> None:
        """This rank is done: nobody misses it any more."""
        self._left.set()
        self._store.set(f"end/{self._rank}", _LEFT)
        self._thread.join(GRACE)
        if not self._thread.is_alive():  # it writes there
            self._guardian.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                self._guardian.wait(GRACE)

    def blame(self, error: Exception) -> Dsv3Error:
        """The error with which this rank ends, told to the others.

        If it only saw that another was gone, the watch finds out which, and ends this process.
        """
        text = f"{type(error).__name__}: {error}"
        if status.is_echo(text):
            self._patience = SILENT_AFTER_FAULT
            time.sleep(BEAT * SILENT_BEATS + GRACE)
        self._store.set(f"end/{self._rank}", text)
        return status.failure(self._rank, self._doing, text)

    # ---- the thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            found = self._watch(self._store.clone())  # a connection of its own: the main thread's may be waiting
        except RuntimeError as error:  # as all errors of torch.distributed are
            found = f"the ranks' store does not answer ({error})"
        if found and not self._left.wait(GRACE):
            self._end(f"rank {self._rank} ends: {found}")

    def _watch(self, store: dist.Store) -> str:
        """Beat and look, until this rank leaves or something is wrong."""
        beats = 0
        while not self._left.wait(BEAT):
            beats += 1
            store.set(f"beat/{self._rank}", str(beats))
            found = "torchrun is gone" if os.getppid() != self._parent else self.look(store)
            with suppress(OSError):  # the watchdog is gone, or stopped itself: the others still watch
                os.write(self._guardian.stdin.fileno(), b"\n")
            if found:
                return found
        return ""

    def look(self, store: dist.Store) -> str:
        """One round of watching.

        Args:
            store: a connection to the ranks' store.

        Returns:
            What is wrong with other ranks, or nothing.
        """
        keys = [f"{key}/{rank}" for key in ("beat", "end") for rank in range(self._world)]
        values = store.multi_get(keys)
        beats, ends = values[: self._world], [value.decode() for value in values[self._world :]]
        for rank, beat in enumerate(beats):
            self._missed[rank] = self._missed[rank] + 1 if beat == self._last[rank] else 0
        self._last, found = beats, []
        for rank, (text, rounds) in enumerate(zip(ends, self._missed, strict=True)):
            if rank == self._rank or text == _LEFT or not (text or rounds >= self._patience):
                continue
            doing = store.get(f"doing/{rank}").decode()
            silent = f"rank {rank} stopped or was killed during {doing}: no sign of life for {BEAT * rounds:g} s"
            found.append(str(status.failure(rank, doing, text)) if text else silent)
        return "; ".join(found)


def _watchdog(rank: int) -> subprocess.Popen:
    numbers = map(str, (rank, os.getpid(), BEAT, SILENT_BEATS))
    # A session of its own: what torchrun sends to the rank's process group does not end its watchdog first.
    found = subprocess.Popen(
        [sys.executable, "-I", "-S", str(Path(__file__).with_name("guardian.py")), *numbers],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    os.set_blocking(found.stdin.fileno(), False)  # a watchdog that is stopped itself must not hold the beats up
    return found


def _end_process(why: str) -> None:
    """End at once, while the main thread waits in an exchange that nobody will answer."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    os.write(2, f"{' '.join(why.split())}\n".encode())
    os._exit(1)
