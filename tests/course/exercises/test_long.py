"""The exercises of 08 agree with the library."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import small

from dsv3lib import ModelConfig
from dsv3lib.course.exercises import long
from dsv3lib.course.judge import judge
from dsv3lib.layers.rope import rope_frequencies
from dsv3lib.rope_settings import YarnScaling


@given(
    pairs=st.integers(4, 40), theta=st.sampled_from([500.0, 10_000.0, 1e6]), factor=st.floats(1.5, 64),
    original=st.integers(64, 8192),
)  # fmt: skip
def test_the_stretched_speeds_and_the_scale_are_the_library_s(pairs, theta, factor, original):
    scaling = YarnScaling(factor, original, mscale=1.0, mscale_all_dim=1.0)
    slowest, fastest = (pairs * math.log(original / (n * 2 * math.pi)) / math.log(theta) for n in (1.0, 32.0))
    low, high = max(math.floor(fastest), 0), min(math.ceil(slowest), 2 * pairs - 1)
    config = small(qk_rope_head_dim=2 * pairs, rope_theta=theta, rope_scaling=scaling)
    width = config.qk_nope_head_dim + config.qk_rope_head_dim
    assert math.isclose(long.softmax_scale(width, factor), config.softmax_scale, rel_tol=1e-12)
    assume(low < high)
    plain = theta ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    torch.testing.assert_close(
        long.yarn_speeds(plain, low, high, factor), rope_frequencies(config)[0], rtol=1e-12, atol=0
    )


def test_v3_s_numbers():
    v3 = ModelConfig.preset("v3-671b")
    plain = v3.rope_theta ** (-torch.arange(32, dtype=torch.float64) / 32)
    torch.testing.assert_close(long.yarn_speeds(plain, 10, 23, 40.0), rope_frequencies(v3)[0], rtol=1e-12, atol=0)
    assert round(long.softmax_scale(192, 40.0), 6) == 0.135234


@given(share=st.floats(0.01, 0.99), tokens=st.integers(2, 200_000))
def test_the_needed_score_gives_that_share(share, tokens):
    scores = torch.zeros(tokens, dtype=torch.float64)
    scores[0] = long.score_needed(share, tokens)
    assert math.isclose(float(scores.softmax(0)[0]), share, rel_tol=1e-9)


@pytest.mark.parametrize("answer", [lambda *a: None, lambda *a: a[0][:-1], lambda *a: "40"])
def test_an_answer_of_another_kind_is_told_so(answer):
    verdict = judge(long.EXERCISES[0], answer)
    assert verdict.state == "wrong" and "should" in verdict.text
