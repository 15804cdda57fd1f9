"""The run's log: one JSON object a line, written as it happens, readable while it grows.

``kind`` says what a line is: ``header`` (settings, versions, domains; the first line), ``plan`` (the number
of steps, once it is known), ``step``, ``validation`` and ``end``. Every line is one write, so a process
killed at any moment leaves whole lines and at most one half line at the end, which readers pass over. Floats
are written with all their digits: equal text means equal bits.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import SaveError, TrainingError
from ...files import write_whole

Record = dict[str, Any]
FILE_NAME = "log.jsonl"


class RunLog:
    """Appends records to a log file, each in one flushed write.

    Args:
        path: the file; it is created where it does not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise SaveError(f"{self.path}: the log cannot be opened ({error.strerror})") from error

    def write(self, record: Record) -> None:
        """Append one record.

        Raises:
            SaveError: the disk is full or the file cannot be written; the log ends with the record before.
        """
        line = (json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n").encode()
        before = os.fstat(self._descriptor).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
        except OSError as error:
            os.ftruncate(self._descriptor, before)
            raise SaveError(
                f"{self.path}: no more can be logged ({error.strerror}); free some space, then resume the run"
            ) from error

    def sync(self) -> None:
        """Return once what was written is on the disk, not only with the operating system."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file; nothing can be written afterwards."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@dataclass(frozen=True)
class RunHistory:
    """What a log says, sorted by kind."""

    header: Record
    plan: Record | None = None
    steps: list[Record] = field(default_factory=list)
    validations: list[Record] = field(default_factory=list)
    end: Record | None = None

    def column(self, *path: str) -> list[Any]:
        """One value a step, such as ``column("losses", "main")``.

        Raises:
            TrainingError: the steps have no such value.
        """
        values: list[Any] = list(self.steps)
        for name in path:
            try:
                values = [value[name] for value in values]
            except (KeyError, TypeError) as error:
                found = ", ".join(self.steps[0]) if self.steps else "none"
                raise TrainingError(f"the log has no {'.'.join(path)!r}; a step has {found}") from error
        return values


def read_log(path: str | Path) -> RunHistory:
    """Read a log, finished or still growing; a half-written last line is passed over.

    Args:
        path: the log, or the run's folder.

    Raises:
        TrainingError: there is no log, a line in its middle is broken, or it does not begin with a header.
    """
    path = log_path(path)
    records = list(_parse(path, _read(path)[0]))
    if not records or records[0].get("kind") != "header":
        raise TrainingError(f"{path}: expected a header in the first line; this is no log of a training run")
    plans = [r for r in records if r.get("kind") == "plan"]
    return RunHistory(
        header=records[0],
        plan=plans[-1] if plans else None,
        steps=[r for r in records if r.get("kind") == "step"],
        validations=[r for r in records if r.get("kind") == "validation"],
        end=records[-1] if records[-1].get("kind") == "end" else None,  # an earlier one was gone on from
    )


def follow(
    path: str | Path, poll_seconds: float | int = 0.5, timeout_seconds: float | int | None = None
) -> Iterator[Record]:
    """Yield the records of a log as they come, from its first line on, until the run ends.

    Where the run is resumed meanwhile, the log is replaced by a shorter one: reading starts again from the
    top, and the header that is then yielded once more tells the reader to begin afresh.

    Args:
        path: the log, or the run's folder. poll_seconds: pause between looks.
        timeout_seconds: give up after this long without a new record; ``None`` waits for ever.

    Raises:
        TrainingError: there is no log, or a line is broken.
    """
    path = log_path(path)
    position, identity, quiet_since = 0, None, time.monotonic()
    while True:
        content, found = _read(path, position)
        if identity not in (None, found.st_ino) or found.st_size < position:
            position, identity = 0, None
            continue
        identity = found.st_ino
        end = content.rfind(b"\n") + 1
        for record in _parse(path, content[:end]):
            quiet_since = time.monotonic()
            yield record
            if record.get("kind") == "end":
                return
        position += end
        if timeout_seconds is not None and time.monotonic() - quiet_since > timeout_seconds:
            return
        time.sleep(poll_seconds)


def cut_log(path: str | Path, step: int) -> None:
    """Drop what was logged after ``step``, and every ``end``, so that a resumed run goes on without a seam.

    The shorter log is written beside the old one and renamed over it: at no moment is there none.

    Raises:
        TrainingError: steps up to ``step`` are missing from the log. SaveError: it cannot be written.
    """
    path = log_path(path)
    kept, steps = [], 0
    for record in _parse(path, _read(path)[0]):
        if record.get("kind") == "end" or record.get("step", 0) > step:
            continue
        kept.append(json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n")
        steps += record.get("kind") == "step"
    if steps != step:
        raise TrainingError(
            f"{path}: holds {steps} steps, expected the {step} of the checkpoint; put the whole log back, "
            "or begin a new run"
        )
    write_whole(path, "".join(kept))


def log_path(path: str | Path) -> Path:
    """The log of a run's folder, or the path itself where it is a file already."""
    path = Path(path)
    return path / FILE_NAME if path.is_dir() else path


def _read(path: Path, position: int = 0) -> tuple[bytes, os.stat_result]:
    """What stands behind a position, and of which file: at that path there may be another, or none, a moment later."""
    try:
        with open(path, "rb") as file:
            file.seek(position)
            return file.read(), os.fstat(file.fileno())
    except OSError as error:
        raise TrainingError(f"{path}: there is no log to read ({error.strerror})") from error


def _parse(path: Path, content: bytes) -> Iterator[Record]:
    lines = content.split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is not whole yet
        try:
            record = json.loads(line)
        except ValueError as error:
            raise TrainingError(f"{path}: line {number} is not JSON ({error}); the log was edited") from error
        if not isinstance(record, dict):
            raise TrainingError(f"{path}: line {number} holds {record!r}, expected an object")
        yield record
