"""One build of a kernel, described: types of its arguments, constants, and the rows of settings that it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from . import tuning

Matrix = Literal["bf16", "fp8"]


def _no_constants(row: tuning.Row) -> Mapping[str, Any]:
    return {}


def _every_row(row: tuning.Row) -> bool:
    return True


@dataclass(frozen=True)
class Specimen:
    """One way in which a kernel is called: the types of its arguments and the constants it is built with.

    Args:
        operation: its name in the files of settings.
        kernel: the jitted function.
        arguments: Triton's type of each run-time argument by name, such as ``"*bf16"``, ``"i32"``, ``"fp32"`` or
            ``"tensordesc<fp8e4nv[BLOCK_M, 128]>"``, in which names of settings and constants are replaced.
        constants: what is fixed at compile time besides the settings, given the row of settings.
        variant: what sets this way apart, for the table.
        matrix: operands its matrix instruction must have.
        fp8: whether it needs E4M3.
        rows: which of the operation's rows it is built with.
        divisible: integer arguments that are multiples of 16, as the launcher would find.
    """

    operation: str
    kernel: Any
    arguments: Mapping[str, str]
    constants: Callable[[tuning.Row], Mapping[str, Any]] = _no_constants
    variant: str = ""
    matrix: Matrix | None = None
    fp8: bool = False
    rows: Callable[[tuning.Row], bool] = _every_row
    divisible: tuple[str, ...] = ()
