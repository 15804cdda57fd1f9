"""The first cell of every notebook: seeds, style, and what this machine is."""

from __future__ import annotations

import os
import platform
import random
from dataclasses import dataclass, field

import numpy
import torch
from IPython.core.interactiveshell import InteractiveShell

from dsv3lib import openmp
from dsv3lib.course import card, folding
from dsv3lib.course.syllabus import lesson
from dsv3lib.devices import find_device
from dsv3lib.errors import CourseError, InputError
from dsv3lib.viz import style
from dsv3lib.viz.layer_map import layer_map

_LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True)
class Session:
    """What the cells after the first one need.

    Attributes:
        seed: what everything random was seeded with.
        device: where tensors of this notebook live.
        generator: the one generator to draw from, on the CPU, so that every machine draws the same.
    """

    seed: int
    device: torch.device
    generator: torch.Generator = field(repr=False)


def setup(seed: int, notebook: str = "", device: str = "auto") -> Session:
    """Seed everything, choose the device, say what this machine is, and draw where in the model the lesson is.

    Where torch was loaded before dsv3lib, its threads are brought to wait asleep (``dsv3lib.openmp``).
    From here on, a cell that answers a question which nobody has answered yet folds what it shows
    (``dsv3lib.course.folding``).

    Args:
        seed: 0 to 2³² − 1; seeds Python, numpy, torch and the session's own generator.
        notebook: the lesson, as in ``"01_mla_latent_cache"`` (left out in a notebook of your own).
        device: ``"auto"`` (a CUDA GPU if there is one, else the CPU), ``"cpu"``, ``"cuda"``, ``"cuda:1"``…

    Returns:
        The seed, the device and the generator.

    Raises:
        CourseError: seed, lesson or device cannot be used.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= _LARGEST_SEED:
        raise CourseError(f"seed is {seed!r}, expected an integer from 0 to {_LARGEST_SEED}")
    row = lesson(notebook) if notebook else None
    title = row.stem if row else "your notebook"
    try:
        chosen = find_device(device, "device")
    except InputError as error:
        raise CourseError(str(error)) from error
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    style.use()
    _use_inline_png()
    print(f"{title} · seed {seed}")
    waiting = openmp.settle(torch.get_num_threads())
    card.measured([f"This machine: {describe_machine(chosen)}", waiting])
    if row is not None:
        style.show(*layer_map(row.lit))
    folding.watch(_shell())
    return Session(seed, chosen, torch.Generator().manual_seed(seed))


def describe_machine(device: torch.device) -> str:
    """Return device, threads and versions in one line."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        where = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    else:
        where = f"CPU ({platform.machine()}), no GPU in use"
    threads = torch.get_num_threads()
    return (
        f"{where}; torch computes with {threads} of {os.cpu_count()} cores; "
        f"Python {platform.python_version()}, torch {torch.__version__}."
    )


def _shell() -> InteractiveShell | None:
    """The kernel's shell, or None outside a notebook."""
    return InteractiveShell.instance() if InteractiveShell.initialized() else None


def _use_inline_png() -> None:
    """Make figures that are drawn with pyplot appear as PNG; outside a notebook there is nothing to set."""
    try:
        from IPython import get_ipython
        from matplotlib_inline.backend_inline import set_matplotlib_formats
    except ImportError:
        return
    shell = get_ipython()
    if shell is not None and shell.__class__.__name__ == "ZMQInteractiveShell":
        set_matplotlib_formats("png")
