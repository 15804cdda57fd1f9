"""The figures of long context draw what they are given."""

import math

import pytest

from dsv3lib.viz import long_context as figures
from dsv3lib.viz import style


def drawn(shown):
    fig, alt, caption = shown
    assert alt and caption and style.png(fig).startswith(b"\x89PNG")
    return fig


def test_wavelengths_and_how_much_each_pair_is_slowed():
    plain = [1.0, 0.1, 0.01]
    fig = drawn(figures.wavelengths({"as trained": plain, "YaRN": [1.0, 0.05, 0.0025]}, 100, 400))
    left, right = fig.axes
    assert list(left.lines[0].get_ydata()) == pytest.approx([2 * math.pi / v for v in plain])
    assert len(right.lines) == 1 and list(right.lines[0].get_ydata()) == pytest.approx([1, 2, 4])
    assert [line.get_ydata()[0] for line in left.lines[2:]] == [100, 400]


def test_the_ramp_counts_pairs_that_stay_and_pairs_that_are_slowed_wholly():
    fig, alt, caption = figures.ramp_of([1.0, 1.0, 2.0, 4.0], 4.0, 4096)
    assert "2 pairs stay" in caption and "1 are slowed 4 times" in caption and caption in alt
    assert [bar.get_height() for bar in fig.axes[0].patches] == [1, 1, 2, 4]


def test_shares_are_in_percent():
    fig = drawn(figures.share_of_attention({"none": {4096: 0.5, 8192: 0.25}}))
    assert list(fig.axes[0].lines[0].get_ydata()) == [50, 25]


def test_what_ports_lose_has_a_dot_a_seed_and_the_mean():
    ax = drawn(figures.what_ports_lose({"a": [0.1, 0.3], "b": [0.0, 0.02]}, "loss")).axes[0]
    assert list(ax.lines[0].get_xdata()) == [0.1, 0.3] and ax.lines[1].get_xdata()[0] == pytest.approx(0.2)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]


def test_costs_draws_three_lines():
    ax = drawn(figures.costs([1024, 4096], [1, 16], [10, 40], [1, 4])).axes[0]
    assert [list(line.get_ydata()) for line in ax.lines] == [[1, 16], [10, 40], [1, 4]]
