"""What a save point holds beside the model: all that the next step depends on, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import CheckpointError, ConfigError
from ...model import DeepSeekV3
from ..loop.optimizer import copy_exactly
from . import save_point

if TYPE_CHECKING:
    from ..loop.trainer import Trainer

STATE_FOLDER = "training"
_STATE, _OPTIMIZER, _AVERAGE, _RANDOM = (
    "state.json",
    "optimizer.safetensors",
    "average.safetensors",
    "random.safetensors",
)


def save_state(trainer: Trainer, folder: Path) -> None:
    """Write moments, masters, averaged weights, the generators' states, the text's place and the counters."""
    save_point.save_tensors(folder / _OPTIMIZER, trainer.optimizer.state_tensors())
    if trainer.average is not None:
        save_point.save_tensors(folder / _AVERAGE, trainer.average.tensors)
    save_counters(trainer, folder)


def save_counters(trainer: Trainer, folder: Path) -> None:
    """Write what is small: the generators' states, the text's place and the counters."""
    random_tensors, random_values = save_point.random_state()
    save_point.save_tensors(folder / _RANDOM, random_tensors)
    average = trainer.average
    state = {
        "step": trainer.steps_done,
        "tokens": trainer.tokens_seen,
        "seconds": trainer.seconds,
        "optimizer_count": trainer.optimizer.count,
        "average_count": None if average is None else average.count,
        "stream": trainer.stream.state_dict(),
        "random": random_values,
    }
    save_point.save_json(folder / _STATE, state)


def load_state(trainer: Trainer, folder: Path) -> None:
    """Put a trainer where ``save_state`` found another one.

    Args:
        trainer: made with the same settings. folder: the save point, model and state.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor does not fit.
        DataError: the text has changed.
    """
    try:
        model = DeepSeekV3.from_pretrained(folder)
    except (CheckpointError, ConfigError) as error:
        raise save_point.damaged(folder, error) from error
    folder = folder / STATE_FOLDER
    copy_exactly(trainer.model.state_dict(), model.state_dict(), f"{folder.parent}: model")
    trainer.optimizer.load_state_tensors(save_point.load_tensors(folder / _OPTIMIZER), trainer.optimizer.count)
    if trainer.average is not None:
        copy_exactly(trainer.average.tensors, save_point.load_tensors(folder / _AVERAGE), f"{folder}: average")
    load_counters(trainer, folder)


def load_counters(trainer: Trainer, folder: Path) -> None:
    """Put back what ``save_counters`` wrote.

    Raises:
        CheckpointError: a file is missing or damaged. DataError: the text has changed.
    """
    state = save_point.load_json(folder / _STATE)
    random_tensors = save_point.load_tensors(folder / _RANDOM)
    try:
        trainer.optimizer.count = state["optimizer_count"]
        if trainer.average is not None:
            trainer.average.count = state["average_count"]
        trainer.stream.load_state_dict(state["stream"])
        save_point.set_random_state(random_tensors, state["random"])
        trainer.steps_done, trainer.tokens_seen = state["step"], state["tokens"]
        trainer.seconds = state["seconds"]
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError) or type(error).__module__.startswith("dsv3lib"):
            raise
        raise CheckpointError(
            f"{folder}: is incomplete ({error!r}); remove this save point's folder"
        ) from error
