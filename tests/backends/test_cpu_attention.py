"""Attention in blocks of rows against the plain formula, forward and backward."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3lib.backends import cpu_attention as module
from dsv3lib.backends.cpu import Cpu
from dsv3lib.backends.cpu_attention import BLOCK, GROUP, MOST_TOKENS, causal_attention, causal_attention_ref

SCALE = 0.37


def operands(n: int, t: int, qk: int, v: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n, t, qk), (n, t, qk), (n, t, v)]
    return [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes]


def check(attention, n: int, t: int, qk: int, v: int) -> None:
    inputs = operands(n, t, qk, v)
    out, expected = attention(*inputs, SCALE), causal_attention_ref(*inputs, SCALE)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    towards = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    for a, b in zip(
        torch.autograd.grad(out, inputs, towards), torch.autograd.grad(expected, inputs, towards), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@given(
    n=st.sampled_from([1, 3, GROUP, GROUP + 1]),
    t=st.sampled_from([1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5]),
    qk=st.integers(1, 9),
    v=st.integers(1, 9),
)
def test_blocks_equal_the_whole_square(n: int, t: int, qk: int, v: int) -> None:
    check(causal_attention, n, t, qk, v)


@pytest.mark.parametrize("diagonal", [0, 2])
def test_a_mask_off_by_one_would_show(monkeypatch, diagonal: int) -> None:
    def shifted(n: int, like: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.ones(n, n).triu(diagonal) > 0, -1e9, 0.0).to(like.dtype)

    monkeypatch.setattr(module, "above_diagonal", shifted)
    with pytest.raises(AssertionError):
        check(causal_attention, 2, BLOCK + 3, 4, 3)


@pytest.mark.parametrize("tokens", [MOST_TOKENS, MOST_TOKENS + 1])
def test_both_sides_of_the_choice_agree(tokens: int) -> None:
    q, k, v = (x.detach().float()[None] for x in operands(2, tokens, 6, 4))
    expected = causal_attention_ref(q[0], k[0], v[0], SCALE)
    torch.testing.assert_close(Cpu().attend(q, k, v, None, SCALE)[0], expected, rtol=1e-5, atol=1e-5)
