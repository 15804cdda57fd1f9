"""Operands of FP8 products: scaled along the sum, widths cut short, and what turning a cached tile costs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, assert_rejects

from dsv3lib.fp8 import operands as o
from dsv3lib.fp8.formats import E4M3

SIZES = {"m": st.integers(1, 200), "k": st.integers(1, 300), "seed": SEEDS}


def rough(m: int, k: int, seed: int) -> torch.Tensor:
    """Numbers of very different sizes by row and by column."""
    draw = torch.Generator().manual_seed(seed)
    size = torch.randint(-6, 6, (m, 1), generator=draw) + torch.randint(-6, 6, (1, k), generator=draw)
    return torch.randn(m, k, generator=draw) * size.float().exp2()


def back(x: o.Operand, m: int, k: int) -> torch.Tensor:
    return x.values.float()[:m, :k] * x.scales.repeat_interleave(128, 1)[:m, :k]


def check_rows(make, m: int, k: int, seed: int) -> None:
    x = rough(m, k, seed)
    got = make(x)
    assert got.values.shape == x.shape and got.scales.shape == (m, -(-k // 128))
    for t in range(got.scales.shape[1]):
        tile, scale = x[:, t * 128 : (t + 1) * 128], got.scales[:, t, None]
        torch.testing.assert_close(scale, tile.abs().amax(1, keepdim=True) / 448)
        error = (back(got, m, k)[:, t * 128 : (t + 1) * 128] - tile).abs()
        assert (
            error <= torch.maximum(tile.abs() * E4M3.half_step, scale * E4M3.smallest / 2) * 1.00001
        ).all()


@given(**SIZES)
def test_tiles_along_rows(m: int, k: int, seed: int) -> None:
    check_rows(o.along_rows, m, k, seed)


def test_the_check_rejects_one_scale_for_all() -> None:
    assert_rejects(lambda **case: check_rows(lambda x: o.along_rows(x, "tensor"), **case), **SIZES)


@given(scaling=st.sampled_from(["tile", "block", "tensor"]), **SIZES)
def test_columns_are_the_rows_of_the_transpose(scaling: str, m: int, k: int, seed: int) -> None:
    x = rough(m, k, seed)
    columns = o.along_columns(x, scaling)
    assert columns.values.shape == (k, m + -m % 128) and columns.scales.shape == (k, -(-m // 128))
    rows = o.along_rows(x.t().contiguous(), scaling)
    assert torch.equal(back(columns, k, m), back(rows, k, m))
    assert not columns.values.float()[:, m:].any()


@given(power_of_two=st.booleans(), **SIZES)
def test_turning_a_cached_tile_loses_nothing_but_underflow(
    power_of_two: bool, m: int, k: int, seed: int
) -> None:
    """With power-of-two scales a value changes only where it falls under the normal range of its new tile."""
    x = rough(m, k, seed)
    cached = back(o.along_rows(x, power_of_two=power_of_two), m, k)
    turned = o.along_columns(cached, power_of_two=power_of_two)
    again, scale = back(turned, k, m), turned.scales.repeat_interleave(128, 1)[:k, :m]
    changed = again != cached.t()
    under = cached.t().abs() < scale * E4M3.smallest_normal
    if power_of_two:
        assert not (changed & ~under).any()
        assert ((again - cached.t()).abs() <= scale * E4M3.smallest / 2).all()
    elif min(m, k) > 30:
        assert (changed & ~under).any()  # a second rounding


def test_how_much_underflows() -> None:
    """Of a normal activation nothing; of one whose tokens differ by a factor of 4096 a quarter, all of it tiny."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(256, 256, generator=draw)
    for spread, most in ((0, 0.02), (12, 0.6)):
        sized = x * torch.linspace(0, spread, 256).exp2()[:, None]
        cached = back(o.along_rows(sized, power_of_two=True), 256, 256)
        again = back(o.along_columns(cached, power_of_two=True), 256, 256).t()
        lost = (again != cached).float().mean()
        assert lost <= most and (again - cached).norm() < 1e-3 * cached.norm()


@given(e=st.integers(1, 4), m=st.integers(1, 150), k=st.integers(1, 150), seed=SEEDS)
def test_a_stack_is_its_matrices(e: int, m: int, k: int, seed: int) -> None:
    stack = torch.stack([rough(m, k, seed + i) for i in range(e)])
    for scaling in ("block", "tensor"):
        whole = o.weight_blocks(stack, scaling)
        for i in range(e):
            one = o.weight_blocks(stack[i], scaling)
            assert torch.equal(whole.values[i].float(), one.values.float())
            assert torch.equal(whole.scales[i], one.scales)
    turned = o.transposed(o.weight_blocks(stack[0]))
    again = o.weight_blocks(stack[0].t().contiguous())
    assert torch.equal(turned.values.float(), again.values.float()) and torch.equal(
        turned.scales, again.scales
    )


@given(counts=st.lists(st.integers(0, 300), min_size=1, max_size=6))
def test_no_tile_belongs_to_two_experts(counts: list[int]) -> None:
    n = sum(counts)
    groups = o.Groups.of(torch.tensor(counts), n)
    x = torch.arange(1.0, n + 1)[:, None].expand(n, 3)
    spread = groups.spread(x)
    assert groups.counts.tolist() == [-(-c // 128) * 128 for c in counts] and len(spread) == sum(
        groups.counts
    )
    for part, own in zip(spread.split(groups.counts.tolist()), x.split(counts), strict=True):
        assert torch.equal(part[: len(own)], own) and not part[len(own) :].any()


@pytest.mark.parametrize("scaling", ["tile", "block", "tensor"])
def test_zeros_tiny_and_what_is_not_finite(scaling: str) -> None:
    x = rough(4, 256, 0)
    assert not o.along_rows(torch.zeros(2, 130), scaling).values.float().any()
    tiny = o.along_rows(
        torch.full((2, 130), 1e-40), scaling
    )  # subnormal in FP32: below what a scale can lift
    assert tiny.values.float().isfinite().all() and (tiny.scales >= 2.0**-126).all()
    for wrong in (float("nan"), float("inf")):
        x[1, 3] = wrong
        got = o.along_rows(x, scaling)
        assert got.scales[1, 0].isnan() and got.values[1, 3].isnan()  # what is wrong stays visible
        assert got.scales[1, 1].isnan() == (scaling == "tensor")


def test_rows_for_the_copy_engine() -> None:
    values = o.along_rows(rough(3, 40, 0)).values
    got = o.aligned(values)
    assert got.stride(0) % 16 == 0 and torch.equal(got.float(), values.float())
    assert o.aligned(got[:, :32].contiguous()).stride(0) == 32
