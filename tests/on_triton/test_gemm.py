"""The FP8 product's kernels against their plain form, at every setting that ships."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from poison import fill, poisoned, spread
from strategies import SEEDS, assert_rejects

from dsv3lib.errors import KernelError
from dsv3lib.kernels import quantize_blocks, quantize_tiles
from dsv3lib.kernels.matmul.gemm import gemm_fp8, gemm_fp8_ref, wgrad
from dsv3lib.kernels.toolchain import tuning

ROWS = st.sampled_from([0, 1, 2, 31, 32, 33, 64, 65, 127, 128, 129, 257])
CASES = {"m": ROWS, "n": st.integers(1, 3), "slices": st.sampled_from([1, 2, 9]), "seed": SEEDS}
# Mean relative difference that is no error. Hopper's tensor cores keep about 14 bits while they add up a slice; the
# interpreter keeps FP32. A missing slice or scale is a thousand times either.
AGREES = 1e-3 if torch.cuda.is_available() else 1e-6
FEW = settings(max_examples=6)


def operands(device, m: int, n: int, slices: int, seed: int, tiled: bool = False) -> list[torch.Tensor]:
    """Values and scales cut out of memory that holds NaN: rows further apart than they are wide."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        size = torch.randint(-4, 4, (shape[0], shape[1] // 128), generator=generator).exp2()
        return torch.randn(shape, generator=generator) * size.repeat_interleave(128, 1)

    x, w = noise(m, slices * 128).to(device), noise(n * 128, slices * 128).to(device)
    pairs = *quantize_tiles(x), *(quantize_tiles(w) if tiled else quantize_blocks(w))
    return [spread(t) for t in pairs]


def mean_relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    got, expected = got.double(), expected.double()
    return float((got - expected).abs().sum() / expected.abs().sum()) if expected.numel() else 0.0


def check(product, device, m: int, n: int, slices: int, seed: int) -> None:
    given = operands(device, m, n, slices, seed)
    with poisoned():
        exact = product(*given, torch.float32)
        got = product(*given, torch.bfloat16)
    expected = gemm_fp8_ref(*given, torch.float32)
    assert mean_relative(exact, expected) < AGREES
    assert mean_relative(got, exact.bfloat16()) < max(AGREES, 1e-5)


@FEW
@given(**CASES)
def test_product(device, m, n, slices, seed):
    check(gemm_fp8, device, m, n, slices, seed)


