"""Floating-point formats of eight bits and fewer than sixteen: E4M3, E5M2, E5M6, and the scales' UE8M0.

A format is a number of exponent bits and a number of mantissa bits (paper §3.3.2 trains in E4M3 throughout; §3.3.3
keeps one kind of activation in E5M6). Within a *binade* [2^e, 2^(e+1)) its values are equally spaced, 2^(e -
mantissa bits) apart; below the smallest normal number the spacing stays as it is there, down to zero
(*subnormals*). Everything a notebook shows about a format follows from these two sentences, so everything here is
computed from them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ConfigError


@dataclass(frozen=True)
class FloatFormat:
    """Sign, exponent, mantissa.

    Args:
        name: as people write it. exponent_bits, mantissa_bits: stored bits of each.
        largest: the largest finite value; what it is depends on which codes mean infinity and NaN.
        saturates: whether larger values are cast to ``largest`` (E4M3 has no infinity) or overflow to infinity.
        dtype: torch's type of the same values, or ``None`` where it has none.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    largest: float
    saturates: bool
    dtype: torch.dtype | None = None

    @property
    def bits(self) -> int:
        """Bits of a stored value, its sign included."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def least_exponent(self) -> int:
        """Exponent of the smallest normal value: 2 - 2^(exponent bits - 1)."""
        return 2 - 2 ** (self.exponent_bits - 1)

    @property
    def smallest_normal(self) -> float:
        """Below it values have fewer significant bits."""
        return 2.0**self.least_exponent

    @property
    def smallest(self) -> float:
        """The smallest value above zero; half of it and less is rounded to zero."""
        return 2.0 ** (self.least_exponent - self.mantissa_bits)

    @property
    def half_step(self) -> float:
        """The largest relative error of rounding a value in the normal range: 2^-(mantissa bits + 1), nearly."""
        return 2.0 ** -(self.mantissa_bits + 1)


E4M3 = FloatFormat("E4M3", 4, 3, 448.0, True, torch.float8_e4m3fn)
E5M2 = FloatFormat("E5M2", 5, 2, 57344.0, False, torch.float8_e5m2)
E5M6 = FloatFormat("E5M6", 5, 6, 65024.0, False)
FORMATS = (E4M3, E5M2, E5M6)


def named(name: str) -> FloatFormat:
    """A format by its name, in any case.

    Raises:
        ConfigError: there is none of that name.
    """
    for one in FORMATS:
        if one.name.lower() == str(name).lower():
            return one
    raise ConfigError(f"there is no format {name!r}; there are {', '.join(f.name for f in FORMATS)}")


def values(format: FloatFormat) -> Float[Tensor, " V"]:
    """Every finite value from 0 upwards, in order, FP64."""
    found = []
    exponent, mantissas = format.least_exponent, 2**format.mantissa_bits
    found += [i * format.smallest for i in range(mantissas)]
    while 2.0**exponent <= format.largest:
        step = 2.0 ** (exponent - format.mantissa_bits)
        found += [2.0**exponent + i * step for i in range(mantissas)]
        exponent += 1
    return torch.tensor([v for v in found if v <= format.largest], dtype=torch.float64)


def spacing(x: Float[Tensor, "*N"], format: FloatFormat) -> Float[Tensor, "*N"]:
    """How far apart the format's values lie around |x|: 2^(e - mantissa bits), e the exponent of x; FP64."""
    exponent = torch.frexp(x.double().abs()).exponent - 1  # frexp's mantissa lies in [0.5, 1)
    return torch.exp2(exponent.clamp(min=format.least_exponent).double() - format.mantissa_bits)


def round_to(x: Float[Tensor, "*N"], format: FloatFormat) -> Float[Tensor, "*N"]:
    """The nearest value of the format, of two equally near ones that with an even last bit (IEEE 754, the casts'
    own).

    x = sign · n · spacing: rounding n to the nearest even integer is all. What lies beyond the largest value's
    half-step is cast to it or to infinity, as the format says; E4M3's cast *always* saturates here, infinity too,
    as torch's on a CPU does. NaN stays NaN.

    Args:
        x: any floating dtype up to FP64.

    Returns:
        FP64, holding nothing but the format's values, infinity and NaN.
    """
    wide = x.double()
    step = spacing(torch.where(wide.isfinite(), wide, 1.0), format)
    rounded = (
        torch.round(wide / step) * step
    )  # torch rounds half to even; both factors are powers of two or exact
    beyond = format.largest if format.saturates else torch.inf
    over = rounded.abs() > format.largest
    rounded = torch.where(over, torch.full_like(rounded, beyond).copysign(wide), rounded)
    return torch.where(wide.isnan(), wide, rounded.copysign(wide))


def to_ue8m0(x: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    """The smallest power of two that is not below x: scales as eight bits of exponent, UE8M0 (§3.3.3).

    Done on the bits. ``exp2(ceil(log2(x)))`` is off by a whole power for values within a rounding error of a power of
    two: the logarithm is rounded before the ceiling sees it.

    Args:
        x: positive FP32, at least 2^-126.

    Returns:
        FP32, each a power of two with x ≤ result < 2x.
    """
    bits = x.float().view(torch.int32)
    return (((bits + 0x7FFFFF) >> 23) << 23).view(torch.float32)


def coarsen(stored: Float[Tensor, "*N"], mantissa_bits: int) -> Float[Tensor, "*N"]:
    """E4M3 values with fewer bits of mantissa, still stored as E4M3: what a coarser format would have kept.

    Every value of E4M2 is one of E4M3, so that the same products run on both. Rounded to nearest even, in range.

    Args:
        stored: float8_e4m3fn. mantissa_bits: 0 to 3.
    """
    if mantissa_bits == E4M3.mantissa_bits:
        return stored
    coarse = FloatFormat(f"E4M{mantissa_bits}", 4, mantissa_bits, E4M3.largest, True)
    limit = float(values(coarse)[-1])
    return round_to(stored.float().clamp(-limit, limit), coarse).float().to(stored.dtype)


def pack_e5m6(x: Float[Tensor, "*N K"]) -> Tensor:
    """E5M6 values in 12 bits each: two of them in three bytes.

    E5M6 has FP16's exponent and six of its ten bits of mantissa, so a value is the upper twelve bits of its FP16
    form.

    Args:
        x: FP16 that holds nothing but values of E5M6; K is even.

    Returns:
        uint8 [..., 3 K / 2].
    """
    codes = (x.view(torch.int16).to(torch.int32) >> 4) & 0xFFF
    first, second = codes.unflatten(-1, (-1, 2)).unbind(-1)
    three = (first & 0xFF, (first >> 8) | ((second & 0xF) << 4), second >> 4)
    return torch.stack(three, -1).flatten(-2).to(torch.uint8)


def unpack_e5m6(packed: Tensor) -> Float[Tensor, "*N K"]:
    """The inverse of :func:`pack_e5m6`: FP16 [..., K]."""
    low, middle, high = packed.to(torch.int32).unflatten(-1, (-1, 3)).unbind(-1)
    codes = torch.stack((low | ((middle & 0xF) << 8), (middle >> 4) | (high << 4)), -1).flatten(-2) << 4
    return torch.where(codes >= 0x8000, codes - 0x10000, codes).to(torch.int16).view(torch.float16)
