"""Absorbed attention in pieces of any size, in NumPy, against one softmax."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3lib.backends import few_attention, token_weights
from dsv3lib.backends.token_weights import matmul
from dsv3lib.layers.scaled_attention import causal_mask


@given(
    n_new=st.integers(1, 40), heads=st.integers(1, 5), width=st.integers(2, 40), pieces=st.integers(0, 3),
    left=st.integers(-2, 2), loud=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_attends_in_pieces_as_in_one(n_new, heads, width, pieces, left, loud, seed) -> None:
    piece = few_attention.piece_of(min(n_new, few_attention.TOGETHER) * heads, width)
    length = max(n_new, pieces * piece + left)
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(n_new, heads, width, dtype=torch.float64, generator=generator)
    past = torch.randn(length, width, dtype=torch.float64, generator=generator)
    if loud:
        q *= 1e3  # exp would overflow without the maximum
    rank = max(1, width - 4)
    scores = (q.transpose(0, 1) @ past.T).masked_fill(~causal_mask(n_new, length, q.device), -torch.inf)
    expected = (torch.softmax(scores, -1) @ past[:, :rank]).transpose(0, 1)
    found = {"chosen": few_attention.attend_to_latents(q.numpy(), past.numpy(), rank)}
    for size in (1, piece, length):
        found[size] = few_attention._attend_by_pieces(q.numpy(), past.numpy(), rank, size)
    for u in found.values():
        torch.testing.assert_close(torch.from_numpy(u), expected, rtol=0, atol=1e-9 if loud else 1e-12)


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


@pytest.mark.parametrize("in_place", [False, True])
@given(rows=st.integers(1, 300), width=st.integers(8, 600))
def test_scores_of_a_piece_are_few_enough_to_be_made_in_place(in_place, rows, width):
    with mock.patch.object(token_weights, "IN_PLACE", in_place):
        piece = few_attention.piece_of(rows, width)
    assert 24 <= piece <= max(64, 10_240 // width)
    assert not in_place or rows > 1200 // 24 or piece * rows <= 1200