def forgets_the_last_slice(a, a_scales, b, b_scales, out_dtype):
    k = max(a.shape[1] - 128, 128)
    return gemm_fp8_ref(a[:, :k], a_scales[:, : k // 128], b[:, :k], b_scales[:, : k // 128], out_dtype)


def scales_after_rounding(a, a_scales, b, b_scales, out_dtype):
    total = gemm_fp8_ref(a, a_scales, b, b_scales, torch.float32)
    return total.bfloat16().to(out_dtype)


@pytest.mark.parametrize("wrong", [forgets_the_last_slice, scales_after_rounding])
def test_the_check_rejects(device, wrong):
    assert_rejects(lambda **case: check(wrong, device, **case), **CASES)


SHIPPED = [
    pytest.param(name, row, id=f"{name}-{i}")
    for name in tuning.GENERATIONS[1:]
    for i, row in enumerate(tuning.read(tuning.FOLDER / f"{name}.json")["gemm_fp8"])
]


@pytest.mark.parametrize(("generation", "row"), SHIPPED)
@pytest.mark.parametrize(("m", "n", "slices"), [(5, 1, 1), (300, 2, 2), (70, 1, 9)])
def test_every_shipped_row_takes_every_shape(device, generation, row, m, n, slices):
    if device.type == "cuda" and generation not in tuning.sources(device):
        pytest.skip(f"settings of another generation, {generation}, may not fit this device")
    given = operands(device, m, n, slices, seed=m)
    row = {name: value for name, value in row.items() if name != "when"}
    with poisoned():
        got = gemm_fp8(*given, torch.float32, settings=row)
        again = gemm_fp8(*given, torch.float32, settings=row)
    assert mean_relative(got, gemm_fp8_ref(*given, torch.float32)) < AGREES
    assert torch.equal(got, again)  # split K too: no order that changes from run to run


@FEW
@given(**CASES)
def test_gradient_of_the_weight_is_added_to_what_is_there(device, m, n, slices, seed):
    a, a_scales, b, b_scales = operands(device, m, n, slices, seed, tiled=True)
    total = torch.full((m, n * 128), 3.0, device=device)
    with poisoned():
        result = wgrad((a, a_scales), (b, b_scales), total)
        once = wgrad((a, a_scales), (b, b_scales))
    expected = gemm_fp8_ref(a, a_scales, b, b_scales, torch.float32)
    assert result is total and once.dtype == torch.float32
    assert mean_relative(once, expected) < AGREES
    assert mean_relative(total, 3 + expected) < AGREES


@pytest.mark.parametrize(("generation", "row"), SHIPPED)
@pytest.mark.parametrize(("m", "n", "k"), [(5, 192, 256), (130, 90, 144)])
def test_every_shipped_row_takes_widths_that_do_not_divide(device, generation, row, m, n, k):
    """The last tiles of N and K are cut short: V3's 576 rows of kv_a_proj_with_mqa, forward and backward."""
    if device.type == "cuda" and generation not in tuning.sources(device):
        pytest.skip(f"settings of another generation, {generation}, may not fit this device")
    draw = torch.Generator().manual_seed(n)
    a, b = (torch.randn(rows, k, generator=draw) for rows in (m, n))
    (a, a_scales), (b, b_scales) = padded_tiles(a), quantize_blocks(b)
    given = [spread(t.to(device)) for t in (a, a_scales, b, b_scales)]
    row = {name: value for name, value in row.items() if name != "when"}
    with poisoned():
        got = gemm_fp8(*given, torch.float32, settings=row)
        half = gemm_fp8(*given, torch.bfloat16, settings=row)
    assert got.shape == (m, n) and mean_relative(got, gemm_fp8_ref(*given, torch.float32)) < AGREES
    assert mean_relative(half, got.bfloat16()) < 1e-5


@pytest.mark.parametrize(("m", "n"), [(576, 384), (130, 40), (20, 90)])
def test_gradients_of_weights_whose_widths_do_not_divide(device, m, n):
    draw = torch.Generator().manual_seed(m)
    a, b = (quantize_tiles(torch.randn(rows, 256, generator=draw).to(device)) for rows in (m, n))
    total = torch.ones(m, n, device=device)
    with poisoned():
        once, result = wgrad(a, b), wgrad(a, b, total)
    expected = gemm_fp8_ref(*a, *b, torch.float32)
    assert result is total and mean_relative(once, expected) < AGREES
    assert mean_relative(total, 1 + expected) < AGREES


def padded_tiles(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tiles of rows whose width does not divide, the last one cut short."""
    values, scales = quantize_tiles(F.pad(x, (0, -x.shape[1] % 128)))
    return values[:, : x.shape[1]], scales


@pytest.mark.parametrize("m", [7, 40])
def test_few_rows_are_added_too(device, m):
    given = operands(device, m, 1, 3, seed=0)
    total = torch.ones(m, 128, device=device)
    gemm_fp8(*given, torch.float32, accumulate_into=total)
    assert mean_relative(total, 1 + gemm_fp8_ref(*given, torch.float32)) < AGREES


@pytest.mark.parametrize("m", [40, 300])
def test_scales_may_lie_transposed(device, m):
    a, a_scales, b, b_scales = operands(device, m, 2, 3, seed=1)
    lying = spread(a_scales.t()).t()
    assert lying.stride(0) == 1
    expected = gemm_fp8(a, a_scales, b, b_scales)
    assert torch.equal(gemm_fp8(a, lying, b, b_scales.t().contiguous().t()), expected)


@pytest.mark.parametrize("m", [1, 300])
def test_nan_stays_in_its_row(device, m):
    a, a_scales, b, b_scales = operands(device, m, 1, 3, seed=2)
    if device.type == "cuda":
        fill(a[m // 2, 130:131])
    else:  # the interpreter reads E4M3's NaN as 480
        fill(a_scales[m // 2, 1:2])
    y = gemm_fp8(a, a_scales, b, b_scales)
    assert y[m // 2].isnan().all() and int(y.isnan().any(1).sum()) == 1


def test_settings_that_cut_a_block_are_refused(device):
    given = operands(device, 300, 2, 1, seed=0)
    row = tuning.pick("gemm_fp8", device, M=300, N=256, K=128, OUT=2, TILED=0)
    with pytest.raises(KernelError, match="BLOCK_N is 256, expected a divisor of 128"):
        gemm_fp8(*given, settings=row | {"BLOCK_N": 256})


def test_halves_are_refused_where_both_sides_have_tiles(device):
    given = operands(device, 4, 1, 1, seed=0, tiled=True)
    row = tuning.pick("gemm_fp8", device, M=4, N=128, K=128, OUT=2, TILED=1)
    with pytest.raises(KernelError, match="HALVES is 2, expected 1"):
        gemm_fp8(*given, settings=row | {"HALVES": 2})


def test_operands_that_the_copy_engine_cannot_read_are_refused(device):
    a, a_scales, b, b_scales = operands(device, 4, 1, 1, seed=0)
    wide = torch.zeros(4, 144, dtype=a.dtype, device=device)
    with pytest.raises(KernelError, match="starts 8 bytes past a 16-byte border"):
        gemm_fp8(wide[:, 8:136], a_scales, b, b_scales)
