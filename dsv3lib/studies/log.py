"""The log of a recorded study: one line of JSON per run, under ``data/studies/``.

A run that is in the log is not run again, so a study that was stopped goes on where it stood.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from dsv3lib.errors import CourseError
from dsv3lib.files import write_whole

FOLDER = Path(__file__).resolve().parents[2] / "data" / "studies"
"""Where the project's own records lie."""


def read(name: str, folder: Path = FOLDER) -> list[dict[str, Any]]:
    """Return the runs of a study, in the order in which they were made.

    Args:
        name: the study's, as in "balance_ways". folder: where the log lies.

    Raises:
        CourseError: there is no such log, or a line of it is not JSON.
    """
    path = folder / f"{name}.jsonl"
    if not path.exists():
        raise CourseError(
            f"{path.name}: no recorded study there; run `python -m dsv3lib.studies.{name}` to make it"
        )
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise CourseError(
            f"{path.name}: a line is not JSON ({error}); restore the file or run it anew"
        ) from error


def record(
    name: str,
    settings: Iterable[Mapping[str, Any]],
    run: Callable[..., dict[str, Any]],
    folder: Path = FOLDER,
    tell: Callable[[str], None] = print,
) -> None:
    """Run a study's settings one after the other, and write each as a line of its log when it is done.

    Args:
        name: the study's. settings: the keyword arguments of each run. run: takes them, returns what came out.
        folder: where the log lies. tell: is told of each run in a line.
    """
    path = folder / f"{name}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    done = read(name, folder) if path.exists() else []
    for one in settings:
        if any(all(row.get(key) == value for key, value in one.items()) for row in done):
            continue
        done.append({**one, **run(**one)})
        write_whole(path, "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in done))
        tell(" ".join(f"{key}={value}" for key, value in one.items()))
