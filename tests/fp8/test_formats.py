"""Formats to the bit: torch's own casts over every FP16 input, exact rationals at every tie, packing without loss."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS

from dsv3lib.errors import ConfigError
from dsv3lib.fp8 import formats as f
from dsv3lib.kernels.quantize.reference import to_e5m6_ref

EVERY_FP16 = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
EVERY_E4M3 = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn)


def same(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal to the bit, signs of zero included, NaN equal to NaN."""
    both = got.isnan() & expected.isnan()
    return bool(((got == expected) & (got.signbit() == expected.signbit()) | both).all())


@pytest.mark.parametrize("format", [f.E4M3, f.E5M2], ids=lambda one: one.name)
def test_rounding_is_torchs_cast_over_every_fp16_value(format: f.FloatFormat) -> None:
    cast = EVERY_FP16.to(format.dtype).double()
    assert same(f.round_to(EVERY_FP16, format), cast)
    assert not same(EVERY_FP16.double(), cast)


def test_e5m6_is_the_references_rounding_over_every_fp16_value() -> None:
    sizes = EVERY_FP16[EVERY_FP16.abs() <= f.E5M6.largest]
    assert same(f.round_to(sizes, f.E5M6), to_e5m6_ref(sizes.float()).double())


@pytest.mark.parametrize("format", f.FORMATS, ids=lambda one: one.name)
def test_every_tie_goes_to_the_even_neighbour_and_a_hair_beside_it_does_not(format: f.FloatFormat) -> None:
    """The midpoints are exact rationals; FP64 holds each of them and its two neighbours."""
    table = f.values(format)
    below, above = table[:-1], table[1:]
    for i, (low, high) in enumerate(zip(below.tolist(), above.tolist(), strict=True)):
        assert Fraction(low) + (Fraction(high) - Fraction(low)) / 2 == Fraction((low + high) / 2)
        assert format.smallest <= high - low and i % 2 == round(low / (high - low)) % 2
    middle = (below + above) / 2
    even = torch.where(torch.arange(len(middle)) % 2 == 0, below, above)
    assert torch.equal(f.round_to(middle, format), even)
    assert torch.equal(f.round_to(-middle, format), -even)
    assert torch.equal(f.round_to(middle.nextafter(torch.zeros(())), format), below)
    assert torch.equal(f.round_to(middle.nextafter(above), format), above)
    with pytest.raises(AssertionError):  # a tie that always goes up
        assert torch.equal(above, even)


def test_the_table_of_e4m3() -> None:
    table = f.values(f.E4M3)
    stored = EVERY_E4M3.double()
    assert torch.equal(table, stored[~stored.isnan() & ~stored.signbit()].sort().values)
    assert (len(table), table[1], table[-1]) == (127, 2.0**-9, 448.0)
    assert f.E4M3.smallest_normal == 2.0**-6 and f.E4M3.bits == 8
    assert torch.equal(table.diff()[table[:-1] > 0], f.spacing(table[:-1][table[:-1] > 0], f.E4M3))


@pytest.mark.parametrize(
    ("format", "largest"), [(f.E4M3, 448.0), (f.E5M2, 57344.0), (f.E5M6, 65024.0)], ids=lambda one: str(one)
)
def test_what_lies_beyond_the_largest_value(format: f.FloatFormat, largest: float) -> None:
    assert float(f.values(format)[-1]) == largest == format.largest
    far = torch.tensor([largest * 1.001, 1e30, torch.inf, -torch.inf], dtype=torch.float64)
    rounded = f.round_to(far, format)
    assert rounded[0] == largest and rounded[1] == (largest if format.saturates else torch.inf)
    assert rounded[2] == rounded[1] == -rounded[3] and f.round_to(torch.tensor([torch.nan]), format).isnan()


@given(format=st.sampled_from(f.FORMATS), seed=SEEDS, size=st.integers(-30, 20))
def test_no_value_of_the_format_is_nearer(format: f.FloatFormat, seed: int, size: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = (torch.randn(64, generator=draw, dtype=torch.float64) * 2.0**size).clamp(
        -format.largest, format.largest
    )
    table = f.values(format)
    nearest = (x.abs()[:, None] - table).abs().amin(-1)
    rounded = f.round_to(x, format)
    assert torch.equal((rounded - x).abs(), nearest) and torch.isin(rounded.abs(), table).all()
    normal = x.abs() >= format.smallest_normal
    assert ((rounded - x).abs()[normal] <= format.half_step * x.abs()[normal]).all()


@given(seed=SEEDS, exponent=st.integers(-100, 100))
def test_scales_are_the_next_power_of_two(seed: int, exponent: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = (1 + torch.rand(64, generator=draw)) * 2.0**exponent
    x[:2] = torch.tensor([2.0**exponent, 2.0**exponent]).nextafter(torch.tensor([torch.inf, 0.0]))
    x[2] = 2.0**exponent
    scale = f.to_ue8m0(x)
    assert (scale >= x).all() and (scale < 2 * x).all() and (torch.frexp(scale).mantissa == 0.5).all()


def test_the_logarithm_is_no_way_to_a_power_of_two() -> None:
    x = torch.tensor([2.0**k for k in range(-20, 20)]).nextafter(torch.tensor(torch.inf))
    assert (f.to_ue8m0(x) >= x).all()
    assert (torch.exp2(torch.ceil(torch.log2(x))) < x).any()


@pytest.mark.parametrize("mantissa_bits", [0, 1, 2, 3])
def test_a_coarser_mantissa_is_still_e4m3(mantissa_bits: int) -> None:
    stored = EVERY_E4M3[~EVERY_E4M3.float().isnan()]
    coarse = f.coarsen(stored, mantissa_bits)
    assert coarse.dtype == torch.float8_e4m3fn
    bits = coarse.float()[coarse.float().abs() >= f.E4M3.smallest_normal].view(torch.int32)
    assert not (bits & ((1 << (23 - mantissa_bits)) - 1)).any()
    assert torch.equal(f.coarsen(coarse, mantissa_bits).float(), coarse.float())
    assert (coarse.float() == stored.float()).all() == (mantissa_bits == 3)


def test_twelve_bits_hold_every_value_of_e5m6() -> None:
    sizes = EVERY_FP16[~EVERY_FP16.isnan()]
    held = to_e5m6_ref(sizes[sizes.abs() <= f.E5M6.largest].float()).view(-1, 2)
    packed = f.pack_e5m6(held)
    assert packed.dtype == torch.uint8 and packed.shape == (len(held), 3)
    assert torch.equal(f.unpack_e5m6(packed).view(torch.int16), held.view(torch.int16))


def test_an_unknown_format_is_refused_by_name() -> None:
    assert f.named("e4m3") is f.E4M3
    with pytest.raises(ConfigError, match=r"'e3m4'.*E4M3, E5M2, E5M6"):
        f.named("e3m4")
