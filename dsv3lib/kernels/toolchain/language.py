"""Triton where it is installed, and enough of its names to import the kernels where it is not.

Triton exists for Linux alone. A kernel file must still import on macOS, because the references and the checks
live in it too; there ``jit`` leaves the function as it is and nothing ever launches it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    INSTALLED = True
except ImportError:  # macOS, Windows
    triton = tl = TensorDescriptor = None
    INSTALLED = False


def jit(function: Callable) -> Any:
    """``triton.jit`` of the function as it was written.

    Triton reads a kernel's source, so whatever an import hook has wrapped around it (the tests check every
    annotation that way) is taken off first.
    """
    return triton.jit(inspect.unwrap(function)) if INSTALLED else function


@jit
def row_offset(row, stride):
    """row · stride in 64 bits: in 32 the product of V3's sizes overflows (300,000 rows of 7168 do)."""
    return row.to(tl.int64) * stride


# Known when a kernel is compiled: whether Triton's interpreter runs it, whose casts round otherwise than hardware.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret)) if INSTALLED else False


@jit
def to_e4m3(x):
    """FP32 to E4M3, to nearest even; beyond ±448 values saturate, NaN stays NaN.

    On a GPU this is one instruction for two values. The interpreter's cast drops the carry of the mantissa,
    which makes one value in fifty wrong by a factor of two, so there the value is rounded before the cast.
    """
    if not INTERPRETED:
        return x.to(tl.float8e4nv)
    size = tl.minimum(tl.abs(x), 448.0, propagate_nan=tl.PropagateNan.ALL)
    exponent = (size.to(tl.int32, bitcast=True) >> 23) - 127
    # Neighbours lie 2^(e-3) apart, 2^-9 below 2^-6: adding 1.5 · 2^23 of those steps and taking it away again
    # rounds to a whole number of steps.
    step = tl.maximum(exponent, -6) - 3
    big = ((step + 23 + 127) << 23).to(tl.float32, bitcast=True) * 1.5
    sign = x.to(tl.int32, bitcast=True) & (-2147483648)
    bits = ((size + big) - big).to(tl.int32, bitcast=True) | sign
    cast = bits.to(tl.float32, bitcast=True).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return tl.where(x == x, cast, 0x7F).to(tl.uint8).to(tl.float8e4nv, bitcast=True)  # 0x7F: E4M3's NaN


@jit
def to_bf16(x):
    """FP32 to BF16, to nearest even; the interpreter's cast cuts off, so there the value is rounded before it."""
    if not INTERPRETED:
        return x.to(tl.bfloat16)
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & (-65536)
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x).to(tl.bfloat16)
