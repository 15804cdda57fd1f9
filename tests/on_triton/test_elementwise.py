"""Kernels of norms, turns and activations against their plain forms, forward and backward."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from poison import fill, poisoned, spread
from strategies import SEEDS

from dsv3lib.errors import GradientError, KernelError
from dsv3lib.kernels import elementwise as e
from dsv3lib.kernels.elementwise import gated, norms, rotary

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
EPS = 1e-5


def random(*shape: int, dtype: torch.dtype, seed: int, device: torch.device) -> torch.Tensor:
    """Fresh numbers, different for each shape and seed."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


def uncancelled(x: torch.Tensor, weight: torch.Tensor) -> float:
    """How large the two terms are whose difference is a norm's gradient: in a row of one value nothing is left."""
    rms = x.double().square().mean(-1).add(EPS).sqrt()
    return float(4 * weight.double().abs().max() / rms.min())  # random gradients hardly pass 4


def turns(*shape: int, seed: int, device: torch.device) -> torch.Tensor:
    """Random turns, complex64."""
    angles = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 6.3
    return torch.polar(torch.ones_like(angles), angles).to(device)


def results(op: Callable, inputs: Sequence[torch.Tensor], seed: int = 0) -> list[torch.Tensor]:
    """What an operation gives, and the gradient of each input for random gradients of its results."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = op(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    grads = [random(*y.shape, dtype=y.dtype, seed=seed, device=y.device) for y in out]
    torch.autograd.backward(out, grads)
    return [y.detach() for y in out] + [x.grad for x in inputs]


def in_fp64(op: Callable, inputs: Sequence[torch.Tensor], seed: int = 0) -> list[torch.Tensor]:
    """The same of the plain form, on the same numbers and gradients in FP64."""
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    out = op(*doubles)
    out = out if isinstance(out, tuple) else (out,)
    dtype = inputs[0].dtype
    grads = [random(*y.shape, dtype=dtype, seed=seed, device=y.device).double() for y in out]
    torch.autograd.backward(out, grads)
    return [y.detach() for y in out] + [x.grad for x in doubles]


def assert_near(
    got: Sequence[torch.Tensor], exact: Sequence[torch.Tensor], sums: int = 1, least: float = 0.0
) -> None:
    """Within a rounding to the result's dtype, and FP32's roundings in a sum of so many.

    Values near zero that are differences of larger ones are measured by the largest of their tensor, or by
    ``least`` where that is larger.
    """
    assert len(got) == len(exact)
    for i, (a, b) in enumerate(zip(got, exact, strict=True)):
        assert a.shape == b.shape, f"result {i} has shape {a.shape}, not {b.shape}"
        largest = max(least, float(b.abs().max()) if b.numel() else 0.0)
        kind = torch.finfo(a.dtype)
        allowed = 0.75 * kind.eps * b.abs() + (8 + sums) * 2.0**-23 * largest + kind.tiny * kind.eps
        error = (a.double() - b).abs()
        assert (error <= allowed).all(), f"result {i}: off by {float(error.max()):.2e} of {largest:.2e}"


@given(rows=st.integers(1, 9), n=st.sampled_from([1, 3, 24, 64, 512, 1030, 1537]), apart=st.booleans(),
       residual=st.booleans(), dtype=DTYPES, seed=SEEDS)  # fmt: skip
def test_norms(device, rows, n, apart, residual, dtype, seed) -> None:
    make = {"dtype": dtype, "seed": seed, "device": device}
    x, weight = random(rows, n, **make), random(n, **make)
    if apart:
        x = spread(x)
    if not residual:
        with poisoned():
            got = results(lambda x, w: e.rms_norm(x, w, EPS), (x, weight))
        assert_near(
            got, in_fp64(lambda x, w: e.rms_norm_ref(x, w, EPS), (x, weight)), rows, uncancelled(x, weight)
        )
        return
    other = random(rows + 1, n, **make)[1:]
    with poisoned():
        got = results(lambda x, r, w: e.add_rms_norm(x, r, w, EPS), (x, other, weight))
    assert torch.equal(got[1], x + other)

    def rounded(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = x + r + (got[1].double() - x - r).detach()  # the sum as it is rounded, the gradient as if not
        return e.rms_norm_ref(total, w, EPS), total

    assert_near(got, in_fp64(rounded, (x, other, weight)), rows, uncancelled(got[1], weight))


def test_norms_of_no_rows_and_of_many_dimensions(device) -> None:
    weight = torch.rand(40, device=device)
    empty = torch.zeros(0, 40, device=device, requires_grad=True)
    y = e.rms_norm(empty, weight, EPS)
    y.sum().backward()
    assert y.shape == (0, 40) and empty.grad.shape == (0, 40)
    x = torch.randn(2, 3, 40, device=device).transpose(0, 1)
    torch.testing.assert_close(e.rms_norm(x, weight, EPS), e.rms_norm_ref(x, weight, EPS))
    turned = torch.randn(40, 7, device=device).t()
    torch.testing.assert_close(e.rms_norm(turned, weight, EPS), e.rms_norm_ref(turned, weight, EPS))


def test_the_weights_gradient_is_the_same_every_time_and_sums_over_all_programs(device) -> None:
    x, weight = torch.randn(70, 24, device=device), torch.rand(24, device=device)
    first, again = (results(lambda x, w: e.rms_norm(x, w, EPS), (x, weight)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert_near(first, in_fp64(lambda x, w: e.rms_norm_ref(x, w, EPS), (x, weight)), 70)


@given(batch=st.integers(1, 2), length=st.integers(1, 5), heads=st.sampled_from([1, 3, 4]),
       nope=st.sampled_from([0, 1, 6, 16]), pairs=st.sampled_from([1, 2, 5, 8]), per_batch=st.booleans(),
       layout=st.sampled_from(["plain", "heads first", "apart"]), dtype=DTYPES, seed=SEEDS)  # fmt: skip
def test_rope(device, batch, length, heads, nope, pairs, per_batch, layout, dtype, seed) -> None:
    make = {"dtype": dtype, "seed": seed, "device": device}
    q = random(batch, length, heads, nope + 2 * pairs, **make)
    k = random(batch, length, 2 * pairs, **make)
    table = turns(*([batch] if per_batch else []), length, pairs, seed=seed, device=device)
    if layout == "heads first":
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "apart":
        k = spread(k.flatten(0, 1)).unflatten(0, (batch, length))
    with poisoned():
        got = results(lambda q, k: e.rope(q, k, table, settings={"ROWS": 4, "num_warps": 1}), (q, k))
    assert_near(got, in_fp64(lambda q, k: e.rope_ref(q, k, table.to(torch.complex128)), (q, k)))
    assert torch.equal(got[0][..., :nope], q[..., :nope])
    if layout != "heads first":
        own_q, own_k = q.clone(), k
        same = e.rope(own_q, own_k, table, inplace=True)
        assert same[0] is own_q and same[1] is own_k
        assert torch.equal(own_q, got[0]) and torch.equal(own_k, got[1])


@given(length=st.integers(1, 9), heads=st.integers(1, 3), nope=st.integers(0, 9), pairs=st.integers(1, 5), seed=SEEDS)
def test_rope_of_queries_alone(device, length, heads, nope, pairs, seed) -> None:
    """Where the key was turned elsewhere there is none: no memory stands in for it, filled with NaN or not."""
    q = random(2, length, heads, nope + 2 * pairs, dtype=torch.float32, seed=seed, device=device)
    k = random(2, length, 2 * pairs, dtype=torch.float32, seed=seed, device=device)
    table = turns(length, pairs, seed=seed, device=device)
    with poisoned():
        out, grad = results(lambda q: e.rope(q, None, table)[0], (q,))
        both = results(lambda q, k: e.rope(q, k, table), (q, k))
    assert torch.equal(out, both[0]) and torch.equal(grad, both[2])
    assert e.rope(q, None, table)[1] is None and e.rope_ref(q, None, table)[1] is None
    own = q.clone()
    e.rope(own, None, table, inplace=True)
    assert torch.equal(own, out)


def test_rope_in_place_touches_nothing_else(device) -> None:
    wide = fill(torch.empty(4, 3, 20, device=device))
    q = wide[:, :2, 4:14]
    q.copy_(torch.randn(4, 2, 10, device=device))
    k = torch.randn(4, 6, device=device)
    table = turns(4, 3, seed=0, device=device)
    expected = e.rope_ref(q.clone(), k.clone(), table)
    e.rope(q, k, table, inplace=True)
    torch.testing.assert_close((q, k), expected)
    assert wide[:, 2].isnan().all() and wide[..., :4].isnan().all() and wide[..., 14:].isnan().all()


@given(rows=st.integers(1, 9), width=st.sampled_from([1, 7, 64, 1024, 1025]), apart=st.booleans(), dtype=DTYPES,
       seed=SEEDS)  # fmt: skip
def test_swiglu(device, rows, width, apart, dtype, seed) -> None:
    both = random(rows, 2 * width, dtype=dtype, seed=seed, device=device) * 3
    with poisoned():
        got = results(e.swiglu, (spread(both) if apart else both,))
    assert_near(got, in_fp64(e.swiglu_ref, (both,)))


def test_swiglu_of_no_rows_and_of_large_gates(device) -> None:
    empty = torch.zeros(0, 8, device=device, requires_grad=True)
    e.swiglu(empty).sum().backward()
    assert empty.grad.shape == (0, 8)
    both = torch.tensor([[-1e4, -90.0, 0.0, 90.0, 1e4, 2, 3, 4, 5, 6]], device=device)
    with np.errstate(over="ignore"):  # the interpreter's exp warns where it rightly gives infinity
        got, grad = results(e.swiglu, (both,))
    assert got.isfinite().all() and grad.isfinite().all()
    assert_near([got, grad], in_fp64(e.swiglu_ref, (both,)))


@given(batch=st.integers(1, 3), length=st.integers(1, 5), c=st.sampled_from([1, 12, 64, 100]),
       pairs=st.sampled_from([1, 2, 5]), per_batch=st.booleans(), dtype=DTYPES, seed=SEEDS)  # fmt: skip
def test_the_latent(device, batch, length, c, pairs, per_batch, dtype, seed) -> None:
    make = {"dtype": dtype, "seed": seed, "device": device}
    x, weight = random(batch, length, c + 2 * pairs, **make), random(c, **make)
    table = turns(*([batch] if per_batch else []), length, pairs, seed=seed, device=device)
    with poisoned():
        got = results(lambda x, w: e.norm_and_turn(x, w, table, EPS), (x, weight))
    exact = in_fp64(lambda x, w: e.norm_and_turn_ref(x, w, table.to(torch.complex128), EPS), (x, weight))
    assert_near(got, exact, batch * length, uncancelled(x[..., :c], weight))


def test_nan_stays_in_its_row(device) -> None:
    x, weight = torch.randn(6, 24, device=device), torch.rand(24, device=device)
    x[3, 5] = float("nan")
    for y in (e.rms_norm(x, weight, EPS), e.add_rms_norm(x, x, weight, EPS)[0]):
        assert y[3].isnan().all() and not y[[0, 1, 2, 4, 5]].isnan().any()
    assert e.swiglu(x).isnan().sum() == 1


# ---- wrong forms are seen ----------------------------------------------------------------------------------


def _forgets_the_mean(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x * (torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)).detach() * w


def _sums_instead(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS) * w


def _no_epsilon(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True)) * w


@pytest.mark.parametrize("wrong", [_forgets_the_mean, _sums_instead, _no_epsilon])
def test_a_wrong_norm_is_seen(device, wrong) -> None:
    x, weight = torch.randn(4, 24, device=device), torch.rand(24, device=device)
    with pytest.raises(AssertionError, match="off by"):
        assert_near(results(lambda x, w: e.rms_norm(x, w, EPS), (x, weight)), in_fp64(wrong, (x, weight)), 4)


def test_a_wrong_turn_is_seen(device) -> None:
    q, k = torch.randn(3, 2, 8, device=device), torch.randn(3, 4, device=device)
    table = turns(3, 2, seed=1, device=device)
    got = results(lambda q, k: e.rope(q, k, table), (q, k))

    def halves(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        order = torch.tensor([0, 2, 1, 3], device=device)
        return e.rope_ref(torch.cat([q[..., :4], q[..., 4:][..., order]], -1), k[..., order], table)

    for wrong in (halves, lambda q, k: e.rope_ref(q, k, table.conj().resolve_conj())):
        with pytest.raises(AssertionError, match="off by"):
            assert_near(got, in_fp64(wrong, (q, k)))


# ---- what is refused before a launch -----------------------------------------------------------------------


def test_what_does_not_fit_is_refused(device, monkeypatch) -> None:
    for module, kernel in ((norms, "rms_norm_kernel"), (rotary, "rope_kernel"), (gated, "swiglu_kernel")):
        monkeypatch.setattr(module, kernel, None)  # a launch would fail otherwise
    x = torch.zeros(4, 8, device=device)
    q, table = torch.zeros(4, 2, 8, device=device), turns(4, 2, seed=0, device=device)
    far = torch.zeros(1, 1, 1, 2, device=device).expand(2**16, 2**9, 2**6, 2)
    for match, call in (
        ("residual is float16", lambda: e.add_rms_norm(x, x.half(), x[0], EPS)),
        ("a multiple of 2", lambda: e.swiglu(x[:, :7])),
        ("turns are for tokens", lambda: e.rope(q, x[:, :4], table[:3])),
        ("expected at most", lambda: e.rope(far, far[..., 0, :], turns(2**9, 1, seed=0, device=device))),
        ("no matrix of tokens", lambda: e.rope(
            q.view(2, 2, 2, 8).transpose(0, 1), x[:, :4].view(2, 2, 4), table[:2], inplace=True)),
        ("last dimension side by side", lambda: e.rope(q.mT.contiguous().mT, x[:, :4], table, inplace=True)),
    ):  # fmt: skip
        with pytest.raises(KernelError, match=match):
            call()


def test_no_second_derivative_is_pretended(device) -> None:
    x, weight = torch.randn(2, 8, device=device, requires_grad=True), torch.rand(8, device=device)
    with pytest.raises(GradientError, match="create_graph"):
        torch.autograd.grad(e.rms_norm(x, weight, EPS).sum(), x, create_graph=True)
