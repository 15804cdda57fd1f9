"""The quantising kernels equal their references to the last bit, on a GPU as in the interpreter."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from poison import assert_same, poisoned, spread
from strategies import SEEDS

from dsv3lib.errors import KernelError
from dsv3lib.kernels.quantize import reference as ref
from dsv3lib.kernels.quantize import tiles_and_blocks as q

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
SMALL = {
    "TILES": 4,
    "num_warps": 1,
}  # few tiles a program, so that small inputs make several and a last one short


def values(rows: int, cols: int, dtype: torch.dtype, seed: int, device: torch.device) -> torch.Tensor:
    """Random numbers of sizes from far below to far above 1, both signs, with a zero here and there."""
    generator = torch.Generator().manual_seed(seed)
    x = (
        torch.randn(rows, cols, generator=generator)
        * torch.randn(rows, cols, generator=generator).mul(3).exp()
    )
    x[torch.rand(rows, cols, generator=generator) < 0.05] = 0
    return x.to(dtype).to(device)


@given(
    rows=st.integers(0, 9), tiles=st.integers(1, 3), apart=st.booleans(), power_of_two=st.booleans(),
    format=st.sampled_from(["e4m3", "e5m6"]), dtype=DTYPES, seed=SEEDS,
)  # fmt: skip
def test_tiles(device, rows, tiles, apart, power_of_two, format, dtype, seed) -> None:
    x = values(rows, tiles * 128, dtype, seed, device)
    with poisoned():
        given_x = spread(x) if apart else x
        got = q.quantize_tiles(given_x, power_of_two, format, settings=SMALL)
    assert_same(got, ref.quantize_tiles_ref(x, power_of_two, format))


@given(
    rows=st.sampled_from([0, 1, 127, 128, 129]), apart=st.booleans(), power_of_two=st.booleans(), seed=SEEDS
)
def test_both_ways(device, rows, apart, power_of_two, seed) -> None:
    x = values(rows, 256, torch.float16, seed, device)
    with poisoned():
        both = q.quantize_tiles_both(spread(x) if apart else x, power_of_two)
    assert_same(both, ref.quantize_tiles_both_ref(x, power_of_two))


@given(
    rows=st.integers(1, 140), cols=st.integers(1, 140), block=st.sampled_from([20, 32, 128]),
    power_of_two=st.booleans(), apart=st.booleans(), dtype=DTYPES, seed=SEEDS,
)  # fmt: skip
def test_blocks(device, rows, cols, block, power_of_two, apart, dtype, seed) -> None:
    w = values(rows, cols, dtype, seed, device)
    with poisoned():
        got = q.quantize_blocks(spread(w) if apart else w, block, power_of_two)
    assert_same(got, ref.quantize_blocks_ref(w, block, power_of_two))


@given(rows=st.integers(1, 140), cols=st.integers(1, 140), seed=SEEDS)
def test_blocks_and_their_transpose(device, rows, cols, seed) -> None:
    w = values(rows, cols, torch.float32, seed, device)
    with poisoned():
        both = q.quantize_blocks_both(w)
    straight, turned = ref.quantize_blocks_ref(w), ref.quantize_blocks_ref(w.t().contiguous())
    assert_same(both, (*straight, *turned))


@given(
    rows=st.integers(0, 140), cols=st.integers(1, 260), blocks=st.booleans(),
    dtype=DTYPES, seed=SEEDS,
)  # fmt: skip
def test_back_again(device, rows, cols, blocks, dtype, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    e4m3 = torch.randn(rows, cols, generator=generator).mul(50).to(torch.float8_e4m3fn).to(device)
    shape = (-(-rows // 128) if blocks else rows, -(-cols // 128))
    scales = torch.rand(shape, generator=generator).to(device)
    with poisoned():
        got = q.dequantize(e4m3, scales, dtype=dtype, settings=SMALL)
    assert_same((got,), (ref.dequantize_ref(e4m3, scales, dtype=dtype),))


def test_back_again_from_e5m6(device) -> None:
    x = values(5, 256, torch.float32, 0, device)
    e5m6, scales = q.quantize_tiles(x, format="e5m6")
    assert_same((q.dequantize(e5m6, scales),), (ref.dequantize_ref(e5m6, scales),))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("format", ["e4m3", "e5m6"])
def test_what_is_not_finite_and_what_is_tiny(device, power_of_two, format) -> None:
    x = values(8, 256, torch.float32, 1, device)
    x[0, 3] = float("nan")
    x[1, 200] = float("inf")
    x[2, 5] = -float("inf")
    x[3] = 0
    x[4, :128] *= 1e-40
    x[5, :128] = 0
    x[5, 7] = 1e-45
    x[6, :128] = 3.4e38
    got = q.quantize_tiles(x, power_of_two, format)
    assert_same(got, ref.quantize_tiles_ref(x, power_of_two, format))
    for row, tile in ((0, 0), (1, 1), (2, 0)):
        assert got[0][row].float().view(2, 128)[tile].isnan().all() and got[1][row, tile].isnan()
        assert not got[0][row].float().view(2, 128)[1 - tile].isnan().any()
    assert (got[1][3] == 1).all() and got[1].nan_to_num(1).min() >= 2.0**-126
    assert not got[0][3:].float().isnan().any()
    if format == "e4m3":
        assert_same(q.quantize_tiles_both(x, power_of_two), ref.quantize_tiles_both_ref(x, power_of_two))
        assert_same(q.quantize_blocks(x, 128, power_of_two), ref.quantize_blocks_ref(x, 128, power_of_two))


def test_every_value_of_e4m3_survives(device) -> None:
    """All 127 sizes of both signs, each in a tile whose scale is 1."""
    bits = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    all_values = bits.view(torch.float8_e4m3fn).float()
    all_values = all_values[~all_values.isnan()]
    x = torch.zeros(2, 128)
    x.view(-1)[: all_values.numel()] = all_values
    x[:, -1] = 448
    stored, scales = q.quantize_tiles(x.to(device))
    assert (scales == 1).all() and torch.equal(stored.float().cpu(), x)


def test_ties_go_to_even(device) -> None:
    """Half-way between two neighbours, just below and just above, at every binade of both formats."""
    x = torch.zeros(40, 128)
    for row in range(40):
        size = 2.0 ** (8 - row % 20)
        for i, eighths in enumerate((8.5, 9.5, 10.5, 11.5, 12.5, 13.5, 14.0)):
            exact = torch.tensor(size * eighths / 8)
            x[row, 3 * i : 3 * i + 3] = torch.stack(
                [exact.nextafter(torch.tensor(0.0)), exact, exact.nextafter(torch.tensor(1e9))]
            )
        x[row, 127] = 448.0
    x = x.clamp(max=448) * torch.where(torch.arange(40) < 20, 1.0, -1.0)[:, None]
    for format in ("e4m3", "e5m6"):
        for power_of_two in (False, True):
            got = q.quantize_tiles(x.to(device), power_of_two, format)
            assert_same(got, ref.quantize_tiles_ref(x.to(device), power_of_two, format))


def test_scales_of_many_mantissas(device) -> None:
    """The inverse of a scale is rounded correctly for whatever mantissa: far more of them where a GPU is."""
    rows = 2**17 if device.type == "cuda" else 2**6
    x = torch.randn(rows, 128, generator=torch.Generator().manual_seed(3)).to(device)
    bits = torch.linspace(0x3F800000, 0x3FFFFFFF, rows, dtype=torch.float64).to(torch.int32).to(device)
    x[:, 0] = 8 * bits.view(torch.float32)
    assert_same(q.quantize_tiles(x), ref.quantize_tiles_ref(x))


def _scale_of_the_next_tile(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    stored, scales = ref.quantize_tiles_ref(x)
    return stored, scales.roll(1, -1)


def _cut_off(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    stored, scales = ref.quantize_tiles_ref(x)
    inverse = (1 / scales).repeat_interleave(128, -1)
    scaled = x * inverse
    rounded_up = stored.float().abs() > scaled.abs()
    lower = (stored.view(torch.uint8) - rounded_up.to(torch.uint8)).view(torch.float8_e4m3fn)
    return lower, scales


def _one_last_place(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    stored, scales = ref.quantize_tiles_ref(x)
    scales[0, 0] = scales[0, 0].nextafter(scales.new_tensor(0))
    return stored, scales


@pytest.mark.parametrize("wrong", [_scale_of_the_next_tile, _cut_off, _one_last_place])
def test_a_wrong_quantiser_is_seen(device, wrong: Callable) -> None:
    x = values(4, 256, torch.float32, 2, device)
    with pytest.raises(AssertionError):
        assert_same(q.quantize_tiles(x), wrong(x))


def test_what_was_never_written_is_seen(device) -> None:
    with poisoned(), pytest.raises(AssertionError):
        assert_same((torch.empty_like(torch.zeros(3, device=device)),), (torch.zeros(3, device=device),))


def test_what_does_not_fit_is_refused(device) -> None:
    x = torch.zeros(2, 256, device=device)
    with pytest.raises(KernelError, match="100"):
        q.quantize_tiles(x[:, :100])
    with pytest.raises(KernelError, match="100"):
        q.quantize_tiles_both(x[:, :100])
    eight = x.to(torch.float8_e4m3fn)
    for call in (q.quantize_tiles, q.quantize_tiles_both, q.quantize_blocks, q.quantize_blocks_both):
        with pytest.raises(KernelError, match="float8_e4m3fn"):
            call(eight)
    with pytest.raises(KernelError, match="block is 0"):
        q.quantize_blocks(x, 0)
    with pytest.raises(KernelError, match="fit neither"):
        q.dequantize(eight, torch.ones(2, 3, device=device))
    with pytest.raises(KernelError, match="values is float32"):
        q.dequantize(x, torch.ones(2, 2, device=device))
    with pytest.raises(KernelError, match="scales is float16"):
        q.dequantize(eight, torch.ones(2, 2, device=device, dtype=torch.float16))
