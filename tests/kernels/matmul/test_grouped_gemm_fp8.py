"""The experts' FP8 products, plain forms: against products of the dequantised, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, assert_rejects, unchecked

from dsv3lib.errors import KernelError
from dsv3lib.kernels import dequantize, quantize_blocks, quantize_tiles
from dsv3lib.kernels.matmul.grouped_gemm_fp8 import (
    grouped_gemm_fp8,
    grouped_gemm_fp8_masked,
    grouped_gemm_fp8_ref,
    grouped_wgrad_fp8,
)

COUNTS = st.lists(st.integers(0, 4), min_size=1, max_size=4)
CASES = {"counts": COUNTS, "n": st.integers(1, 2), "slices": st.integers(1, 2), "seed": SEEDS}


def operands(counts: list[int], n: int, slices: int, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(counts), slices * 128, generator=generator)
    weight = torch.randn(len(counts), n * 128, slices * 128, generator=generator)
    weight *= torch.arange(1, len(counts) + 1).exp2()[:, None, None]
    blocks = [quantize_blocks(w) for w in weight]
    return *quantize_tiles(x), torch.stack([b for b, _ in blocks]), torch.stack([s for _, s in blocks])


def check(product, counts: list[int], n: int, slices: int, seed: int) -> None:
    a, a_scales, b, b_scales = operands(counts, n, slices, seed)
    got = product(a, a_scales, b, b_scales, torch.tensor(counts))
    x, group = dequantize(a, a_scales), [g for g, c in enumerate(counts) for _ in range(c)]
    assert got.dtype == torch.bfloat16 and got.shape == (len(group), n * 128)
    for row, g, y in zip(x, group, got, strict=True):
        expected = dequantize(b[g], b_scales[g]) @ row
        assert (y - expected).norm() <= 4e-3 * expected.norm()


@pytest.mark.parametrize("product", [grouped_gemm_fp8, grouped_gemm_fp8_ref])
@given(**CASES)
def test_each_row_meets_its_group_s_matrix(product, counts, n, slices, seed):
    check(product, counts, n, slices, seed)


def test_the_check_rejects_scales_of_another_group():
    def wrong(a, a_scales, b, b_scales, counts):
        return grouped_gemm_fp8_ref(a, a_scales, b, b_scales.roll(1, 0), counts)

    assert_rejects(lambda **case: check(wrong, **case), **CASES)


@given(**CASES)
def test_masked_layout_is_the_contiguous_one_with_gaps(counts, n, slices, seed):
    a, a_scales, b, b_scales = operands(counts, n, slices, seed)
    room = max(counts) + 1
    gaps = torch.zeros(len(counts), room, slices * 128).to(a.dtype)
    gap_scales = torch.full((len(counts), room, slices), float("nan"))
    valid = torch.arange(room) < torch.tensor(counts)[:, None]
    gaps.view(torch.uint8)[valid], gap_scales[valid] = a.view(torch.uint8), a_scales
    y = grouped_gemm_fp8_masked(gaps, gap_scales, b, b_scales, torch.tensor(counts))
    assert torch.equal(y[valid], grouped_gemm_fp8(a, a_scales, b, b_scales, torch.tensor(counts)))


@pytest.mark.parametrize("counts", [[1, 0, 2], [0, 0], [3]])
def test_gradient_of_the_weights(counts):
    generator = torch.Generator().manual_seed(0)
    tokens = 128 * sum(counts)
    dy, x = torch.randn(128, tokens, generator=generator), torch.randn(256, tokens, generator=generator)
    (a, a_scales), (b, b_scales) = quantize_tiles(dy), quantize_tiles(x)
    numbers = 128 * torch.tensor(counts)
    dw = grouped_wgrad_fp8(a, a_scales, b, b_scales, numbers)
    parts = [t.split(numbers.tolist(), 1) for t in (dequantize(a, a_scales), dequantize(b, b_scales))]
    expected = torch.stack([y @ z.t() for y, z in zip(*parts, strict=True)])
    torch.testing.assert_close(dw, expected, rtol=1e-4, atol=1e-3)
    assert not dw[[g for g, c in enumerate(counts) if c == 0]].any()
    total = torch.ones_like(dw)
    assert grouped_wgrad_fp8(a, a_scales, b, b_scales, numbers, total) is total
    torch.testing.assert_close(total, 1 + dw)


@pytest.mark.parametrize(
    ("operand", "change", "words"),
    [
        ("a", lambda a: a.float(), "a is float32"),
        ("a", lambda a: a[:, :128], "a has shape [3, 128], expected [any, 256]"),
        ("b", lambda b: b[:0], "b has no groups"),
        ("b", lambda b: b[:, :100], "N is 100, expected a multiple of 128"),
        ("b", lambda b: b.mT.contiguous().mT, "side by side"),
        ("a_scales", lambda s: s[:, :1], "a_scales (1 x 128 tiles) has shape [3, 1], expected [3, 2]"),
        ("b_scales", lambda s: s[0], "b_scales (128 x 128 blocks)"),
        ("counts", lambda c: c.float(), "counts is float32"),
        ("counts", lambda c: c[:1], "counts has shape [1], expected [2]"),
        ("counts", lambda c: c + 1, "counts sum to 5, there are 3 rows"),
    ],
)
def test_refused(operand, change, words):
    names = ("a", "a_scales", "b", "b_scales", "counts")
    case = dict(zip(names, (*operands([2, 1], 1, 2, seed=0), torch.tensor([2, 1])), strict=True))
    case[operand] = change(case[operand])
    with unchecked(), pytest.raises(KernelError) as raised:
        grouped_gemm_fp8(**case)
    assert words in str(raised.value)


def test_tokens_whose_tiles_would_belong_to_two_groups_are_refused():
    a, a_scales = quantize_tiles(torch.ones(128, 256))
    with pytest.raises(KernelError, match="multiples of 128 that sum to 256"):
        grouped_wgrad_fp8(a, a_scales, a, a_scales, torch.tensor([100, 156]))
