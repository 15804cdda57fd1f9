"""Checkpoints for tests: states to compare, and folders whose files are edited."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dsv3lib import DeepSeekV3, checkpoint

SINGLE, INDEX = checkpoint.SINGLE, checkpoint.INDEX
MTP = "model.layers.2."  # of strategies.small


def state_of(model: DeepSeekV3) -> dict[str, torch.Tensor]:
    """A copy of all parameters and buffers."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Equal to the bit, under the same names."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def edit_json(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; the value ``...`` takes one out."""
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))


def edit(folder: Path, change: Callable[[dict], dict]) -> None:
    """Rewrite the single file with other tensors."""
    save_file(change(load_file(folder / SINGLE)), folder / SINGLE)


def without(name: str):
    return lambda t: {n: v for n, v in t.items() if n != name}


def renamed(name: str, other: str):
    return lambda t: {other if n == name else n: v for n, v in t.items()}


def changed(name: str, change):
    return lambda t: t | {name: change(t[name])}


def spoilt(value: float):
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return change
