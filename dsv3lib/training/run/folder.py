"""The folder of one training run: what the run is, its log, its save points, and what they may be mixed with.

    RUN/run.json                   settings of training, model and text; versions; the number of steps
    RUN/log.jsonl                  one line a step (``log.py``)
    RUN/tokenizer/                 the tokenizer, where one was given
    RUN/checkpoints/step-…/        save points (``save_point.py``)
    RUN/model/                     the trained model, when the run has ended

The folder appears at once and whole, with ``run.json`` in it; so a run is either there or it is not. To
resume is to find the same settings again: with others the losses would be of a third run that nobody can
repeat.
"""

from __future__ import annotations

import hashlib
import os
import platform
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ...errors import CheckpointError, ConfigError, TrainingError
from ...files import write_whole
from ...model import DeepSeekV3
from ..loop.settings import TrainingConfig
from ..text.data import PackedStream
from ..text.tokenizer import Tokenizer
from . import log as runlog
from . import save_point

_FORMAT = 1
RUN_FILE = "run.json"
MODEL_FOLDER = "model"
TOKENIZER_FOLDER = "tokenizer"
_ABSENT = object()
_COMPARED = ("training", "model", "stream", "microbatches", "initial_weights")


def describe_run(
    model: DeepSeekV3, stream: PackedStream, config: TrainingConfig, source: dict[str, Any]
) -> dict[str, Any]:
    """All that the losses of a run depend on, as JSON knows it."""
    names = ("dsv3lib", "torch", "numpy", "tokenizers", "safetensors")
    return {
        "format": _FORMAT,
        "training": config.to_dict(),
        "model": model.config.to_dict(),
        "recipe": model.recipe.name,
        "stream": stream.state_dict()["settings"],
        "domains": list(stream.domain_names),
        "source": source,
        "initial_weights": weights_fingerprint(model),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "total_steps": None,
        "decided_after": None,
    }


def weights_fingerprint(model: DeepSeekV3) -> str:
    """Short hash of all parameters' bits."""
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def begin_run(
    run: Path, description: dict[str, Any], header: dict[str, Any], tokenizer: Tokenizer | None
) -> None:
    """Make the folder of a new run.

    Raises:
        TrainingError: there is something at that path already. SaveError: it cannot be written.
    """
    refuse_existing(run)

    def fill(folder: Path) -> None:
        save_point.save_json(folder / RUN_FILE, description)
        if tokenizer is not None:
            tokenizer.save(folder / TOKENIZER_FOLDER)
        log = runlog.RunLog(folder / runlog.FILE_NAME)
        log.write(header)
        log.close()

    save_point.write_folder(run, fill)


def refuse_existing(run: Path) -> None:
    """Refuse to begin a run where there is anything already.

    Raises:
        TrainingError: the path is a file or a folder that is not empty.
    """
    if (run / RUN_FILE).exists():
        raise TrainingError(
            f"{run}: holds a run already; go on with it (--resume {run}) or choose another folder"
        )
    if run.is_file() or run.is_dir() and any(run.iterdir()):
        raise TrainingError(f"{run}: exists and is no run of ours; choose another folder or empty this one")


def read_run(run: str | Path) -> dict[str, Any]:
    """What ``run.json`` says.

    Raises:
        TrainingError: there is no run in that folder, or its file is damaged.
    """
    path = Path(run) / RUN_FILE
    if not path.exists():
        raise TrainingError(f"{run}: there is no run to resume (no {RUN_FILE}); begin one without --resume")
    try:
        described = save_point.load_json(path)
    except CheckpointError as error:
        raise TrainingError(f"{path}: is damaged ({error}); begin a new run") from error
    if not isinstance(described, dict) or described.get("format") != _FORMAT:
        raise TrainingError(f"{path}: is of another format, expected {_FORMAT}; begin a new run")
    return described


def recorded_config(described: dict[str, Any]) -> TrainingConfig:
    """The training settings of a recorded run.

    Raises:
        TrainingError: they were written by another version and mean nothing here.
    """
    try:
        return TrainingConfig.from_dict(described["training"])
    except (KeyError, TypeError, ConfigError) as error:
        raise TrainingError(
            f"{RUN_FILE}: its training settings cannot be used ({error}); begin a new run"
        ) from error


def record_length(run: Path, total_steps: int, decided_after: int) -> None:
    """Write down how many steps a run by the clock has, before any step depends on it."""
    described = read_run(run)
    described["total_steps"], described["decided_after"] = total_steps, decided_after
    write_whole(run / RUN_FILE, save_point.json_text(described))


def refuse_another_run(recorded: dict[str, Any], now: dict[str, Any], with_weights: bool) -> None:
    """Refuse to resume a run with settings, text or (where it has no save point yet) weights that are not its
    own.

    Raises:
        TrainingError: they differ; the first field that does is named with both values.
    """
    # A setting that is younger than the run has the value there that it has by default.
    recorded = recorded | {"training": recorded_config(recorded).to_dict()}
    recorded, now = ({**one, "microbatches": _microbatches(one)} for one in (recorded, now))
    for part in _COMPARED if with_weights else _COMPARED[:-1]:
        difference = first_difference(recorded.get(part), now[part], part)
        if difference is not None:
            name, *values = difference
            then, here = ("nothing of that name" if v is _ABSENT else repr(v) for v in values)
            raise TrainingError(
                f"{name}: the run was begun with {then}, it is to be resumed with {here}; resume it as "
                "it was, or begin a new run in another folder"
            )


def warn_of_other_versions(recorded: dict[str, Any], now: dict[str, Any]) -> None:
    """Say which libraries are others than when the run was begun."""
    for name, then in recorded["versions"].items():
        if now["versions"].get(name) != then:
            warnings.warn(
                f"{name} was {then} when the run was begun and is {now['versions'].get(name)}: "
                "losses may differ in their last digits",
                stacklevel=5,
            )


def _microbatches(described: dict[str, Any]) -> int:
    """In how many parts a step's batch is computed: each part's loss is a mean of its own."""
    return (described.get("parallel") or {}).get("microbatches", 1)


def first_difference(then: Any, now: Any, name: str) -> tuple[str, Any, Any] | None:
    """The first field in which two descriptions differ: its name and both values; ``None`` where they agree."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in [*then, *(key for key in now if key not in then)]:
            found = first_difference(then.get(key, _ABSENT), now.get(key, _ABSENT), f"{name}.{key}")
            if found is not None:
                return found
        return None
    return None if then == now else (name, then, now)
