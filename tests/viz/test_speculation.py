"""Figures of speculative decoding say what they draw, and the speed-up is what a simulation of rounds gives."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3lib.inference.acceptance import Round, expected_speedup
from dsv3lib.viz import speculation

ROUNDS = [Round([[4, 5]], [1], [[4, 9]]), Round([[6, 7]], [0], [[8]]), Round([[]], [0], [[3]])]


def test_a_round_is_drawn_with_its_drafts_and_its_own_token():
    fig, alt, _ = speculation.rounds_of_a_text(ROUNDS, lambda i: f"<{i}>", most=2)
    words = [text.get_text() for text in fig.axes[0].texts]
    assert all(f"“<{i}>”" in words for i in (4, 5, 6, 7, 8, 9)) and "“<3>”" not in words
    assert "struck out" in alt and not any(ch.isdigit() for ch in alt)


def test_the_best_number_of_drafts_is_named():
    assert "never pays" in speculation.speedup(0.3, 0.5, 0.5)[2]
    assert "Best with" in speculation.speedup(0.9, 0.02, 0.02)[2]


@settings(max_examples=20, deadline=None)
@given(a=st.floats(0.05, 0.95), m=st.integers(1, 4), wide=st.floats(1.0, 3.0), draft=st.floats(0.0, 0.5))
def test_the_speed_up_is_that_of_simulated_rounds(a, m, wide, draft):
    draw, tokens, n = random.Random(7), 0, 20_000
    for _ in range(n):
        stood = 0
        while stood < m and draw.random() < a:
            stood += 1
        tokens += stood + 1
    assert expected_speedup(a, m, wide, draft) == pytest.approx(tokens / n / (wide + m * draft), rel=0.04)
