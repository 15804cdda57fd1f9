"""Where a command or a notebook computes: the one reading of a device's name."""

from __future__ import annotations

import torch

from .errors import InputError

AUTO = "auto"
HELP = "auto (the default: a GPU where there is one), cpu or cuda"


def find_device(name: str | None = AUTO, asked: str = "--device") -> torch.device:
    """The device of that name, shown to work before anything is loaded.

    Args:
        name: "auto" or ``None``: a CUDA GPU where there is one, else the CPU; "cpu"; "cuda" or "cuda:1"; or any
            other that PyTorch knows. asked: how the user said it, for the error.

    Raises:
        InputError: PyTorch does not know it, or finds none here.
    """
    if name is None or name == AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds shapes and no values")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("there is no CUDA GPU here")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's words for an unknown or missing device
        told = str(error).splitlines()[0]
        raise InputError(
            f"{asked}: {name!r} cannot be used ({told}); expected {HELP}; `dsv3 doctor` tells what there is"
        ) from error
    return device
