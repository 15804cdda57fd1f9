"""A view that follows the log of a run in another process, whatever happens to that run.

The log is read as it grows: a half-written line is waited for, a resumed run (whose log is replaced by a
shorter one) is read again from the top, an ended one is looked at again when its log changes, and of a run
that died without a word it is said how long it has been silent.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

from ..errors import Dsv3Error, TrainingError
from ..training.run import log as runlog
from .expert_load import ExpertLoad
from .load_history import LoadHistory

RUN_VARIABLE = "DSV3_WATCH_RUN"
"""How ``dsv3 watch`` tells the page's kernel which run it is to follow."""
_DRAW_SECONDS = 0.25
_QUIET_SECONDS = 10.0
_QUIET_STEPS = 20
"""A run is silent when it has not logged for this many of its steps, and not for ten seconds."""
_RECENT = 50


def first_record(path: Path) -> dict[str, Any]:
    """The header of a run's log, the rest unread.

    Raises:
        TrainingError: there is no such run, no log in it, or its first line is no header.
    """
    if not path.exists():
        raise TrainingError(f"{path}: there is no such run; give the folder that dsv3 train --out has named")
    log = runlog.log_path(path)
    for record in runlog.follow(path, poll_seconds=0.1, timeout_seconds=0):
        if record.get("kind") == "header":
            return record
        break
    raise TrainingError(f"{log}: expected a header in the first line; this is no log of a training run")


class Follower:
    """Keeps a view in step with a log, in two daemon threads: one reads, one draws.

    Args:
        path: the run's folder or log. poll_seconds: pause between looks at the file.
    """

    def __init__(self, path: str | Path, poll_seconds: float = 0.5) -> None:
        self.path, self.poll_seconds = Path(path), poll_seconds
        self.view = ExpertLoad(LoadHistory.of_header(first_record(self.path)), self._title())
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._total: int | None = None
        self._arrived, self._seconds = time.monotonic(), []
        self._event = ""  # what is to be said instead of the step: the end, or what is wrong
        self._threads = [threading.Thread(target=t, daemon=True) for t in (self._read, self._draw)]

    def start(self) -> Follower:
        """Begin to follow."""
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> None:
        """Stop following; the reading thread ends at its log's next change, or with the process."""
        self._stop.set()

    @property
    def state(self) -> str:
        """What the run is doing, in a sentence."""
        with self._lock:
            if self._event:
                return self._event
            steps = self.view.history.steps
            if not steps:
                return "The run has begun; no step is done yet."
            done = f"Step {steps[-1]}" + (f" of {self._total}" if self._total else "")
            silent, usual = time.monotonic() - self._arrived, median(self._seconds or [0.0])
            if silent > max(_QUIET_SECONDS, _QUIET_STEPS * usual):
                return (
                    f"{done}. Nothing has been logged for {silent:.0f} s, where a step took {usual:.1f} s: the "
                    "run may have died. Still looking."
                )
            return f"{done}. Following the run."

    # ---- reading -------------------------------------------------------------------------------------

    def _read(self) -> None:
        while not self._stop.is_set():
            try:
                for record in runlog.follow(self.path, self.poll_seconds):
                    if self._stop.is_set():
                        return
                    self._take(record)
            except Dsv3Error as error:
                self._event = f"{error}. Looking again."
            self._wait_for_change()

    def _take(self, record: dict[str, Any]) -> None:
        kind = record.get("kind")
        with self._lock:
            self._arrived = time.monotonic()
            if kind == "header":  # a new beginning: of the run, or of its log after it was resumed
                self.view.history = LoadHistory.of_header(record)
                self._event, self._total, self._seconds = "", record.get("total_steps"), []
            elif kind == "plan":
                self._total = record.get("total_steps")
            elif kind == "step":
                self.view.history.add(record)
                self._seconds = [*self._seconds[1 - _RECENT :], float(record.get("seconds", 0.0))]
            elif kind == "end":
                self._event = f"The run has ended at step {record.get('step')} ({record.get('reason')})."

    def _wait_for_change(self) -> None:
        before = self._stamp()
        if self._went_on():  # between the last record and the look at the file
            return
        while not self._stop.wait(self.poll_seconds):
            if self._stamp() != before:
                return

    def _went_on(self) -> bool:
        """Whether the log no longer closes with an end."""
        try:
            return runlog.read_log(self.path).end is None
        except Dsv3Error:
            return False

    def _stamp(self) -> tuple[int, int] | None:
        try:
            found = os.stat(runlog.log_path(self.path))
        except OSError:
            return None
        return found.st_ino, found.st_size

    # ---- drawing -------------------------------------------------------------------------------------

    def _draw(self) -> None:
        drawn: Any = None
        while not self._stop.wait(_DRAW_SECONDS):
            with self._lock:
                now = (id(self.view.history), len(self.view.history))
                if now != drawn and self.view.refresh():
                    drawn = now
            self.view.say(self.state)

    def _title(self) -> str:
        return f"Load of every expert · {self.path.name}"


def show() -> None:
    """Follow the run that ``dsv3 watch`` was asked for, in the page that it has opened."""
    from IPython.display import display

    path = os.environ.get(RUN_VARIABLE)
    if not path:
        raise TrainingError(f"{RUN_VARIABLE}: not set; start this page with dsv3 watch RUN")
    follower = Follower(path).start()
    display(follower.view.widget())
