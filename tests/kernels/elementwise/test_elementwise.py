"""The plain forms of norms, turns and activations: right against formulas of their own, and in their gradients."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS
from torch.autograd import gradcheck

from dsv3lib.errors import KernelError
from dsv3lib.kernels import elementwise as e
from dsv3lib.layers.norm import RMSNorm
from dsv3lib.layers.rope import apply_rope


def wide(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random FP64 values that ask for a gradient."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.requires_grad_()


def turns(*shape: int, seed: int = 9) -> torch.Tensor:
    """Random turns as complex numbers, FP64."""
    angles = (
        torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 * math.pi
    )
    return torch.polar(torch.ones_like(angles), angles)


# ---- gradients ---------------------------------------------------------------------------------------------


def test_gradients_of_the_norms() -> None:
    x, other, weight = wide(3, 5), wide(3, 5, seed=1), wide(5, seed=2)
    assert gradcheck(lambda x, w: e.rms_norm(x, w, 1e-3), (x, weight))
    assert gradcheck(lambda x, r, w: e.add_rms_norm(x, r, w, 1e-3), (x, other, weight))


def test_gradients_of_the_turn_and_of_the_latent() -> None:
    q, k, x, weight, table = (
        wide(2, 3, 2, 6),
        wide(2, 3, 4, seed=1),
        wide(2, 3, 9),
        wide(5, seed=2),
        turns(3, 2),
    )
    assert gradcheck(lambda q, k: e.rope(q, k, table), (q, k))
    assert gradcheck(lambda x, w: e.norm_and_turn(x, w, table, 1e-3), (x, weight))


def test_gradients_of_swiglu() -> None:
    assert gradcheck(e.swiglu, (wide(3, 8),))


def test_gradcheck_sees_a_wrong_gradient() -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return e.swiglu_ref(x)

        @staticmethod
        def backward(ctx, grad):  # forgets that the sigmoid changes too
            gate, up = ctx.saved_tensors[0].chunk(2, -1)
            return torch.cat([grad * up * gate.sigmoid(), grad * gate * gate.sigmoid()], -1)

    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        gradcheck(Wrong.apply, (wide(3, 8),))


# ---- values ------------------------------------------------------------------------------------------------


@given(rows=st.integers(0, 4), n=st.integers(1, 40), size=st.integers(-8, 8), seed=SEEDS)
def test_rms_norm_divides_by_the_root_of_the_mean_square(rows: int, n: int, size: int, seed: int) -> None:
    x = wide(rows, n, seed=seed).detach() * 2.0**size
    weight = wide(n, seed=seed + 1).detach()
    expected = [
        [
            float(v) / math.sqrt(sum(float(u) ** 2 for u in row) / n + 1e-6) * float(w)
            for v, w in zip(row, weight, strict=True)
        ]
        for row in x
    ]
    y = e.rms_norm(x, weight, 1e-6)
    torch.testing.assert_close(y, torch.tensor(expected, dtype=torch.float64).view(rows, n))
    both = e.add_rms_norm(x, x, weight, 1e-6)
    torch.testing.assert_close(both, (e.rms_norm(2 * x, weight, 1e-6), 2 * x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_is_the_layers_but_for_roundings(dtype: torch.dtype) -> None:
    layer = RMSNorm(64, 1e-6)
    torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
    layer.to(dtype)
    x = torch.randn(50, 64).to(dtype)
    y = e.rms_norm(x, layer.weight, 1e-6)
    assert y.dtype == dtype
    step = torch.finfo(dtype).eps * (1 if dtype != torch.float32 else 4)
    assert ((y - layer(x)).abs() <= 2 * step * y.abs()).all()


@given(batch=st.integers(1, 3), length=st.integers(1, 4), heads=st.integers(1, 3), nope=st.integers(0, 5),
       pairs=st.integers(1, 4), per_batch=st.booleans(), as_real=st.booleans(), seed=SEEDS)  # fmt: skip
def test_rope_is_the_layers(batch, length, heads, nope, pairs, per_batch, as_real, seed) -> None:
    table = turns(*([batch] if per_batch else []), length, pairs, seed=seed)
    q, k = (
        wide(batch, length, heads, nope + 2 * pairs, seed=seed).detach(),
        wide(batch, length, 2 * pairs).detach(),
    )
    given_turns = torch.view_as_real(table) if as_real else table
    turned_q, turned_k = e.rope(q, k, given_turns)
    assert torch.equal(turned_q[..., :nope], q[..., :nope])
    expected_q = apply_rope(q[..., nope:], table[..., None, :])
    torch.testing.assert_close(turned_q[..., nope:], expected_q)
    torch.testing.assert_close(turned_k, apply_rope(k, table))
    back = e.rope(turned_q, turned_k, table.conj().resolve_conj())
    torch.testing.assert_close(back, (q, k))
    same_q, same_k = e.rope(q, k, given_turns, inplace=True)
    assert same_q is q and same_k is k and torch.equal(q, turned_q) and torch.equal(k, turned_k)


@given(rows=st.integers(0, 4), width=st.integers(1, 20), seed=SEEDS)
def test_swiglu_takes_the_gate_from_the_first_half(rows: int, width: int, seed: int) -> None:
    both = wide(rows, 2 * width, seed=seed).detach()
    gate, up = both[:, :width], both[:, width:]
    torch.testing.assert_close(e.swiglu(both), gate / (1 + (-gate).exp()) * up)
    if rows and not torch.allclose(gate, up):
        assert not torch.allclose(e.swiglu(torch.cat([up, gate], -1)), e.swiglu(both))


def test_the_latent_is_its_parts() -> None:
    x, weight, table = torch.randn(2, 3, 14), torch.rand(8), turns(3, 3).to(torch.complex64)
    y = e.norm_and_turn(x, weight, table, 1e-5)
    torch.testing.assert_close(y[..., :8], e.rms_norm(x[..., :8], weight, 1e-5))
    torch.testing.assert_close(y[..., 8:], apply_rope(x[..., 8:], table))


# ---- what is refused ---------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused() -> None:
    x, table = torch.zeros(2, 3, 8), turns(3, 2).to(torch.complex64)
    q = torch.zeros(2, 3, 2, 6)
    k = x[..., :4]
    eight = torch.zeros(2, 256, dtype=torch.float8_e4m3fn)
    for match, call in (
        ("weight has shape", lambda: e.rms_norm.__wrapped__(x, torch.ones(7), 1e-6)),
        ("x is float8", lambda: e.rms_norm(eight, torch.ones(256), 1e-6)),
        ("residual is float16", lambda: e.add_rms_norm(x, x.half(), torch.ones(8), 1e-6)),
        ("residual has shape", lambda: e.add_rms_norm.__wrapped__(x, x[:1], torch.ones(8), 1e-6)),
        ("is 7, expected a multiple of 2", lambda: e.swiglu(x[..., :7])),
        ("gate_up is float8", lambda: e.swiglu(eight)),
        ("k_rope is float16", lambda: e.rope(q, k.half(), table)),
        ("k_rope has shape", lambda: e.rope.__wrapped__(q, k[:1], table)),
        ("expected at least the 8 that are turned", lambda: e.rope(q, x, turns(3, 4))),
        ("turns have shape", lambda: e.rope(q, k, turns(3, 3))),
        ("turns have shape", lambda: e.rope(q, torch.zeros(2, 3, 3), table)),
        ("turns are for tokens", lambda: e.rope(q, k, turns(2, 2))),
        ("turns are for tokens", lambda: e.rope(q, k, turns(1, 2, 3, 2))),
        ("turns is int64", lambda: e.rope(q, k, torch.ones(3, 2, 2, dtype=torch.int64))),
        ("gradient would be lost", lambda: e.rope(q.clone().requires_grad_(), k, table, inplace=True)),
        ("at least 2 more", lambda: e.norm_and_turn(x, torch.ones(7), table, 1e-6)),
        ("turns have shape", lambda: e.norm_and_turn(x, torch.ones(2), table, 1e-6)),
    ):
        with pytest.raises(KernelError, match=match):
            call()
