"""The experts' FP8 products: kernels against the plain forms, in both layouts, and the weights' gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from poison import poisoned, spread
from strategies import SEEDS, assert_rejects

from dsv3lib.errors import KernelError
from dsv3lib.kernels import quantize_blocks, quantize_tiles
from dsv3lib.kernels.matmul.grouped_gemm_fp8 import (
    grouped_gemm_fp8,
    grouped_gemm_fp8_masked,
    grouped_gemm_fp8_masked_ref,
    grouped_gemm_fp8_ref,
    grouped_wgrad_fp8,
    grouped_wgrad_fp8_ref,
)
from dsv3lib.kernels.toolchain import tuning

COUNTS = st.lists(st.sampled_from([0, 0, 1, 17, 64, 129, 300]), min_size=1, max_size=4)
CASES = {"counts": COUNTS, "n": st.integers(1, 2), "slices": st.integers(1, 3), "seed": SEEDS}
# Mean relative difference that is no error: the interpreter's FP32 sums in another order, a few of which round to the
# other BF16; Hopper's tensor cores keep about 14 bits while they add up a slice.
AGREES = 1e-3 if torch.cuda.is_available() else 1e-5
FEW = settings(max_examples=6)


def operands(device, counts: list[int], n: int, slices: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(counts), slices * 128, generator=generator).to(device)
    weight = torch.randn(len(counts), n * 128, slices * 128, generator=generator)
    blocks = [quantize_blocks(w.to(device)) for w in weight * torch.arange(1, len(counts) + 1)[:, None, None]]
    a, a_scales = quantize_tiles(x)
    stacked = torch.stack([b for b, _ in blocks]), torch.stack([s for _, s in blocks])
    return [spread(a), spread(a_scales), *stacked]


def mean_relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    got, expected = got.double(), expected.double()
    size = float(expected.abs().sum())
    return float((got - expected).abs().sum()) / size if size else float(got.abs().sum())


def check(product, device, counts, n, slices, seed) -> None:
    given = *operands(device, counts, n, slices, seed), torch.tensor(counts, device=device)
    with poisoned():
        got = product(*given)
    expected = grouped_gemm_fp8_ref(*given)
    assert got.shape == expected.shape and got.dtype == torch.bfloat16
    assert mean_relative(got, expected) < AGREES


@FEW
@given(**CASES)
def test_product(device, counts, n, slices, seed):
    check(grouped_gemm_fp8, device, counts, n, slices, seed)


def test_the_check_rejects_scales_of_another_group(device):
    def wrong(a, a_scales, b, b_scales, counts):
        return grouped_gemm_fp8_ref(a, a_scales, b, b_scales.roll(1, 0), counts)

    assert_rejects(lambda **case: check(wrong, device, **case), **CASES)


SHIPPED = [
    pytest.param(name, row, id=f"{name}-{i}")
    for name in tuning.GENERATIONS[1:]
    for i, row in enumerate(tuning.read(tuning.FOLDER / f"{name}.json")["grouped_gemm_fp8"])
]


@pytest.mark.parametrize(("generation", "row"), SHIPPED)
def test_every_shipped_row(device, generation, row):
    if device.type == "cuda" and generation not in tuning.sources(device):
        pytest.skip(f"settings of another generation, {generation}, may not fit this device")
    counts = [5, 0, 270, 1]
    given = *operands(device, counts, 2, 2, seed=0), torch.tensor(counts, device=device)
    row = {name: value for name, value in row.items() if name != "when"}
    with poisoned():
        y = grouped_gemm_fp8(*given, settings=row)
        again = grouped_gemm_fp8(*given, settings=row)
    assert mean_relative(y, grouped_gemm_fp8_ref(*given)) < AGREES
    assert torch.equal(y, again)


@FEW
@given(**CASES)
def test_masked_layout(device, counts, n, slices, seed):
    room = max(max(counts) - 1, 1)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(counts), room, slices * 128, generator=generator).to(device)
    a, a_scales = quantize_tiles(x)
    _, _, b, b_scales = operands(device, counts, n, slices, seed)
    numbers = torch.tensor(counts, device=device)
    valid = torch.arange(room, device=device) < numbers[:, None]
    a_scales[~valid] = float("nan")
    with poisoned():
        y = grouped_gemm_fp8_masked(a, a_scales, b, b_scales, numbers)
    expected = grouped_gemm_fp8_masked_ref(a, a_scales, b, b_scales, numbers)
    assert mean_relative(y[valid], expected[valid]) < AGREES
    assert y[~valid].isnan().all()  # not written: the poison is still there


@given(counts=st.lists(st.integers(0, 2), min_size=1, max_size=4), n=st.integers(1, 2), seed=SEEDS)
@FEW
def test_gradients_of_the_weights(device, counts, n, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = 128 * sum(counts)
    dy, x = (torch.randn(128 * w, tokens, generator=generator).to(device) for w in (n, 1))
    given = *map(spread, quantize_tiles(dy)), *map(spread, quantize_tiles(x)), 128 * torch.tensor(counts)
    given = [t.to(device) for t in given]
    total = torch.ones(len(counts), 128 * n, 128, device=device)
    with poisoned():
        got = grouped_wgrad_fp8(*given)
        assert grouped_wgrad_fp8(*given, total) is total
    expected = grouped_wgrad_fp8_ref(*given)
    assert mean_relative(got, expected) < AGREES
    assert mean_relative(total, 1 + expected) < AGREES
    assert all(not got[g].any() for g, count in enumerate(counts) if count == 0)


def test_what_only_the_device_knows_is_shown_by_nan(device):
    a, a_scales, b, b_scales = operands(device, [40, 0, 60], 1, 1, seed=0)
    y = grouped_gemm_fp8(a, a_scales, b, b_scales, torch.tensor([20, 0, 50], device=device))
    assert y[:70].isfinite().all() and y[70:].isnan().all()
    values, scales = quantize_tiles(torch.ones(128, 256, device=device))
    cut = torch.tensor([128, 100, 28], device=device)
    dw = grouped_wgrad_fp8(values, scales, values, scales, cut)
    assert dw[0].isfinite().all() and dw[1:].isnan().all()


def test_settings_that_cut_a_block_are_refused(device):
    given = *operands(device, [3], 2, 1, seed=0), torch.tensor([3], device=device)
    row = tuning.pick("grouped_gemm_fp8", device, M=3, N=256, K=128, G=1, ROWS=3)
    with pytest.raises(KernelError, match="BLOCK_N is 256, expected a divisor of 128"):
        grouped_gemm_fp8(*given, settings=row | {"BLOCK_N": 256})
