"""How long something takes: the best of a few runs, with no gradient kept and with the GPU waited for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from dsv3lib.errors import CourseError


def milliseconds(call: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    """Return the shortest time of ``repeats`` runs, in milliseconds; other work on the machine only adds.

    Args:
        call: what is timed.
        device: where it computes; a GPU works on after the call returns, so it is waited for.
        repeats: runs, at least 1; the first also warms up.

    Raises:
        CourseError: repeats is below 1.
    """
    if repeats < 1:
        raise CourseError(f"repeats is {repeats}, expected at least 1")
    best = float("inf")
    with torch.inference_mode():
        for _ in range(repeats):
            _wait_for(device)
            start = time.perf_counter()
            call()
            _wait_for(device)
            best = min(best, time.perf_counter() - start)
    return 1000 * best


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
