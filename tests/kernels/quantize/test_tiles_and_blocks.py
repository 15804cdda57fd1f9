"""FP8 with a scale per tile: one outlier spoils its own tile and no other."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS

from dsv3lib.errors import KernelError
from dsv3lib.kernels.quantize.reference import to_e5m6_ref
from dsv3lib.kernels.quantize.tiles_and_blocks import (
    dequantize,
    quantize_blocks,
    quantize_blocks_both,
    quantize_tiles,
    quantize_tiles_both,
)

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


# ---- powers of two, E5M6, both directions ------------------------------------------------------------------


def e5m6_values() -> torch.Tensor:
    """All numbers of 5 exponent and 6 mantissa bits from 0 up, from the format's definition, in FP64."""
    fractions = torch.arange(64, dtype=torch.float64) / 64
    below = fractions * 2.0**-14
    return torch.cat([below, *((1 + fractions) * 2.0**e for e in range(-14, 16))])


def nearest_even(x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """The nearest of the grid's numbers by comparing distances; of two, the one at an even place."""
    right = torch.searchsorted(grid, x.double().abs()).clamp(1, grid.numel() - 1)
    left = right - 1
    to_left, to_right = x.double().abs() - grid[left], grid[right] - x.double().abs()
    left_wins = (to_left < to_right) | ((to_left == to_right) & (left % 2 == 0))
    return torch.where(left_wins, grid[left], grid[right]).copysign(x.double())


@given(size=st.integers(-24, 15), seed=SEEDS)
def test_e5m6_is_the_nearest_of_its_values(size: int, seed: int) -> None:
    grid = e5m6_values()
    x = torch.randn(200, generator=torch.Generator().manual_seed(seed)).mul(2.0**size).clamp(-65024, 65024)
    middles = ((grid[1:] + grid[:-1]) / 2).float()
    for part in (x, middles, -middles, grid.float()):
        assert torch.equal(to_e5m6_ref(part).double(), nearest_even(part, grid))
    assert grid.max() == 65024 and to_e5m6_ref(x).dtype == torch.float16
    with pytest.raises(AssertionError):  # FP16 itself has four bits more
        assert torch.equal(middles.half().double(), nearest_even(middles, grid))


@given(rows=st.integers(1, 3), size=st.integers(-30, 30), seed=SEEDS)
def test_e5m6_tiles_come_back_within_half_a_step(rows: int, size: int, seed: int) -> None:
    x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(seed)) * 2.0**size
    values, scales = quantize_tiles(x, format="e5m6")
    assert values.dtype == torch.float16 and (values.unflatten(-1, (2, 128)).abs().amax(-1) == 65024).all()
    assert (values.view(torch.int16) & 0xF == 0).all()  # FP16's last four bits are never used
    spread = scales.repeat_interleave(128, -1)
    half_step = torch.maximum(x.abs() * 2.0**-7, spread * 2.0**-21) * (1 + 1e-5)
    assert ((dequantize(values, scales) - x).abs() <= half_step).all()


@given(size=st.integers(-90, 90), format=st.sampled_from(["e4m3", "e5m6"]), seed=SEEDS)
def test_power_of_two_scales_are_the_least_that_suffice(size: int, format: str, seed: int) -> None:
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(seed)) * 2.0**size
    x[0, 0] = 448 * 2.0**size  # exactly at the limit: no next power is needed
    x[0, 1:128] = 0
    values, scales = quantize_tiles(x, power_of_two=True, format=format)
    limit = 448 if format == "e4m3" else 65024
    exponents = torch.log2(scales.double())
    assert torch.equal(exponents, exponents.round())
    amax = x.unflatten(-1, (2, 128)).abs().amax(-1).double()
    assert (amax <= limit * scales).all() and (amax > limit * scales / 2).all()
    assert values.float().abs().max() <= limit
    if format == "e4m3":
        assert scales[0, 0] == 2.0**size


def test_moving_tiles_rounds_nothing_between_powers_of_two() -> None:
    """Why the paper wants them (§3.3.3): rows requantised as columns keep their bits, unless a scale differs much."""
    x = torch.randn(128, 128)
    for power_of_two in (True, False):
        rows = dequantize(*quantize_tiles(x, power_of_two))
        again = dequantize(*quantize_tiles(rows.t().contiguous(), power_of_two)).t()
        moved = float((again != rows).float().mean())
        assert moved < 0.02 if power_of_two else moved > 0.5


@given(rows=st.integers(0, 300), tiles=st.integers(1, 2), power_of_two=st.booleans(), seed=SEEDS)
def test_both_ways_is_one_way_twice(rows: int, tiles: int, power_of_two: bool, seed: int) -> None:
    x = torch.randn(rows, tiles * 128, generator=torch.Generator().manual_seed(seed))
    values, scales, values_t, scales_t = quantize_tiles_both(x, power_of_two)
    padded = -(-rows // 128) * 128
    assert values_t.shape == (tiles * 128, padded) and scales_t.shape == (tiles * 128, padded // 128)
    assert not values_t[:, rows:].float().any()
    assert torch.equal(dequantize(values, scales), dequantize(*quantize_tiles(x, power_of_two)))
    back = dequantize(values_t, scales_t)[:, :rows].t()
    assert ((back - x).abs() <= bound(x, scales_t.repeat_interleave(128, -1)[:, :rows].t())).all()


def test_blocks_both_ways_share_values_and_scales() -> None:
    w = torch.randn(300, 200)
    values, scales, values_t, scales_t = quantize_blocks_both(w)
    assert values_t.is_contiguous() and scales_t.is_contiguous()
    assert torch.equal(dequantize(values_t, scales_t), dequantize(values, scales).t())
    assert torch.equal(dequantize(*quantize_blocks(w.t().contiguous())), dequantize(values_t, scales_t))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_its_whole_tile_and_no_other(wrong: float, power_of_two: bool) -> None:
    x = torch.randn(2, 256)
    x[1, 130] = wrong
    for format in ("e4m3", "e5m6"):
        values, scales = quantize_tiles(x, power_of_two, format)
        bad = dequantize(values, scales).isnan()
        assert bad[1, 128:].all() and bad.sum() == 128 and scales.isnan().sum() == 1
    blocks, scales = quantize_blocks(x, 128, power_of_two)
    assert dequantize(blocks, scales).isnan().sum() == 256


@pytest.mark.parametrize("power_of_two", [False, True])
def test_the_tiniest_tile_has_a_normal_scale(power_of_two: bool) -> None:
    x = torch.full((1, 128), 1e-45)
    values, scales = quantize_tiles(x, power_of_two)
    assert scales.item() == 2.0**-126 and not values.float().isnan().any()


def test_new_arguments_are_refused_where_they_make_no_sense() -> None:
    with pytest.raises(KernelError, match="'e3m4'"):
        quantize_tiles.__wrapped__(torch.zeros(1, 128), format="e3m4")
    with pytest.raises(KernelError, match="block is 0"):
        quantize_blocks(torch.zeros(2, 2), 0)
    with pytest.raises(KernelError, match="float8"):
        quantize_tiles(torch.zeros(1, 128, dtype=torch.float8_e4m3fn))
    with pytest.raises(KernelError, match="float32"):
        dequantize(torch.zeros(1, 128), torch.ones(1, 1))
