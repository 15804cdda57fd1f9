"""The exercises of 02 agree with the library."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, small

from dsv3lib import ModelConfig
from dsv3lib.course.exercises import rope
from dsv3lib.course.judge import judge
from dsv3lib.layers.rope import RotaryEmbedding, apply_rope, rope_frequencies, yarn_ramp
from dsv3lib.layers.rope_layouts import to_halves


@given(pairs=st.integers(1, 20), tokens=st.integers(1, 30), seed=SEEDS)
def test_rotate_and_the_layout_are_the_library_s(pairs: int, tokens: int, seed: int) -> None:
    config = small(qk_rope_head_dim=2 * pairs)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 2 * pairs, dtype=torch.float64, generator=generator)
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] * rope_frequencies(config)[0]
    expected = apply_rope(x, RotaryEmbedding(config).table(tokens, x))
    torch.testing.assert_close(rope.rotate(x, angles), expected, rtol=0, atol=1e-12)
    assert torch.equal(rope.to_split_halves(x), to_halves(x))


@given(t=st.integers(0, 500), j=st.integers(0, 500), seed=SEEDS)
def test_the_matrix_of_a_distance_gives_the_turned_score(t: int, j: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, w, c = (
        torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((6,), (6, 4), (4,))
    )
    speeds = 10.0 ** -torch.arange(3, dtype=torch.float64)
    turned = rope.rotate(q, t * speeds) @ rope.rotate(w @ c, j * speeds)
    torch.testing.assert_close(q @ rope.matrix_for_distance(w, speeds, t - j) @ c, turned, rtol=0, atol=1e-9)


def test_v3_s_pairs_that_turn_are_where_yarn_s_ramp_ends() -> None:
    config = ModelConfig.preset("v3-671b")
    turning = rope.pairs_that_turn(64, config.rope_theta, 4096)
    assert turning == 23
    assert int((yarn_ramp(config.rope_scaling, 64, config.rope_theta) < 1).sum()) == turning


@pytest.mark.parametrize("answer", [lambda x, a: None, lambda x, a: x[..., :-1], lambda x, a: 3])
def test_an_answer_of_another_kind_is_told_so(answer) -> None:
    verdict = judge(rope.EXERCISES[0], answer)
    assert verdict.state == "wrong" and "should" in verdict.text
