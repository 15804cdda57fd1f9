"""The figures of decoupled RoPE say what they were given."""

import math

import pytest

from dsv3lib.viz import rotary, style

RUN = {"loss_by_position": [2.0, 1.9], "copy_accuracy": {"8": 0.9, "16": 0.8}}


def worse(run: dict, loss: float, right: float) -> dict:
    return {
        "loss_by_position": [x + loss for x in run["loss_by_position"]],
        "copy_accuracy": {d: x * right for d, x in run["copy_accuracy"].items()},
    }


@pytest.mark.parametrize("position", [0, 1, 17, 24])
@pytest.mark.parametrize("pair", [0, 3])
def test_the_hand_points_where_the_angle_is(position: int, pair: int) -> None:
    fig, alt, caption = rotary.rotation(position, pair, dims=8)
    angle = position * 10_000 ** (-2 * pair / 8)
    hand = fig.axes[0].texts[-1].xy
    assert hand == pytest.approx((math.cos(angle), math.sin(angle)))
    dot = fig.axes[1].lines[-1]
    assert (dot.get_xdata()[0], dot.get_ydata()[0]) == pytest.approx((position, math.cos(angle)))
    assert f"position {position}" in alt and f"{2 * math.pi * 10_000 ** (2 * pair / 8):,.4g}" in caption
    assert len(fig.axes[0].texts) == position + 2  # every earlier one, zero, and the hand


def test_v3_s_fastest_and_slowest_pair() -> None:
    assert rotary.wavelength(64, 0) == pytest.approx(2 * math.pi)
    assert round(rotary.wavelength(64, 31)) == 47_117


def test_score_s_sum_is_drawn_and_long_rows_are_cut() -> None:
    fig, alt, caption = rotary.score_by_distance([1.0] * 80, [0.5] * 80, 1, 2)
    content, position, both, zero = fig.axes[0].lines
    assert set(both.get_ydata()) == {1.5} and len(both.get_xdata()) == 64
    assert "Layer 1, head 2" in fig.axes[0].get_title(loc="left")
    assert alt and caption and not any(c.isdigit() for c in alt + caption)


def test_the_study_draws_every_seed() -> None:
    runs = {dims: [RUN, worse(RUN, 0.1, 0.9), RUN] for dims in (0, 8, 16, 32)}
    fig, alt, caption = rotary.rotary_dims_study(runs)
    left, right = fig.axes
    assert [line.get_label() for line in left.lines] == [f"{n} rotary dims" for n in (0, 8, 16, 32)]
    assert list(left.lines[0].get_ydata()) == pytest.approx([(2.0 + 2.1 + 2.0) / 3, (1.9 + 2.0 + 1.9) / 3])
    marks = [y for line in right.lines for y in line.get_ydata()]
    assert len(marks) == 4 * 2 * 3 and min(marks) == pytest.approx(72)
    assert style.png(fig).startswith(b"\x89PNG") and caption


def test_the_diagram_shows_the_token_s_numbers_before_and_after() -> None:
    fig, alt, _ = rotary.decoupled_path([0.11], [0.22], [-0.33], position=3)
    said = [text.get_text() for text in fig.axes[0].texts]
    assert {"0.11", "0.22", "−0.33"} <= set(said) and any("position 3" in text for text in said)
    assert "kept in the cache" in alt


def test_frequencies_are_named_by_their_tokens() -> None:
    fig, _, _ = rotary.frequencies_used([[0.2, 0.8]], ["layer 0, head 0"], [6.28, 628.3])
    assert [tick.get_text() for tick in fig.axes[0].get_xticklabels()] == ["6", "628"]
