"""Who computes: one rule for every operation of this folder.

A CUDA tensor goes to the Triton kernel; a CPU tensor to the PyTorch reference; a CPU tensor under
``TRITON_INTERPRET=1`` to the same Triton kernel, interpreted, which is how kernels are tested without a GPU.
"""

from __future__ import annotations

import contextlib
from functools import lru_cache

import torch
from torch import Tensor

from ...errors import KernelError
from . import language

LEAST_CAPABILITY = (8, 0)  # Ampere: the first with bf16 matrix instructions and asynchronous copies
FP8_CAPABILITY = (8, 9)  # Ada: the first whose matrix instructions and casts take E4M3


def interpreted() -> bool:
    """Whether Triton was imported with ``TRITON_INTERPRET=1``."""
    return language.INSTALLED and bool(language.triton.knobs.runtime.interpret)


def on_triton(*tensors: Tensor | None) -> bool:
    """Whether these operands go to a Triton kernel (or, on the CPU, to the reference).

    Args:
        tensors: an operation's operands; ``None`` is passed over.

    Raises:
        KernelError: operands lie on different devices, on a device that has no kernel, on a GPU too old, or on
            a GPU while Triton is not installed.
    """
    devices = {t.device for t in tensors if t is not None}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise KernelError(
            f"operands lie on different devices ({names}), expected one: move them with .to(device)"
        )
    device = devices.pop()
    if device.type == "cpu":
        return interpreted()
    if device.type != "cuda":
        raise KernelError(
            f"no kernel for {device}: expected a CUDA tensor, or a CPU tensor for the reference"
        )
    if not language.INSTALLED:
        raise KernelError(
            f"operands lie on {device} but Triton is not installed (it exists for Linux alone): "
            "call the operation's reference, whose name ends in _ref, or move the tensors to the CPU"
        )
    if capability(device) < LEAST_CAPABILITY:
        raise KernelError(f"{device} has compute capability {capability(device)}, expected at least 8.0")
    return True


def available(tensor: Tensor) -> bool:
    """Whether a Triton kernel can take this tensor; raises nothing."""
    if tensor.is_cuda:
        return language.INSTALLED and capability(tensor.device) >= LEAST_CAPABILITY
    return interpreted() and tensor.device.type == "cpu"


def has_fp8(device: torch.device) -> bool:
    """Whether E4M3 kernels run there: sm_89 or newer, or the interpreter."""
    return device.type == "cpu" or capability(device) >= FP8_CAPABILITY


def require_fp8(operation: str, device: torch.device) -> None:
    """Refuse an E4M3 kernel on a GPU whose instructions have no E4M3.

    Raises:
        KernelError: compute capability below 8.9.
    """
    if not has_fp8(device):
        raise KernelError(
            f"{operation}: {device} has compute capability {capability(device)}, and E4M3 needs 8.9 or later; "
            "use the bf16 operation, or the reference on the CPU"
        )


@lru_cache
def capability(device: torch.device) -> tuple[int, int]:
    """A CUDA device's compute capability."""
    return torch.cuda.get_device_capability(device)


@lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device, the width of a persistent grid; a small number for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes a tensor's GPU the current one for a launch; on the CPU it does nothing."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
