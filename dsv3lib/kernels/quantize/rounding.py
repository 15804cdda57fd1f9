"""Scales, rounding and packing for the kernels that quantise: the same operations as in ``reference.py``.

The two numbers of a tile are its scale and the inverse of that. They are computed once for 128 values, but by
each thread that needs them: what costs little in a formula costs sixteenfold here, and what calls a subroutine
holds back registers from everything around it.
"""

from __future__ import annotations

from ..toolchain.language import INTERPRETED, jit, tl, to_bf16, to_e4m3


@jit
def size_bits(x):
    """The bits of |x| in FP32 as integers: they sort as the sizes do, and NaN comes out largest."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@jit
def scale_and_inverse(bits, POWER_OF_TWO: tl.constexpr, E5M6: tl.constexpr):
    """A tile's scale and 1 / scale from the bits of its largest size, operation by operation as the reference."""
    limit: tl.constexpr = 65024.0 if E5M6 else 448.0
    top: tl.constexpr = 0x477E0000 if E5M6 else 0x43E00000  # the bits of the limit
    bits = tl.where(bits == 0, top, bits)  # zeros are scaled by 1
    wrong = bits >= 0x7F800000
    if POWER_OF_TWO:
        # A mantissa beyond the limit's needs the next power of two, which the carry makes.
        exponent: tl.constexpr = (top >> 23) - 127
        biased = tl.maximum(((bits + (0x7FFFFF - (top & 0x7FFFFF))) >> 23) - exponent, 1)
        scale = tl.where(wrong, float("nan"), (biased << 23).to(tl.float32, bitcast=True))
        inverse = tl.where(wrong, float("nan"), ((254 - biased) << 23).to(tl.float32, bitcast=True))
    else:
        amax = tl.where(wrong, 0x7FC00000, bits).to(tl.float32, bitcast=True)
        scale = tl.maximum(amax * (1 / limit), 2.0**-126, propagate_nan=tl.PropagateNan.ALL)
        inverse = _inverse(scale)
    return scale, inverse


@jit
def _inverse(x):
    """1 / x as IEEE rounds it, for 2^-126 <= x < 2^126 and NaN.

    The hardware's approximation, and one step of Newton's in two fused operations: what the assembler makes of
    an exact reciprocal, less a subroutine for sizes that cannot occur here, whose call costs fifty registers.
    "/" would be an approximation.
    """
    if INTERPRETED:
        return tl.div_rn(tl.zeros_like(x) + 1.0, x)
    return tl.inline_asm_elementwise(
        """{
            .reg .f32 guess, rest, minus;
            rcp.approx.ftz.f32 guess, $1;
            neg.f32 minus, $1;
            fma.rn.f32 rest, minus, guess, 0f3F800000;
            fma.rn.f32 $0, guess, rest, guess;
        }""",
        "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@jit
def to_e5m6(x):
    """FP32 to the nearest value of E5M6, as FP16: see ``to_e5m6_ref``."""
    bits = size_bits(x)
    normal = ((bits + 0xFFFF + ((bits >> 17) & 1)) & ~0x1FFFF).to(tl.float32, bitcast=True)
    size = tl.abs(x)
    rounded = tl.where(size < 2.0**-14, (size + 8.0) - 8.0, normal)
    sign = x.to(tl.int32, bitcast=True) & (-2147483648)
    signed = (rounded.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return tl.where(x == x, signed, x).to(tl.float16)


@jit
def pack_e4m3(a, b, c, d):
    """Four values to E4M3 in one 32-bit word, ``a`` in its lowest byte."""
    if INTERPRETED:
        low = _byte(a) | (_byte(b) << 8)
        return low | (_byte(c) << 16) | (_byte(d) << 24)
    return tl.inline_asm_elementwise(
        """{
            .reg .b16 low, high;
            cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
            cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
            mov.b32 $0, {low, high};
        }""",
        "=r,f,f,f,f", [a, b, c, d], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@jit
def _byte(x):
    return to_e4m3(x).to(tl.uint8, bitcast=True).to(tl.int32)


@jit
def rounded_to(x, DTYPE: tl.constexpr):
    """FP32 to a result's type, to nearest even in the interpreter too."""
    if DTYPE != tl.bfloat16:
        result = x.to(DTYPE)
    elif INTERPRETED or x.numel < 2:
        result = to_bf16(x)
    else:
        # Two at a time: where the result is used further and not stored, the compiler would convert one by one,
        # on the unit of the special functions, which has a quarter of the rate.
        result = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    return result


@jit
def widened(x):
    """What was loaded, in FP32.

    BF16 is FP32's upper half: of two in a word one is a shift and one a mask. The compiler takes three
    instructions for the two, which is felt where a value has time for twenty. (The ampersand: the first result
    is written before the word is read for the last time.)
    """
    if INTERPRETED or x.dtype != tl.bfloat16 or x.numel < 2:
        result = x.to(tl.float32)
    else:
        result = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000;",
            "=&r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    return result
