"""RMSNorm against its formula."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, assert_rejects

from dsv3lib.layers.norm import RMSNorm


def formula(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def layer_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return formula(x - x.mean(-1, keepdim=True), weight, eps)


def eps_outside_the_root(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + eps) * weight


def no_weight(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return formula(x, torch.ones_like(weight), eps)


def check(wanted, dim: int, eps: float, size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    norm = RMSNorm(dim, eps).double()
    norm.weight.data.normal_(generator=generator)
    x = torch.randn(2, 3, dim, dtype=torch.float64, generator=generator) * size
    torch.testing.assert_close(norm(x), wanted(x, norm.weight, eps), rtol=1e-12, atol=1e-12)


CASES = {
    "dim": st.integers(1, 40),
    "eps": st.sampled_from([1e-6, 1e-2]),
    "size": st.sampled_from([1e-3, 1.0, 1e3]),
    "seed": SEEDS,
}


@given(**CASES)
def test_it_is_the_formula(dim: int, eps: float, size: float, seed: int) -> None:
    check(formula, dim, eps, size, seed)


@pytest.mark.parametrize("wrong", [layer_norm, eps_outside_the_root, no_weight])
def test_the_check_rejects_other_norms(wrong) -> None:
    assert_rejects(lambda **case: check(wrong, **case), **CASES)


def test_zero_stays_zero_and_has_a_gradient() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    y = RMSNorm(4, 1e-6)(x)
    y.sum().backward()
    assert not y.any() and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_dtypes_are_normalised_in_fp32(dtype: torch.dtype) -> None:
    """The mean square of these values overflows FP16 and is coarse in BF16."""
    x = (torch.randn(64, 512) * 300).to(dtype)
    norm = RMSNorm(512, 1e-6).to(dtype)
    y = norm(x)
    assert y.dtype == dtype
    exact = formula(x.double(), norm.weight.double(), 1e-6)
    assert (y.double() - exact).abs().max() <= exact.abs().max() * torch.finfo(dtype).eps


def test_gradients_are_those_of_the_formula() -> None:
    norm = RMSNorm(6, 1e-3).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, w: torch.func.functional_call(norm, {"weight": w}, (v,)),
                                    (x, norm.weight))  # fmt: skip
