"""The grouped product against one product per row, forward and backward."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, assert_rejects, unchecked

from dsv3lib.errors import KernelError
from dsv3lib.kernels.matmul.grouped_gemm import (
    grouped_gemm,
    grouped_gemm_masked,
    grouped_gemm_masked_ref,
    grouped_gemm_ref,
)

CASES = {
    "counts": st.lists(st.integers(0, 5), min_size=1, max_size=6),
    "width": st.integers(1, 9),
    "out": st.integers(1, 9),
    "seed": SEEDS,
}


def operands(counts: list[int], width: int, out: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(counts), width, dtype=torch.float64, generator=generator)
    weight = torch.randn(len(counts), out, width, dtype=torch.float64, generator=generator)
    return x.requires_grad_(), weight.requires_grad_()


def row_by_row(x: torch.Tensor, weight: torch.Tensor, counts: list[int]) -> torch.Tensor:
    group = [g for g, n in enumerate(counts) for _ in range(n)]
    rows = [weight[g] @ x[i] for i, g in enumerate(group)]
    return torch.stack(rows) if rows else x.new_zeros(0, weight.shape[1])


def check(product, counts: list[int], width: int, out: int, seed: int) -> None:
    x, weight = operands(counts, width, out, seed)
    y = product(x, weight, torch.tensor(counts))
    expected = row_by_row(x, weight, counts)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    if sum(counts) == 0:
        return
    towards = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(seed))
    got = torch.autograd.grad(y, (x, weight), towards)
    for a, b in zip(got, torch.autograd.grad(expected, (x, weight), towards), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("product", [grouped_gemm, grouped_gemm_ref])
@given(**CASES)
def test_each_row_meets_its_group_s_matrix(
    product, counts: list[int], width: int, out: int, seed: int
) -> None:
    check(product, counts, width, out, seed)


def test_the_check_rejects_shuffled_groups() -> None:
    assert_rejects(lambda **case: check(lambda x, w, n: grouped_gemm_ref(x, w.flip(0), n), **case), **CASES)


@pytest.mark.parametrize("counts", [[3, 0, 2], [0, 0, 1], [4]])
def test_gradients_by_finite_differences(counts: list[int]) -> None:
    x, weight = operands(counts, 3, 2, seed=1)
    assert torch.autograd.gradcheck(lambda a, b: grouped_gemm(a, b, torch.tensor(counts)), (x, weight))


def test_an_expanded_gradient_is_taken() -> None:
    """``.sum()`` hands back a gradient with stride 0, on which torch's own grouped product fails."""
    x, weight = operands([2, 1], 3, 2, seed=0)
    grouped_gemm(x, weight, torch.tensor([2, 1])).sum().backward()
    torch.testing.assert_close(x.grad[2], weight[1].sum(0).detach())


def test_empty_groups_get_a_gradient_of_zero() -> None:
    x, weight = operands([2, 0, 1], 3, 2, seed=0)
    grouped_gemm(x, weight, torch.tensor([2, 0, 1])).sum().backward()
    assert not weight.grad[1].any() and weight.grad[0].any() and weight.grad[2].any()


def test_only_what_is_asked_for_is_computed() -> None:
    x, weight = operands([2, 1], 3, 2, seed=0)
    grouped_gemm(x.detach(), weight, torch.tensor([2, 1])).sum().backward()
    assert x.grad is None and weight.grad is not None


@pytest.mark.parametrize(("counts", "width"), [([2, 1], 4), ([2, 1, 0], 3), ([2, 2], 3), ([1, 1], 3)])
def test_operands_that_do_not_fit_are_refused(counts: list[int], width: int) -> None:
    with unchecked(), pytest.raises(KernelError, match="grouped_gemm"):
        grouped_gemm(torch.zeros(3, 3), torch.zeros(2, 5, width), torch.tensor(counts))


@pytest.mark.parametrize("product", [grouped_gemm_masked, grouped_gemm_masked_ref])
@given(**CASES)
def test_masked_rows_beyond_the_count_have_no_part(
    product, counts: list[int], width: int, out: int, seed: int
) -> None:
    x, weight = operands(counts, width, out, seed)
    room = max(counts) + 1
    padded = torch.full((len(counts), room, width), float("nan"), dtype=x.dtype)
    for group, rows in zip(padded, x.detach().split(counts), strict=True):
        group[: len(rows)] = rows
    padded.requires_grad_()
    y = product(padded, weight, torch.tensor(counts))
    valid = torch.arange(room) < torch.tensor(counts)[:, None]
    torch.testing.assert_close(y[valid], row_by_row(x, weight, counts), rtol=0, atol=1e-12)
    if sum(counts) == 0:
        return
    y[valid].square().sum().backward()
    grad_x, grad_w = torch.autograd.grad(row_by_row(x, weight, counts).square().sum(), (x, weight))
    torch.testing.assert_close(padded.grad[valid], grad_x, rtol=0, atol=1e-10)
    torch.testing.assert_close(weight.grad, grad_w, rtol=0, atol=1e-10)
    assert not padded.grad[~valid].any()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.zeros(3, 3, dtype=torch.int64)}, "x is int64"),
        ({"weight": torch.zeros(2, 5, 3).double()}, "weight is float64, expected float32"),
        ({"weight": torch.zeros(5, 3)}, "weight has shape [5, 3]"),
        ({"weight": torch.zeros(0, 5, 3)}, "weight has no groups"),
        ({"counts": torch.tensor([2.0, 1.0])}, "counts is float32"),
    ],
)
def test_dtypes_and_shapes_that_do_not_fit_are_refused(changes: dict, words: str) -> None:
    fine = {"x": torch.zeros(3, 3), "weight": torch.zeros(2, 5, 3), "counts": torch.tensor([2, 1])}
    with unchecked(), pytest.raises(KernelError) as raised:
        grouped_gemm(**fine | changes)
    assert words in str(raised.value)


def test_masked_groups_must_agree() -> None:
    with unchecked(), pytest.raises(KernelError, match="x has 3 groups of rows, weight has 2 groups"):
        grouped_gemm_masked(torch.zeros(3, 4, 3), torch.zeros(2, 5, 3), torch.tensor([2, 1]))
