"""The checkpoints that the project ships, found by their names, offline: ``from_pretrained("tiny-v3")``."""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from pathlib import Path

from .errors import CheckpointError

SHIPPED = ("tiny-v3",)
PLACES = (
    Path(__file__).resolve().parents[1] / "data" / "checkpoints",  # a clone
    Path(sys.prefix) / "share" / "dsv3lib" / "checkpoints",  # what a wheel brought
)
RESULTS = "results.json"
"""Beside the weights: what was measured on them, and the fingerprint of the tokenizer that they were trained with."""
_NEEDED = ("config.json", "model.safetensors", "tokenizer.json")


def checkpoint_folder(name: str | Path, places: tuple[Path, ...] = PLACES) -> Path:
    """The folder of a checkpoint: what ``name`` says, or of a shipped one the place where it lies.

    A local folder of a shipped name comes first, as it does on the Hugging Face hub, and a warning says so.

    Args:
        name: a folder, or one of ``SHIPPED``. places: where shipped checkpoints may lie.

    Raises:
        CheckpointError: a shipped checkpoint is not in this installation, or only half of it is.
    """
    if str(name) not in SHIPPED:
        return Path(name)
    if Path(name).is_dir():
        warnings.warn(
            f"{name}: the folder {Path(name).resolve()} is read, not the checkpoint of this name that the project "
            "ships; rename it, or stand in another folder, to read that one",
            stacklevel=3,
        )
        return Path(name)
    found = next((place / name for place in places if (place / name).is_dir()), None)
    if found is None:
        raise CheckpointError(
            f"{name}: the checkpoint that the project ships is not in this installation; looked in "
            f"{' and '.join(map(str, places))}. In a clone, train it with `make checkpoint`; else install "
            "it from a wheel or a clone that holds it, or train a model: dsv3 train --minutes 2"
        )
    missing = [file for file in _NEEDED if not (found / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{found}: this shipped checkpoint is not whole, {missing[0]} is missing; in a clone restore it with "
            f"`git checkout -- data/checkpoints/{name}`, else install the project again"
        )
    return found


def tokenizer_fingerprint(text: str) -> str:
    """Short hash of a tokenizer, of the JSON that the `tokenizers` library writes of it."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def refuse_foreign_tokenizer(folder: Path, text: str) -> None:
    """Refuse a tokenizer that is not the one that a checkpoint's weights were trained with, where that is recorded.

    Args:
        folder: the checkpoint. text: the tokenizer's JSON, as the `tokenizers` library writes it.

    Raises:
        CheckpointError: the record cannot be read, or names another tokenizer.
    """
    record = folder / RESULTS
    if not record.is_file():
        return
    try:
        expected = json.loads(record.read_text(encoding="utf-8"))["tokenizer"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{record}: cannot be read ({error!r}); restore the checkpoint's folder"
        ) from error
    if (found := tokenizer_fingerprint(text)) != expected:
        raise CheckpointError(
            f"{folder}: tokenizer.json is not the one that the model was trained with (fingerprint {found}, expected "
            f"{expected}): the same ids would mean other text; restore the checkpoint's folder"
        )
