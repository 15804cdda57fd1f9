"""Hopper's short accumulator, emulated: what its FP8 tensor cores lose, and what promotion to FP32 gives back.

A tensor core takes 32 products at a time and adds them to a register. It does not add floating-point numbers one by
one: it shifts all 33 terms to the largest exponent among them and adds what is left of them as integers. What is
shifted out is cut off. On Hopper about 14 bits remain (paper §3.3.2); cut off always towards zero, so where terms
have one sign the losses do not cancel, and the longer the sum, the larger the register, the more of each new
product falls off its end. The way out is to copy the register to FP32 and begin anew after every N_C = 128 elements
(*promotion*).

``bits`` counts the bits kept *below the leading bit of the largest term*: terms are multiples of 2^(e - bits), e the
largest exponent of a register or product (that of a product being the sum of its factors' exponents). Counted so,
34 is the number that the paper names for exact sums: the largest E4M3 exponents sum to 16, the smallest product is
2^-18. Between two instructions the register is a floating-point number with ``bits`` bits of mantissa, at most
FP32's 23.

Differs from the hardware: the number and the order of terms are not published. These are the paper's two statements
made executable, and a figure from this file is one of the model, not one of a GPU.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import InputError

INSTRUCTION = 32  # elements of K that one FP8 tensor-core instruction sums
HOPPER_BITS = 14
EXACT_BITS = 34  # 16 - (-18): exponents of the largest and the smallest product of two E4M3 values
REGISTER_BITS = 23  # FP32's mantissa: the register holds no more
_NOTHING = -300  # exponent of a zero term: below all others


def accumulate_fp8(
    a: Float[Tensor, "M K"], b: Float[Tensor, "N K"], bits: int = HOPPER_BITS, promote_every: int | None = 128
) -> Float[Tensor, "M N"]:
    """C = A Bᵀ as a tensor core with a short accumulator sums it.

    Per instruction: s ← Σ trunc(t / 2^(e - bits)) · 2^(e - bits) over its 32 products and the register, e the largest
    exponent among them; after every ``promote_every`` elements C ← C + s in FP32, s ← 0 (paper §3.3.2, Figure 7b).

    Args:
        a, b: [M, K] and [N, K]; E4M3, or any dtype that holds its values. Any K: the last instruction may be short.
        bits: kept below the leading bit of the largest term; 14 for Hopper, 34 and more lose nothing in an
        instruction. promote_every: N_C, a multiple of 32 (the paper's is 128); ``None`` never promotes.

    Returns:
        FP64 [M, N], so that the caller can measure its error.

    Raises:
        InputError: widths differ, fewer than one bit, an interval that is no multiple of 32; NaN or infinity.
    """
    _check(a, b, bits, promote_every)
    a, b = a.double(), b.double()
    exponent_a, exponent_b = _exponent(a), _exponent(b)
    total = a.new_zeros(a.shape[0], b.shape[0])
    register = torch.zeros_like(total)
    for k in range(0, a.shape[1], INSTRUCTION):
        part = slice(k, k + INSTRUCTION)
        products = a[:, None, part] * b[None, :, part]  # [M, N, 32], exact
        largest = (exponent_a[:, None, part] + exponent_b[None, :, part]).amax(-1)
        largest = torch.maximum(largest, _exponent(register))
        unit = torch.exp2((largest.clamp(min=_NOTHING) - bits).double())
        terms = (products / unit[..., None]).trunc().sum(-1) + (register / unit).trunc()
        register = _cut(terms * unit, min(bits, REGISTER_BITS))
        if promote_every is not None and (k + INSTRUCTION) % promote_every == 0:
            total = (total.float() + register.float()).double()
            register = torch.zeros_like(register)
    return (total.float() + register.float()).double()


def relative_error(
    got: Float[Tensor, "M N"], a: Float[Tensor, "M K"], b: Float[Tensor, "N K"]
) -> Float[Tensor, "M N"]:
    """|got - A Bᵀ| / (|A| |B|ᵀ) in FP64: an error relative to the size of what was summed.

    Relative to the result it would say nothing: where terms of both signs nearly cancel, any error is a large share
    of the little that is left.
    """
    a, b = a.double(), b.double()
    size = a.abs() @ b.abs().t()
    return (got.double() - a @ b.t()).abs() / torch.where(size > 0, size, 1.0)


def _exponent(x: Tensor) -> Tensor:
    """floor(log2 |x|), far below all others for zero."""
    return torch.where(x == 0, _NOTHING, torch.frexp(x).exponent - 1)


def _cut(x: Tensor, bits: int) -> Tensor:
    """x with ``bits`` bits of mantissa, the rest cut off."""
    unit = torch.exp2((_exponent(x) - bits).double())
    return (x / unit).trunc() * unit


def _check(a: Tensor, b: Tensor, bits: int, promote_every: int | None) -> None:
    if a.shape[1] != b.shape[1]:
        raise InputError(f"accumulate_fp8: a has K = {a.shape[1]}, b has {b.shape[1]}, expected the same")
    if bits < 1:
        raise InputError(f"accumulate_fp8: bits is {bits}, expected at least 1 (14 is Hopper's)")
    if promote_every is not None and (promote_every < 1 or promote_every % INSTRUCTION):
        raise InputError(
            f"accumulate_fp8: promote_every is {promote_every}, expected None or a multiple of {INSTRUCTION}: "
            "between two instructions is the only place where a sum can be taken out"
        )
    for name, x in (("a", a), ("b", b)):
        if not bool(x.double().isfinite().all()):
            raise InputError(
                f"accumulate_fp8: {name} holds NaN or infinity, which no accumulator mends; clean it first"
            )
