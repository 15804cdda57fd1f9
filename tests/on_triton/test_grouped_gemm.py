"""The experts' products: kernels against the plain form, forward and backward, in both layouts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from poison import fill, poisoned, spread
from strategies import SEEDS, assert_rejects

from dsv3lib.kernels.matmul.group_plan import make_plan
from dsv3lib.kernels.matmul.grouped_gemm import (
    grouped_gemm,
    grouped_gemm_masked,
    grouped_gemm_masked_ref,
    grouped_gemm_ref,
)
from dsv3lib.kernels.toolchain import tuning

COUNTS = st.lists(st.sampled_from([0, 0, 1, 3, 17, 63, 64, 65, 130]), min_size=1, max_size=5)
WIDTHS = st.sampled_from([1, 3, 8, 24, 65, 136])  # under and over a tile, on 16-byte borders and off them
CASES = {"counts": COUNTS, "n": WIDTHS, "k": WIDTHS, "seed": SEEDS}
DTYPES = {torch.float32: 1e-12, torch.float16: 1e-5, torch.bfloat16: 1e-5}
FEW = settings(max_examples=8)


def draw(device, dtype, counts: list[int], n: int, k: int, seed: int) -> list[torch.Tensor]:
    """Rows, matrices and the gradient of the result, rows and gradient cut out of memory that holds NaN."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (sum(counts), k), (len(counts), n, k), (sum(counts), n)
    x, weight, grad = (torch.randn(s, generator=generator).to(device, dtype) for s in shapes)
    return [spread(x), weight, spread(grad)]


def difference(x: torch.Tensor, y: torch.Tensor) -> float:
    x, y = x.double(), y.double()
    if not y.any():
        return 0.0 if torch.equal(x, y) else float("inf")
    return float(1 - 2 * (x * y).sum() / (x * x + y * y).sum())


