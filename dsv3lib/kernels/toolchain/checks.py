"""What every kernel checks before a launch, and the words in which it refuses.

A wrong stride or dtype does not fail on a GPU: it computes something else. So each operand is looked at here,
on the host, without touching its values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import KernelError

ALIGNMENT = 16  # bytes: the widest access of a thread, and what the copy engine demands


def require_dtype(operation: str, name: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Refuse a tensor whose dtype is not among those allowed.

    Raises:
        KernelError: names the operation, the operand, its dtype and those expected.
    """
    if tensor.dtype not in allowed:
        names = " or ".join(str(d).removeprefix("torch.") for d in allowed)
        raise KernelError(
            f"{operation}: {name} is {_dtype(tensor)}, expected {names}: convert it with .to(...)"
        )


def require_shape(operation: str, name: str, tensor: Tensor, expected: Sequence[int | None]) -> None:
    """Refuse a tensor whose shape differs; ``None`` stands for any size.

    Raises:
        KernelError: names the operand, its shape and the one expected.
    """
    fits = len(tensor.shape) == len(expected) and all(
        e is None or n == e for n, e in zip(tensor.shape, expected, strict=True)
    )
    if not fits:
        wanted = "[" + ", ".join("any" if e is None else str(e) for e in expected) + "]"
        raise KernelError(f"{operation}: {name} has shape {list(tensor.shape)}, expected {wanted}")


def require_multiple(operation: str, name: str, value: int, divisor: int) -> None:
    """Refuse a size that does not divide.

    Raises:
        KernelError: names the size, and the padding that would mend it.
    """
    if value % divisor:
        raise KernelError(
            f"{operation}: {name} is {value}, expected a multiple of {divisor}: "
            f"pad it by {-value % divisor} with zeros"
        )


def require_rows(operation: str, name: str, tensor: Tensor) -> None:
    """Refuse a tensor whose last dimension does not lie side by side in memory.

    Raises:
        KernelError: gives the strides.
    """
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise KernelError(
            f"{operation}: {name} has strides {tensor.stride()}, expected the last dimension side by side "
            "(stride 1): call .contiguous()"
        )


def require_aligned(operation: str, name: str, tensor: Tensor) -> None:
    """Refuse a tensor that the copy engine cannot read: its start or a row not on a 16-byte border.

    Raises:
        KernelError: says which of the two.
    """
    require_rows(operation, name, tensor)
    if tensor.data_ptr() % ALIGNMENT:
        raise KernelError(
            f"{operation}: {name} starts {tensor.data_ptr() % ALIGNMENT} bytes past a {ALIGNMENT}-byte border: "
            "call .clone()"
        )
    size = tensor.element_size()
    steps = [s * size for n, s in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True) if n > 1]
    if any(step % ALIGNMENT for step in steps):
        raise KernelError(
            f"{operation}: rows of {name} lie {steps} bytes apart, expected multiples of {ALIGNMENT}: "
            "call .contiguous(), or pad the width"
        )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
