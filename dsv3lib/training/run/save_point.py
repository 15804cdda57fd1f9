"""Save points: folders from which a run goes on, written whole or not at all.

``RUN/checkpoints/step-00000100/`` holds a model folder like any other (``config.json``, safetensors,
tokenizer: `dsv3 generate` and transformers load it) and in ``training/`` what only the trainer needs. A save
point is written under a temporary name, flushed to the disk and renamed; the ones before it are removed only
then. Whatever happens in between (a kill, a full disk), the run's folder holds the last whole one.

Safetensors and JSON only: no file here can run code when it is read.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...errors import CheckpointError, SaveError
from ...files import with_utf8_name

FOLDER_NAME = "checkpoints"
_PREFIX = "step-"
_UNFINISHED = ".unfinished-"


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder appear under its name only when ``fill`` has written all of it.

    Args:
        target: the folder's final path; a folder that stands there is replaced.
        fill: writes the files into the folder that it is given.

    Raises:
        SaveError: the disk is full or cannot be written; what stood at ``target`` is intact.
    """
    unfinished = unfinished_folder(target)
    outdated = target.with_name(f"{_UNFINISHED}old-{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        fill(unfinished)
        for path in [*unfinished.rglob("*"), unfinished]:
            _sync(path)
        if target.exists():  # a folder with files in it cannot be renamed over
            shutil.rmtree(outdated, ignore_errors=True)
            os.replace(target, outdated)
        os.replace(unfinished, target)
        _sync(target.parent)
    except (OSError, SafetensorError) as error:
        if not target.exists() and outdated.exists():
            os.replace(outdated, target)
        shutil.rmtree(unfinished, ignore_errors=True)
        raise SaveError(
            f"{target}: could not be written ({_cause(error)}); earlier files are intact. Free some space or "
            "fix the folder's permissions, then resume the run"
        ) from error
    shutil.rmtree(outdated, ignore_errors=True)


def unfinished_folder(target: Path) -> Path:
    """Where ``write_folder`` writes until all is there."""
    return target.with_name(f"{_UNFINISHED}{target.name}")


def savepoint_folder(run: Path, step: int) -> Path:
    """Where the save point of a step lies."""
    return run / FOLDER_NAME / f"{_PREFIX}{step:08d}"


def latest_savepoint(run: str | Path) -> Path | None:
    """The newest whole save point of a run's folder, ``None`` where there is none yet."""
    found = _savepoints(Path(run))
    return found[-1] if found else None


def is_save_point(folder: Path) -> bool:
    """Whether a folder is one by its place and name."""
    return folder.parent.name == FOLDER_NAME and folder.name.startswith(_PREFIX)


def damaged(folder: Path, error: Exception) -> CheckpointError:
    """The error for a save point whose model cannot be read; what to do is another thing than with a download."""
    return CheckpointError(
        f"{folder}: this save point is damaged ({error}). It cannot be fetched again: remove its folder, and the run "
        "goes on from the one before"
    )


def remove_outdated(run: Path, keep: int) -> None:
    """Keep the newest ``keep`` save points; remove the rest and what a killed process left half-written."""
    folder = run / FOLDER_NAME
    for path in _savepoints(run)[:-keep]:
        # Renamed first: a kill in the middle of the removal must not leave half a save point under its name.
        outdated = path.with_name(f"{_UNFINISHED}old-{path.name}")
        shutil.rmtree(outdated, ignore_errors=True)
        os.replace(path, outdated)
    for path in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def _savepoints(run: Path) -> list[Path]:
    return sorted(path for path in (run / FOLDER_NAME).glob(f"{_PREFIX}*") if path.is_dir())


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write named tensors to one safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of one safetensors file.

    Raises:
        CheckpointError: the file is missing, truncated or none of safetensors.
    """
    try:
        with ExitStack() as stack, safe_open(with_utf8_name(path, stack), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}); remove this save point's folder, and the run goes on from "
            "the one before it"
        ) from error


def save_json(path: Path, value: Any) -> None:
    """Write one JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json_text(value), encoding="utf-8")


def json_text(value: Any) -> str:
    """A value as the JSON that these files hold."""
    return json.dumps(value, allow_nan=False, indent=1) + "\n"


def load_json(path: Path) -> Any:
    """Read one JSON file.

    Raises:
        CheckpointError: it is missing or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); the save point is damaged") from error


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of every global generator (torch, its devices, numpy, Python): tensors, and what is JSON."""
    tensors = {"torch.cpu": torch.get_rng_state()}
    for index in range(torch.cuda.device_count()):
        tensors[f"torch.cuda.{index}"] = torch.cuda.get_rng_state(index)
    name, keys, *rest = np.random.get_state()
    version, numbers, gauss = random.getstate()
    tensors["numpy"] = torch.from_numpy(keys.astype(np.int64))
    return tensors, {"numpy": [name, *rest], "python": [version, list(numbers), gauss]}


def set_random_state(tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Put every global generator back to where ``random_state`` found it."""
    torch.set_rng_state(tensors["torch.cpu"])
    for index in range(torch.cuda.device_count()):
        if f"torch.cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"torch.cuda.{index}"], index)
    name, *rest = values["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), *rest))
    version, numbers, gauss = values["python"]
    random.setstate((version, tuple(numbers), gauss))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot flush a folder
            raise
    finally:
        os.close(descriptor)


def _cause(error: Exception) -> str:
    """The system's own words for what went wrong, without those of the layers between."""
    while isinstance(error, SaveError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return getattr(error, "strerror", None) or str(error)
