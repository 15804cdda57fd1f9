"""The FP8 product's plain form against an independent one, the three products of training, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, assert_rejects, unchecked

from dsv3lib.errors import KernelError
from dsv3lib.kernels import dequantize, quantize_blocks, quantize_tiles
from dsv3lib.kernels.matmul.gemm import dgrad, fprop, gemm_fp8, gemm_fp8_ref, wgrad

CASES = {
    "m": st.integers(0, 9),
    "n": st.integers(1, 2),
    "slices": st.integers(1, 3),
    "tiled": st.booleans(),
    "seed": SEEDS,
}


def operands(m: int, n: int, slices: int, tiled: bool, seed: int) -> tuple[torch.Tensor, ...]:
    """Rows and blocks of very different sizes, so that a scale in the wrong place shows."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        size = torch.randint(-8, 8, (shape[0], shape[1] // 128), generator=generator).exp2()
        return torch.randn(shape, generator=generator) * size.repeat_interleave(128, 1)

    x, w = noise(m, slices * 128), noise(n * 128, slices * 128)
    return *quantize_tiles(x), *(quantize_tiles(w) if tiled else quantize_blocks(w))


def check(product, m: int, n: int, slices: int, tiled: bool, seed: int) -> None:
    a, a_scales, b, b_scales = operands(m, n, slices, tiled, seed)
    exact = dequantize(a, a_scales).double() @ dequantize(b, b_scales).double().t()
    size = dequantize(a, a_scales).double().abs() @ dequantize(b, b_scales).double().abs().t()
    got = product(a, a_scales, b, b_scales, torch.float32)
    assert got.dtype == torch.float32 and got.shape == exact.shape
    assert ((got - exact).abs() <= 1e-5 * size).all()


@pytest.mark.parametrize("product", [gemm_fp8, gemm_fp8_ref])
@given(**CASES)
def test_product_of_the_dequantised(product, m, n, slices, tiled, seed):
    check(product, m, n, slices, tiled, seed)


def one_scale_for_all_slices(a, a_scales, b, b_scales, out_dtype):
    return gemm_fp8_ref(a, a_scales[:, :1].expand_as(a_scales), b, b_scales, out_dtype)


def scales_of_other_rows(a, a_scales, b, b_scales, out_dtype):
    return gemm_fp8_ref(a, a_scales, b, b_scales.flip(0), out_dtype)


@pytest.mark.parametrize("wrong", [one_scale_for_all_slices, scales_of_other_rows])
def test_the_check_rejects(wrong):
    assert_rejects(lambda **case: check(wrong, **case), **CASES)


@given(**CASES)
def test_fp32_sums_stay_close_to_fp64(m, n, slices, tiled, seed):
    given = operands(m, n, slices, tiled, seed)
    exact = gemm_fp8_ref(*given, torch.float64, torch.float64)
    if exact.numel():
        assert (gemm_fp8_ref(*given, torch.float32) - exact).abs().mean() < 1e-6 * exact.abs().mean()


def difference(x: torch.Tensor, y: torch.Tensor) -> float:
    x, y = x.double(), y.double()
    return float(1 - 2 * (x * y).sum() / (x * x + y * y).sum())


def test_three_products_are_a_linear_layer_s_forward_and_backward():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 384, generator=generator, requires_grad=True)
    w = torch.randn(128, 384, generator=generator, requires_grad=True)
    dy = torch.randn(256, 128, generator=generator)
    (x @ w.t()).backward(dy)
    x_now, w_now = x.detach(), w.detach()
    values, scales = quantize_blocks(w_now)
    transposed = values.view(torch.uint8).t().contiguous().view(values.dtype), scales.t().contiguous()
    again, its_scales = quantize_blocks(w_now.t().contiguous())
    assert torch.equal(again.view(torch.uint8), transposed[0].view(torch.uint8))  # square blocks: exact
    assert torch.equal(its_scales, transposed[1])
    y = fprop(quantize_tiles(x_now), (values, scales))
    dx = dgrad(quantize_tiles(dy), transposed)
    gradient = torch.zeros(128, 384)
    dw = wgrad(quantize_tiles(dy.t().contiguous()), quantize_tiles(x_now.t().contiguous()), gradient)
    assert dw is gradient and y.dtype == dx.dtype == torch.bfloat16 and dw.dtype == torch.float32
    for got, expected in ((y, (x @ w.t()).detach()), (dx, x.grad), (dw, w.grad)):
        assert difference(got, expected) < 1e-3
    assert difference(dw, w.grad.flip(0)) > 1e-3


