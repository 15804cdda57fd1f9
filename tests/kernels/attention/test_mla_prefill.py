"""Attention over packed documents: the reference against the model's, spans against masks, gradients in FP64."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS

from dsv3lib.errors import KernelError
from dsv3lib.kernels.attention.mla_prefill import mla_prefill
from dsv3lib.kernels.attention.spans import attention_spans
from dsv3lib.kernels.attention.tiles import Operands
from dsv3lib.layers.attention import scaled_attention

PAIRS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=5)


def borders(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()


def mask(queries: list[int], keys: list[int], causal: bool, rest: int) -> torch.Tensor:
    """Who sees whom, bit by bit; ``rest`` tokens belong to no document."""
    seen = torch.zeros(sum(queries) + rest, sum(keys) + rest, dtype=torch.bool)
    row = column = 0
    for n, m in zip(queries, keys, strict=True):
        block = torch.ones(n, m, dtype=torch.bool)
        seen[row : row + n, column : column + m] = block.tril(m - n) if causal else block
        row, column = row + n, column + m
    return seen


@given(pairs=PAIRS, causal=st.booleans(), rest=st.integers(0, 3))
def test_spans_are_the_mask(pairs: list[tuple[int, int]], causal: bool, rest: int) -> None:
    queries, keys = [n for n, _ in pairs], [m for _, m in pairs]
    wanted = mask(queries, keys, causal, rest)
    n_queries, n_keys = wanted.shape
    spans = attention_spans(borders(queries), borders(keys), n_queries, n_keys, causal)
    q, k = torch.arange(n_queries)[:, None], torch.arange(n_keys)[None]
    by_query = (spans.key_from[:, None] <= k) & (k < spans.key_to[:, None])
    by_key = (spans.query_from[None] <= q) & (q < spans.query_to[None])
    assert torch.equal(by_query, wanted)
    assert torch.equal(by_key, wanted)


def operands(queries: int, keys: int, heads: int = 2) -> tuple[torch.Tensor, ...]:
    return (
        torch.randn(queries, heads, 6, dtype=torch.float64, requires_grad=True),
        torch.randn(keys, heads, 6, dtype=torch.float64, requires_grad=True),
        torch.randn(keys, heads, 4, dtype=torch.float64, requires_grad=True),
    )


@settings(max_examples=15)
@given(pairs=PAIRS, causal=st.booleans(), seed=SEEDS)
def test_it_is_masked_attention(pairs: list[tuple[int, int]], causal: bool, seed: int) -> None:
    """Packing is a mask: one great square with −inf outside each document."""
    torch.manual_seed(seed)
    queries, keys = [n for n, _ in pairs], [m for _, m in pairs]
    q, k, v = operands(sum(queries), sum(keys))
    out, lse = mla_prefill(q, k, v, borders(queries), 0.3, causal, borders(keys))
    scores = torch.einsum("thd,shd->hts", q, k) * 0.3
    scores = scores.masked_fill(~mask(queries, keys, causal, 0), float("-inf"))
    torch.testing.assert_close(lse, scores.logsumexp(-1).detach())
    p = scores.softmax(-1).nan_to_num(0.0)
    torch.testing.assert_close(out, torch.einsum("hts,shv->thv", p, v))
    assert not lse.requires_grad


def test_it_is_the_models_expanded_attention() -> None:
    q, k, v = operands(2 * 7, 2 * 7)
    out, _ = mla_prefill(q, k, v, borders([7, 7]), 0.3)
    batched = (x.view(2, 7, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    wanted = scaled_attention(*batched, None, 0.3).transpose(1, 2)
    torch.testing.assert_close(out.view_as(wanted), wanted)
    assert not torch.allclose(mla_prefill(q, k, v, borders([14]), 0.3)[0], out)


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_of_the_reference(causal: bool) -> None:
    q, k, v = operands(6, 9)
    rope = torch.randn(9, 2, dtype=torch.float64, requires_grad=True)

    def run(q, k, v, rope):
        return mla_prefill(q, k, v, borders([4, 0, 2]), 0.3, causal, borders([4, 1, 4]), rope)[0]

    assert torch.autograd.gradcheck(run, (q, k[..., :4].detach().requires_grad_(), v, rope))


def test_a_shared_key_is_every_heads() -> None:
    q, k, v = operands(5, 5)
    rope = torch.randn(5, 2, dtype=torch.float64)
    full = torch.cat([k[..., :4], rope[:, None].expand(-1, 2, -1)], -1)
    shared, _ = mla_prefill(q, k[..., :4], v, borders([5]), 0.3, k_rope=rope)
    torch.testing.assert_close(shared, mla_prefill(q, full, v, borders([5]), 0.3)[0])


def test_operands_are_cut_alike_and_not_copied() -> None:
    q, k, v = torch.randn(3, 2, 192), torch.randn(3, 2, 192), torch.randn(3, 2, 128)
    whole = Operands.of(q, k, v, None)
    assert whole.q1.shape[-1] == whole.k1.shape[-1] == 128 and whole.q2.shape[-1] == whole.k2.shape[-1] == 64
    assert whole.k2.data_ptr() == k[..., 128:].data_ptr()
    shared = Operands.of(q, k[..., :128], v, k[:, 0, 128:])
    assert shared.k2.shape == (3, 2, 64) and shared.k2.stride(1) == 0
    assert Operands.of(q[..., :64], k[..., :64], v, None).k2 is None


def test_what_is_refused() -> None:
    unchecked = inspect.unwrap(mla_prefill)  # without the tests' own check of annotations
    q, k, v = operands(5, 4)
    with pytest.raises(KernelError, match="pass k_starts"):
        unchecked(q, k, v, borders([5]), 0.3)
    with pytest.raises(KernelError, match="k_starts has shape"):
        unchecked(q, k, v, borders([5]), 0.3, k_starts=borders([2, 2]))
    with pytest.raises(KernelError, match="k is float32"):
        unchecked(q, k.float(), v, borders([5]), 0.3, k_starts=borders([4]))
