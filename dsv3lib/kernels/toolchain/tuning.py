"""A kernel's settings (block sizes, warps, pipeline stages), by device and by shape, out of one readable file.

``tuned/sm_80.json`` and its neighbours hold what ships for a generation; a file named after a device, such as
``tuned/nvidia_h200.json``, is written by ``benchmarks/gpu.py --tune`` on such a device and takes precedence
for the operations that it names. Each operation has a list of rows; the first row whose bounds hold is taken::

    "gemm_fp8": [
      {"when": {"M": [1, 64]}, "BLOCK_M": 64, "num_warps": 4, "num_stages": 4},
      {"when": {}, "BLOCK_M": 128, "num_warps": 8, "num_stages": 4}
    ]

Bounds include both ends. The last row has none, so that every shape finds settings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ...errors import KernelError
from ...files import write_whole
from . import targets

FOLDER = Path(__file__).parents[1] / "tuned"
GENERATIONS = ("sm_80", "sm_89", "sm_90", "sm_100")
HEADING = ("about", "generation")  # of a file: where its figures come from, and whose instructions they use
INTERPRETED = "sm_90"  # without a GPU the interpreter runs what ships for Hopper

Row = Mapping[str, Any]
Table = Mapping[str, list[Row]]


def pick(operation: str, device: torch.device, **shape: int) -> dict[str, Any]:
    """The settings of an operation for a shape on a device.

    Args:
        operation: its name in the files.
        device: where it will run.
        shape: sizes by the names that bounds use.

    Returns:
        Block sizes and the like by the kernel's own names, with ``num_warps`` and ``num_stages``.

    Raises:
        KernelError: no file names the operation, or no row fits.
    """
    for name in sources(device):
        rows = read(FOLDER / f"{name}.json").get(operation)
        if rows is not None:
            return match(operation, rows, shape)
    raise KernelError(f"{operation}: no settings in {', '.join(sources(device))} under {FOLDER.name}/")


def match(operation: str, rows: list[Row], shape: Mapping[str, int]) -> dict[str, Any]:
    """The first row whose bounds hold, without its bounds.

    Raises:
        KernelError: none fits, or a bound speaks of a size that the operation does not have.
    """
    for row in rows:
        unknown = row["when"].keys() - shape.keys()
        if unknown:
            raise KernelError(
                f"{operation}: settings bound {sorted(unknown)}, it has the sizes {sorted(shape)}"
            )
        if all(low <= shape[name] <= high for name, (low, high) in row["when"].items()):
            return {name: value for name, value in row.items() if name != "when"}
    raise KernelError(f"{operation}: no row of settings fits {dict(shape)}; the last row must have no bounds")


@lru_cache
def sources(device: torch.device) -> tuple[str, ...]:
    """The files that speak for a device, the most particular first."""
    if device.type != "cuda":
        return (INTERPRETED,)
    names = [slug(torch.cuda.get_device_name(device)), generation(device)]
    return tuple(name for name in names if (FOLDER / f"{name}.json").exists())


def generation(device: torch.device) -> str:
    """The newest generation that a CUDA device is no older than; the oldest for those before it."""
    major, minor = targets.capability(device)
    own = [name for name in GENERATIONS if int(name.removeprefix("sm_")) <= 10 * major + minor]
    return own[-1] if own else GENERATIONS[0]


def slug(device_name: str) -> str:
    """A device's name as a file's: "NVIDIA H200" becomes "nvidia_h200"."""
    return re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_")


@lru_cache
def read(path: Path) -> Table:
    """One file of settings, without its heading.

    Raises:
        KernelError: it is missing, no JSON, or a row is not one.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise KernelError(f"settings {path.name} cannot be read: {error}") from error
    table = {name: rows for name, rows in table.items() if name not in HEADING}
    for operation, rows in table.items():
        sound = isinstance(rows, list) and rows and all(isinstance(r, dict) and "when" in r for r in rows)
        if not sound or rows[-1]["when"]:
            raise KernelError(
                f'settings {path.name}: {operation!r} must be a list of rows with "when", the last without bounds'
            )
    return table


def shipped(generation: str) -> list[Table]:
    """All settings that ship for a generation: its own file, and those of its devices."""
    files = sorted(FOLDER.glob("*.json"))
    return [read(file) for file in files if generation_of(file) == generation]


def generation_of(path: Path) -> str:
    """The generation whose instructions a file's settings use."""
    return json.loads(path.read_text(encoding="utf-8")).get("generation", path.stem)


def write(path: Path, about: str, generation: str, table: Table) -> None:
    """Write a file of settings, one row a line.

    Args:
        about: one sentence on where the figures come from.
        generation: "sm_90", say.
    """
    parts = [f'  "about": {json.dumps(about)}', f'  "generation": {json.dumps(generation)}']
    for operation, rows in sorted(table.items()):
        lines = ",\n".join(f"    {json.dumps(dict(row))}" for row in rows)
        parts.append(f"  {json.dumps(operation)}: [\n{lines}\n  ]")
    write_whole(path, "{\n" + ",\n".join(parts) + "\n}\n")
