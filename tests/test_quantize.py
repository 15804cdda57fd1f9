"""FP8 with a scale per tile: one outlier spoils its own tile and no other."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS

from dsv3lib.errors import KernelError
from dsv3lib.kernels import dequantize, quantize_blocks, quantize_tiles

E4M3_STEP = 2.0**-4  # half the spacing of E4M3's three mantissa bits, relative to the value
SUBNORMAL = 2.0**-10  # half of its smallest step


def bound(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """How far a value may be moved: half a step of E4M3 at its size."""
    return torch.maximum(x.abs() * E4M3_STEP, scales * SUBNORMAL) * (1 + 1e-5)


@given(rows=st.integers(1, 4), tiles=st.integers(1, 3), size=st.integers(-20, 20), seed=SEEDS)
def test_tiles_come_back_within_half_a_step(rows: int, tiles: int, size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, tiles * 128, generator=generator) * 2.0**size
    values, scales = quantize_tiles(x)
    assert values.dtype == torch.float8_e4m3fn and values.shape == x.shape
    assert scales.dtype == torch.float32 and scales.shape == (rows, tiles)
    back = dequantize(values, scales)
    assert ((back - x).abs() <= bound(x, scales.repeat_interleave(128, -1))).all()
    amax = x.unflatten(-1, (tiles, 128)).abs().amax(-1)
    torch.testing.assert_close(scales, amax / 448)
    assert (values.float().unflatten(-1, (tiles, 128)).abs().amax(-1) == 448).all()


@given(rows=st.integers(1, 300), cols=st.integers(1, 300), seed=SEEDS, block=st.sampled_from([32, 128]))
def test_blocks_come_back_within_half_a_step(rows: int, cols: int, seed: int, block: int) -> None:
    w = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    values, scales = quantize_blocks(w, block)
    assert scales.shape == (-(-rows // block), -(-cols // block))
    back = dequantize(values, scales, block)
    for i in range(0, rows, block):
        for j in range(0, cols, block):
            part, scale = w[i : i + block, j : j + block], scales[i // block, j // block]
            torch.testing.assert_close(scale, part.abs().max() / 448)
            error = (back[i : i + block, j : j + block] - part).abs()
            assert (error <= bound(part, scale)).all()


def test_the_scale_is_what_one_multiplies_by() -> None:
    w = torch.full((128, 128), 3.0)
    values, scales = quantize_blocks(w)
    torch.testing.assert_close(values.float() * scales, w)
    assert (values.float() / scales - w).abs().min() > 1


def test_an_outlier_spoils_its_own_tile_only() -> None:
    x = torch.full((1, 256), 1e-4)
    x[0, 5] = 448.0
    back = dequantize(*quantize_tiles(x))
    assert not back[0, 6:128].any()  # below half of E4M3's smallest step
    torch.testing.assert_close(back[0, 128:], x[0, 128:])


@pytest.mark.parametrize("quantize", [quantize_tiles, quantize_blocks])
def test_zeros_stay_zeros(quantize) -> None:
    values, scales = quantize(torch.zeros(128, 128))
    assert not values.float().any() and (scales == 1).all()


def test_half_precision_goes_in_and_out() -> None:
    x = torch.randn(2, 128).bfloat16()
    values, scales = quantize_tiles(x)
    assert torch.equal(values.float(), quantize_tiles(x.float())[0].float())
    assert dequantize(values, scales, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(KernelError, match="100"):
        quantize_tiles(torch.zeros(2, 100))
    values, scales = quantize_blocks(torch.zeros(256, 130))
    with pytest.raises(KernelError, match=r"\(1, 2\)"):
        dequantize(values, scales[:1])
