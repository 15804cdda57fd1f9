"""Where a command computes: the one reading of ``--device``."""

from __future__ import annotations

import torch

from .errors import InputError

AUTO = "auto"
HELP = "auto (the default: a GPU where there is one), cpu or cuda"


def find_device(name: str | None = AUTO) -> torch.device:
    """The device of that name, shown to work before anything is loaded.

    Args:
        name: "auto" or ``None``: a CUDA GPU where there is one, else the CPU; "cpu"; "cuda" or "cuda:1"; or any
            other that PyTorch knows.

    Raises:
        InputError: PyTorch does not know it, or finds none here.
    """
    if name is None or name == AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds shapes and no values")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's words for an unknown or missing device
        told = str(error).splitlines()[0]
        raise InputError(
            f"--device: {name!r} cannot be used ({told}); expected {HELP}; `dsv3 doctor` tells what there is"
        ) from error
    return device
