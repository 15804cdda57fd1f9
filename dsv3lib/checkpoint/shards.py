"""Sharded safetensors: the index says which file holds which tensor, and nothing else does.

A folder that has been saved into more than once, or put together from several downloads, may hold the same
tensor in two shards, one of them stale. ``model.safetensors.index.json`` names one file for each tensor: that
file's tensor is read, any other is passed over with a warning, and where the named file does not hold it the
error says which one does.
"""

from __future__ import annotations

import json
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from ..files import with_utf8_name

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_EXAMPLES = 3  # tensors named in a warning


class Stored(NamedTuple):
    """A folder's tensors, read on demand.

    Args:
        folder: where. places: by name, the open file that counts. oddities: what a reader should be told.
    """

    folder: Path
    places: dict[str, Any]
    oddities: list[str]

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, without reading it."""
        return tuple(self.places[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Of a tensor, as safetensors writes it ("BF16"), without reading it."""
        return self.places[name].get_slice(name).get_dtype()

    def read(self, name: str) -> Tensor:
        """One tensor, as stored.

        Raises:
            CheckpointError: the file cannot be read there.
        """
        try:
            return self.places[name].get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(
                f"{self.folder}: {name} cannot be read ({error}); fetch or save the file again"
            ) from error

    def warn(self, stacklevel: int) -> None:
        """Tell the oddities, each as a warning."""
        for oddity in self.oddities:
            warnings.warn(f"{self.folder}: {oddity}", stacklevel=stacklevel + 1)


def open_stored(folder: Path, stack: ExitStack) -> Stored:
    """Open every file of a checkpoint; nothing is read but their headers.

    Args:
        folder: holds one file, or shards and their index. stack: closes the files.

    Raises:
        CheckpointError: there is no checkpoint; a file is missing, truncated or not safetensors; or the index
            names a file for a tensor that this file does not hold.
    """
    weight_map = _read_index(folder)
    files = [SINGLE] if weight_map is None else sorted(set(weight_map.values()))
    opened = {name: _open(folder / name, len(files), stack) for name in files}
    holders: dict[str, list[str]] = {}
    for file, shard in opened.items():
        for name in shard.keys():
            holders.setdefault(name, []).append(file)
    if weight_map is None:
        return Stored(folder, {name: opened[SINGLE] for name in holders}, [])
    for name, file in weight_map.items():
        if file not in holders.get(name, ()):
            held = ", ".join(holders.get(name, ()))
            where = f"{held} does; correct the index or fetch it again" if held else "no shard does"
            raise CheckpointError(f"{folder}: {INDEX} promises {name}, which {file} does not hold; {where}")
    return Stored(
        folder,
        {name: opened[file] for name, file in weight_map.items()},
        _oddities(folder, weight_map, holders),
    )


def _oddities(folder: Path, weight_map: dict[str, str], holders: dict[str, list[str]]) -> list[str]:
    """What lies in the files and does not count, in words."""
    found = []
    stray = [
        f"{name} in {file}"
        for name, files in holders.items()
        for file in files
        if weight_map.get(name) != file
    ]
    if stray:
        some = ", ".join(stray[:_EXAMPLES]) + (", …" if len(stray) > _EXAMPLES else "")
        found.append(f"passed over {len(stray)} tensor(s) where {INDEX} does not name them: {some}")
    if (folder / SINGLE).exists() and SINGLE not in weight_map.values():
        found.append(f"passed over {SINGLE}, as {INDEX} is there and does not name it")
    return found


def _read_index(folder: Path) -> dict[str, str] | None:
    """By tensor the file that holds it; ``None`` where a single file holds all."""
    if (folder / INDEX).exists():
        try:
            weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            return {str(name): Path(file).name for name, file in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{folder / INDEX}: is not a safetensors index; download or save it again"
            ) from error
    if (folder / SINGLE).exists():
        return None
    found = ", ".join(sorted(p.name for p in folder.glob("*"))) if folder.is_dir() else "no such folder"
    pickles = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
    hint = "; pickled weights are never read, convert them to safetensors" if pickles else ""
    raise CheckpointError(
        f"{folder}: neither {SINGLE} nor {INDEX} is there (found: {found or 'nothing'}){hint}"
    )


def _open(path: Path, count: int, stack: ExitStack) -> Any:
    if not path.exists():
        raise CheckpointError(f"{path}: this shard is missing; {INDEX} names {count} of them, fetch it again")
    try:
        return stack.enter_context(safe_open(with_utf8_name(path, stack), framework="pt"))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: truncated or not safetensors ({error}); fetch or save it again"
        ) from error
