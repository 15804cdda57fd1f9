"""The grouped product against one product per row, forward and backward."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, assert_rejects, unchecked

from dsv3lib.errors import KernelError
from dsv3lib.kernels import grouped_gemm, grouped_gemm_ref

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
