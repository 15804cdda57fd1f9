"""Absorbed attention of few tokens against one softmax."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3lib.backends import few_attention
from dsv3lib.backends.token_weights import matmul
from dsv3lib.layers.scaled_attention import causal_mask

FORMS = few_attention._by_numpy, few_attention._by_torch


@given(
    n_new=st.integers(1, 40), heads=st.integers(1, 5), width=st.integers(2, 40), past=st.integers(0, 300),
    loud=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_attends_as_one_softmax_does(n_new, heads, width, past, loud, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(n_new, heads, width, dtype=torch.float64, generator=generator)
    latents = torch.randn(past + n_new, width, dtype=torch.float64, generator=generator)
    if loud:
        q *= 1e3  # exp would overflow without the maximum
    rank = max(1, width - 4)
    scores = (q.transpose(0, 1) @ latents.T).masked_fill(~causal_mask(n_new, len(latents), q.device), -torch.inf)
    expected = (torch.softmax(scores, -1) @ latents[:, :rank]).transpose(0, 1)
    for dtype, tolerance in ((np.float64, 1e-9 if loud else 1e-12), (np.float32, 1e-5)):
        if loud and dtype is np.float32:
            continue
        operands = q.numpy().astype(dtype), latents.numpy().astype(dtype)
        by_each = [form(operands[0].reshape(-1, width), operands[1], n_new, rank) for form in FORMS]
        for found in (few_attention.attend_to_latents(*operands, rank), *by_each):
            assert found.dtype == dtype
            found = torch.from_numpy(found).double().view_as(expected)
            torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@given(total=st.integers(1, 12), data=st.data())
def test_the_mask_is_the_causal_one(total, data) -> None:
    n_new = data.draw(st.integers(1, total))
    scores = np.zeros((n_new, 2, total))
    few_attention.hide_what_comes_later(scores)
    seen = causal_mask(n_new, total, torch.device("cpu"))
    for head in range(2):
        assert torch.equal(torch.from_numpy(scores[:, head]) == 0, seen)
    assert set(scores.flatten().tolist()) <= {0.0, -np.inf}


@given(rows=st.integers(5, 90), inner=st.integers(60, 90), outer=st.integers(60, 90), threads=st.integers(1, 3))
def test_a_product_is_the_same_in_any_threads_and_leaves_their_number_as_it_was(rows, inner, outer, threads) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(rows, inner, dtype=torch.float64, generator=generator).numpy()
    b = torch.randn(inner, outer, dtype=torch.float64, generator=generator).numpy()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = matmul(a, b, np.empty((rows, outer)))
        with pytest.raises((RuntimeError, ValueError)):
            matmul(a, b[1:], np.empty((rows, outer)))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    np.testing.assert_allclose(found, np.einsum("ri,io->ro", a, b), rtol=0, atol=1e-11)
