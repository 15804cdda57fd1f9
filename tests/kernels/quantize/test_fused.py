"""The plain forms of the fused quantisers: the two operations one after the other."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS

from dsv3lib.errors import KernelError
from dsv3lib.kernels.quantize.fused import rms_norm_quantize, swiglu_quantize
from dsv3lib.kernels.quantize.tiles_and_blocks import dequantize

HALF_STEP = 2.0**-4  # of E4M3's three mantissa bits
SUBNORMAL = 2.0**-10


@given(rows=st.integers(0, 4), tiles=st.integers(1, 2), power_of_two=st.booleans(), seed=SEEDS)
def test_swiglu_comes_back_within_half_a_step(rows: int, tiles: int, power_of_two: bool, seed: int) -> None:
    both = torch.randn(rows, 256 * tiles, generator=torch.Generator().manual_seed(seed))
    got = swiglu_quantize(both, power_of_two, keep=True)
    gate, up = both.double().chunk(2, -1)
    exact = gate / (1 + (-gate).exp()) * up
    torch.testing.assert_close(got.kept, exact.float())
    allowed = (
        torch.maximum(exact.abs() * HALF_STEP, got.scales.repeat_interleave(128, -1) * SUBNORMAL) * 1.0001
    )
    assert ((dequantize(got.values, got.scales) - exact).abs() <= allowed).all()
    assert swiglu_quantize(both).kept is None and got.inverse_rms is None


@given(rows=st.integers(0, 4), tiles=st.integers(1, 2), power_of_two=st.booleans(), seed=SEEDS)
def test_rms_norm_comes_back_within_half_a_step(rows: int, tiles: int, power_of_two: bool, seed: int) -> None:
    x = torch.randn(rows, 128 * tiles, generator=torch.Generator().manual_seed(seed))
    weight = torch.rand(128 * tiles) + 0.5
    got = rms_norm_quantize(x, weight, 1e-6, power_of_two, keep=True)
    inverse_rms = (x.double().square().mean(-1) + 1e-6) ** -0.5
    exact = x * inverse_rms[:, None] * weight
    torch.testing.assert_close(got.inverse_rms, inverse_rms.float())
    torch.testing.assert_close(got.kept, exact.float())
    allowed = (
        torch.maximum(exact.abs() * HALF_STEP, got.scales.repeat_interleave(128, -1) * SUBNORMAL) * 1.0001
    )
    assert ((dequantize(got.values, got.scales) - exact).abs() <= allowed).all()


def test_widths_that_make_no_tiles_are_refused() -> None:
    with pytest.raises(KernelError, match="128, expected a multiple of 256"):
        swiglu_quantize(torch.zeros(2, 128))
    with pytest.raises(KernelError, match="100, expected a multiple of 128"):
        rms_norm_quantize(torch.zeros(2, 100), torch.ones(100), 1e-6)
