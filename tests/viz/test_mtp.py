"""The figures of the MTP chain say what they were given."""

import pytest
from matplotlib.colors import to_hex

from dsv3lib.viz import mtp, style

TOKENS = list("abcdefgh")


def fills(fig) -> list[str]:
    """Colours of the tokens' boxes, from left to right."""
    return [to_hex(patch.get_facecolor()) for patch in fig.axes[0].patches][: len(TOKENS)]


@pytest.mark.parametrize(("position", "depth"), [(0, 0), (2, 1), (3, 3), (4, 2)])
def test_what_is_read_shown_and_asked_is_coloured_so(position: int, depth: int) -> None:
    fig, alt, _ = mtp.seen(TOKENS, position, depth)
    content, new, asked = (style.colour(m) for m in ("content", "rope", "bias"))
    expected = [content] * (position + 1) + [new] * depth + [asked]
    drawn = fills(fig)
    assert drawn[: len(expected)] == expected
    assert not {content, new, asked} & set(drawn[len(expected) :])
    assert f"predicts token {position + depth + 1}" in alt


def test_a_position_whose_target_lies_past_the_end_says_so() -> None:
    fig, alt, _ = mtp.seen(TOKENS, 6, 1)
    assert "no target" in alt and style.colour("bias") not in fills(fig)


def test_the_grid_fills_what_moved() -> None:
    rows = [[False, False, True], [False, True]]
    fig, alt, _ = mtp.moved(rows, 2)
    paper = to_hex(style.PAPER)
    assert [to_hex(p.get_facecolor()) != paper for p in fig.axes[0].patches] == [one for r in rows for one in r]
    assert "depth 0 from 2" in alt and "depth 1 from 1" in alt
    assert "nowhere" in mtp.moved([[False]], 0)[1]


def test_lines_and_dots_are_those_that_were_given() -> None:
    fig, alt, _ = mtp.by_depth({"chain": [2.0, 2.1], "heads": [2.0, 3.0]}, "t", "y")
    assert [list(line.get_ydata()) for line in fig.axes[0].lines] == [[2.0, 2.1], [2.0, 3.0]]
    assert "chain, heads" in alt
    fig, alt, _ = mtp.paired({"q": {"chain": [-0.1, 0.2]}, "r": {"chain": [-0.1, -0.2]}}, "nats")
    assert "q, chain: 1 of 2" in alt and "r, chain: 2 of 2" in alt and len(fig.axes) == 2


def test_the_chain_shows_one_position_s_numbers() -> None:
    fig, alt, _ = mtp.chain([[0.12, -0.4], [0.3, 0.2], [-1.2, 0.1]], [[0.5], [0.7]])
    words = [text.get_text() for text in fig.axes[0].texts]
    assert {"0.12", "−0.40", "−1.20", "0.50", "0.70"} <= set(words) and "into the next" in alt