def test_gradients_of_micro_batches_add_up():
    a, a_scales, b, b_scales = operands(128, 1, 1, True, seed=1)
    once = wgrad((a, a_scales), (b, b_scales))
    total = torch.ones_like(once)
    for _ in range(2):
        wgrad((a, a_scales), (b, b_scales), total)
    torch.testing.assert_close(total, 1 + 2 * once)


def test_nan_and_infinity_reach_what_they_belong_to():
    a, a_scales, b, b_scales = operands(3, 1, 2, False, seed=2)
    a.view(torch.uint8)[1, 5] = 0x7F  # E4M3's NaN
    a_scales[2, 0] = float("inf")
    y = gemm_fp8(a, a_scales, b, b_scales)
    assert y[0].isfinite().all() and y[1].isnan().all() and not y[2].isfinite().any()


def test_nothing_to_sum_is_zero():
    a, b = (torch.empty(r, 0, dtype=torch.float8_e4m3fn) for r in (2, 128))
    assert torch.equal(gemm_fp8(a, torch.empty(2, 0), b, torch.empty(1, 0)), torch.zeros(2, 128).bfloat16())


def bad(**changes) -> dict:
    a, a_scales, b, b_scales = operands(4, 1, 2, False, seed=0)
    fine = {"a": a, "a_scales": a_scales, "b": b, "b_scales": b_scales}
    return fine | {
        name: change(fine[name]) if callable(change) else change for name, change in changes.items()
    }


@pytest.mark.parametrize(
    ("operand", "change", "words"),
    [
        ("a", lambda a: a.float(), "a is float32, expected float8_e4m3fn"),
        ("a", lambda a: a.view(torch.float8_e5m2), "float8_e5m2"),
        ("a", lambda a: a[0], "expected [any, any]"),
        ("b", lambda b: b[:, :128], "b has shape [128, 128], expected [any, 256]"),
        ("a_scales", lambda s: s[:1], "a_scales (1 x 128 tiles) has shape [1, 2], expected [4, 2]"),
        ("a_scales", lambda s: s.double(), "a_scales is float64"),
        ("b_scales", lambda s: s[:, :1], "expected [1, 2] for 128 x 128 blocks or [128, 2]"),
        ("a", lambda a: a.t().contiguous().t(), "side by side"),
        ("a", lambda a: torch.cat([a, a[:, :8]], 1)[:, :256], "264"),
        ("out_dtype", torch.float16, "out_dtype is torch.float16"),
        ("accumulate_into", torch.zeros(4, 128, dtype=torch.bfloat16), "accumulate_into is bfloat16"),
        ("accumulate_into", torch.zeros(128, 4).t(), "contiguous"),
        ("accumulate_into", torch.zeros(3, 128), "accumulate_into has shape [3, 128]"),
    ],
)
def test_refused(operand, change, words):
    case = bad()
    case[operand] = change(case[operand]) if operand in case else change
    with unchecked(), pytest.raises(KernelError) as raised:
        gemm_fp8(**case)
    assert words in str(raised.value)


@pytest.mark.parametrize("tiled", [False, True])
def test_widths_that_do_not_divide_are_cut_short(tiled):
    """V3's 576 rows of kv_a_proj_with_mqa forward, and as the sum's length of its input's gradient."""
    draw = torch.Generator().manual_seed(4)
    for n, k in ((576, 256), (128, 576), (40, 48)):
        a, b = (torch.randn(rows, k + -k % 128, generator=draw) for rows in (5, n))
        a[:, k:], b[:, k:] = 0, 0
        (a, a_scales), (b, b_scales) = quantize_tiles(a), (quantize_tiles if tiled else quantize_blocks)(b)
        padded = gemm_fp8_ref(a, a_scales, b, b_scales, torch.float32)
        cut = [t[:, :k].view(torch.uint8).clone().view(t.dtype) for t in (a, b)]
        got = gemm_fp8(cut[0], a_scales, cut[1], b_scales, torch.float32)
        torch.testing.assert_close(got, padded)
        assert float((got - padded.roll(1, 1)).abs().max()) > 1
        with pytest.raises(KernelError, match="b_scales has shape"):
            gemm_fp8(cut[0], a_scales, cut[1], b_scales[:-1], torch.float32)


def test_rows_off_a_border_are_refused():
    a = torch.zeros(2, 24, dtype=torch.float8_e4m3fn)
    with pytest.raises(KernelError, match="rows of a lie .24. bytes apart"):
        gemm_fp8(a, torch.ones(2, 1), a, torch.ones(1, 1))


def test_blocks_on_both_sides_are_refused():
    a, a_scales = quantize_blocks(torch.ones(256, 128))
    with unchecked(), pytest.raises(KernelError, match="1 x 128 tiles"):
        gemm_fp8(a, a_scales, a, a_scales)