def check(product, device, dtype, counts, n, k, seed) -> None:
    x, weight, grad = draw(device, dtype, counts, n, k, seed)
    numbers = torch.tensor(counts, device=device)
    leaves = x.detach().requires_grad_(), weight.detach().requires_grad_()
    with poisoned():
        y = product(*leaves, numbers)
        found = y, *torch.autograd.grad(y, leaves, grad)
    exact = x.double().requires_grad_(), weight.double().requires_grad_()
    expected = grouped_gemm_ref(*exact, numbers)
    expected = expected, *torch.autograd.grad(expected, exact, grad.double())
    for got, right in zip(found, expected, strict=True):
        assert got.dtype == dtype and difference(got.detach(), right.detach()) < DTYPES[dtype]
    assert all(not found[2][g].any() for g, count in enumerate(counts) if count == 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@FEW
@given(**CASES)
def test_three_products(device, dtype, counts, n, k, seed):
    check(grouped_gemm, device, dtype, counts, n, k, seed)


def next_group_s_rows(x, weight, counts):
    return grouped_gemm_ref(x, weight.roll(1, 0), counts)


def test_the_check_rejects(device):
    assert_rejects(lambda **case: check(next_group_s_rows, device, torch.float32, **case), **CASES)


SHIPPED = [
    pytest.param(name, row, id=f"{name}-{i}")
    for name in tuning.GENERATIONS
    for i, row in enumerate(tuning.read(tuning.FOLDER / f"{name}.json")["grouped_gemm"])
]


@pytest.mark.parametrize(("generation", "row"), SHIPPED)
def test_every_shipped_row(device, matrix_dtype, generation, row):
    if device.type == "cuda" and generation not in tuning.sources(device):
        pytest.skip(f"settings of another generation, {generation}, may not fit this device")
    counts = [5, 0, 150, 1]
    x, weight, _ = draw(device, matrix_dtype, counts, 136, 72, seed=3)
    numbers = torch.tensor(counts, device=device)
    row = {name: value for name, value in row.items() if name != "when"}
    with poisoned():
        y = grouped_gemm(x, weight, numbers, settings=row)
        again = grouped_gemm(x, weight, numbers, settings=row)
    assert difference(y, grouped_gemm_ref(x.double(), weight.double(), numbers)) < 1e-5
    assert torch.equal(y, again)


@FEW
@given(**CASES)
def test_masked_layout(device, matrix_dtype, counts, n, k, seed):
    _, weight, _ = draw(device, matrix_dtype, counts, n, k, seed)
    room = max(max(counts) - 1, 1)  # the largest group has a row more than there is room for
    numbers = torch.tensor(counts, device=device, dtype=torch.int32)
    x = torch.randn(len(counts), room, k, generator=torch.Generator().manual_seed(seed)).to(weight)
    valid = torch.arange(room, device=device) < numbers[:, None]
    x[~valid] = float("nan")
    leaves = x.requires_grad_(), weight.requires_grad_()
    with poisoned():
        y = grouped_gemm_masked(*leaves, numbers)
        grad = torch.randn_like(y).masked_fill(~valid[..., None], float("nan"))
        found = y[valid], *torch.autograd.grad(y, leaves, grad)
    exact = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = grouped_gemm_masked_ref(*exact, numbers)
    right = expected[valid], *torch.autograd.grad(expected, exact, grad.nan_to_num().double())
    for got, value in zip(found, right, strict=True):
        assert difference(got.detach(), value.detach()) < 1e-5
    if not valid.all():
        assert y[~valid].isnan().all()  # not written: the poison is still there


@pytest.mark.parametrize("width", [16, 9])
def test_rows_of_no_group_come_back_as_nan(device, matrix_dtype, width):
    x, weight, _ = draw(device, matrix_dtype, [40, 0, 60], width, width, seed=0)
    y = grouped_gemm(x, weight, torch.tensor([20, 0, 50], device=device))
    assert y[:70].isfinite().all() and y[70:].isnan().all()
    too_many = grouped_gemm(x, weight, torch.tensor([20, 0, 1000], device=device))
    assert difference(too_many[:70], y[:70]) < 1e-6 and too_many.isfinite().all()


def test_another_group_s_nan_stays_there(device, matrix_dtype):
    """Tiles reach into the next group's rows, and the last slice of K past the matrix: neither is multiplied."""
    x, weight, grad = draw(device, matrix_dtype, [5, 20, 3], 24, 40, seed=0)
    numbers = torch.tensor([5, 20, 3], device=device)
    expected = grouped_gemm_ref(x.double(), weight.double(), numbers)
    fill(x[5:25]), fill(weight[1]), fill(grad[5:25])
    leaves = x.requires_grad_(), weight.requires_grad_()
    y = grouped_gemm(*leaves, numbers)
    dx, dw = torch.autograd.grad(y, leaves, grad)
    kept = torch.tensor([*range(5), *range(25, 28)], device=device)
    assert difference(y[kept].detach(), expected[kept]) < 1e-5
    assert dx[kept].isfinite().all() and dw[[0, 2]].isfinite().all() and dw[1].isnan().all()


@pytest.mark.parametrize("transposed", ["x", "weight", "grad"])
def test_any_strides(device, matrix_dtype, transposed):
    counts = [7, 0, 9]
    x, weight, grad = draw(device, matrix_dtype, counts, 24, 40, seed=1)
    numbers = torch.tensor(counts, device=device)
    if transposed == "x":
        x = x.t().contiguous().t()
    if transposed == "weight":
        weight = weight.mT.contiguous().mT
    if transposed == "grad":
        grad = grad[:, :1].expand_as(grad)
    leaves = x.requires_grad_(), weight.requires_grad_()
    y = grouped_gemm(*leaves, numbers)
    found = y, *torch.autograd.grad(y, leaves, grad)
    exact = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = grouped_gemm_ref(*exact, numbers)
    expected = expected, *torch.autograd.grad(expected, exact, grad.double())
    for got, right in zip(found, expected, strict=True):
        assert difference(got.detach(), right.detach()) < 1e-5


def test_fp64_takes_the_plain_form(device):
    x, weight, _ = draw(device, torch.float64, [2, 3], 4, 5, seed=0)
    numbers = torch.tensor([2, 3], device=device)
    assert torch.autograd.gradcheck(
        lambda a, b: grouped_gemm(a, b, numbers), (x.clone().requires_grad_(), weight.requires_grad_())
    )


@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=9), block=st.sampled_from([8, 16]))
@FEW
def test_plan_covers_every_row_once(device, counts, block):
    extra = 5
    rows = sum(counts) + extra
    plan = make_plan(torch.tensor(counts, device=device), rows, None, block).tolist()
    seen = [-1] * rows
    for group, row, end in plan:
        for r in range(row, min(row + block, end)) if group >= 0 else ():
            assert seen[r] == -1
            seen[r] = group
    groups = [g for g, n in enumerate(counts) for _ in range(n)] + [len(counts)] * extra
    assert seen == groups
