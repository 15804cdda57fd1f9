"""Interleaved pairs and split halves: one rotation, two orders of the same numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, small

from dsv3lib.errors import InputError
from dsv3lib.layers.rope import RotaryEmbedding, apply_rope
from dsv3lib.layers.rope_layouts import apply_rope_to_halves, to_halves, to_pairs


def drawn(pairs: int, seed: int, tokens: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and turns, FP64."""
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, tokens, 2 * pairs, dtype=torch.float64, generator=generator)
    return q, k, RotaryEmbedding(small(qk_rope_head_dim=2 * pairs)).table(tokens, q)


@given(pairs=st.integers(1, 40), seed=SEEDS)
def test_there_and_back_is_where_one_was(pairs: int, seed: int) -> None:
    x, _, _ = drawn(pairs, seed)
    assert torch.equal(to_pairs(to_halves(x)), x) and torch.equal(to_halves(to_pairs(x)), x)


@given(pairs=st.integers(1, 40), seed=SEEDS)
def test_both_layouts_rotate_alike_and_score_alike(pairs: int, seed: int) -> None:
    q, k, turns = drawn(pairs, seed)
    inter = [apply_rope(x, turns) for x in (q, k)]
    halves = [apply_rope_to_halves(to_halves(x), turns) for x in (q, k)]
    for a, b in zip(inter, halves, strict=True):
        torch.testing.assert_close(to_halves(a), b, rtol=0, atol=1e-12)
    torch.testing.assert_close(inter[0] @ inter[1].T, halves[0] @ halves[1].T, rtol=0, atol=1e-11)


@given(pairs=st.integers(2, 40), seed=SEEDS)
def test_a_key_of_the_other_layout_gives_another_score(pairs: int, seed: int) -> None:
    """What ports get wrong: the test above would accept it if it compared one layout with itself."""
    q, k, turns = drawn(pairs, seed)
    right = apply_rope(q, turns) @ apply_rope(k, turns).T
    mixed = apply_rope(q, turns) @ apply_rope_to_halves(to_halves(k), turns).T
    assert not torch.allclose(right, mixed, atol=1e-3)


def test_the_first_halves_are_the_even_dimensions() -> None:
    assert to_halves(torch.arange(6.0)).tolist() == [0, 2, 4, 1, 3, 5]


@pytest.mark.parametrize("convert", [to_halves, to_pairs])
def test_an_odd_number_of_dimensions_is_refused(convert) -> None:
    with pytest.raises(InputError, match="5 rotary dimensions, expected an even number"):
        convert(torch.zeros(3, 5))
