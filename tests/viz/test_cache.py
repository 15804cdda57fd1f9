"""The latent cache's figures say what they were given."""

import pytest
from matplotlib.colors import to_hex

from dsv3lib.viz import cache, style

BYTES = {"MHA": 4_997_120, "GQA-8": 312_320, "MQA": 39_040, "MLA": 70_272}


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (70_272, "68.6 KiB"),
        (2**20, "1 MiB"),
        (70_272 * 2**17, "8.58 GiB"),
        (4_997_120 * 2**17, "610 GiB"),
        (3 * 2**40, "3 TiB"),
    ],
)
def test_bytes_are_said_to_three_digits(count: int, said: str) -> None:
    assert cache.readable_bytes(count) == said


@pytest.mark.parametrize("tokens", cache.CONTEXTS)
def test_the_reading_at_a_context_is_in_picture_and_alt_text(tokens: int) -> None:
    fig, alt, _ = cache.cache_by_context(BYTES, tokens)
    texts = [text.get_text() for text in fig.axes[0].texts]
    assert f"At {tokens:,} tokens" in alt
    for name, size in BYTES.items():
        said = cache.readable_bytes(size * tokens)
        assert said in texts and name in texts
        assert f"{name} {said}" in alt


def test_lines_hold_bytes_times_context_and_only_mla_has_the_latent_s_colour() -> None:
    fig, _, _ = cache.cache_by_context(BYTES, 4096)
    lines = [one for one in fig.axes[0].lines if len(one.get_xdata()) == len(cache.CONTEXTS)]
    assert len(lines) == len(BYTES)
    for one, (name, size) in zip(lines, BYTES.items(), strict=True):
        assert one.get_ydata()[-1] == pytest.approx(size * 131_072 / 2**30)
        assert (to_hex(one.get_color()) == style.colour("latent")) == (name == "MLA")


def test_the_reading_never_leaves_the_axes() -> None:
    for tokens in (cache.CONTEXTS[0], cache.CONTEXTS[-1]):
        fig, _, _ = cache.cache_by_context(BYTES, tokens)
        fig.canvas.draw()
        frame = fig.axes[0].get_window_extent()
        for text in fig.axes[0].texts:
            if text.get_text() not in BYTES:
                box = text.get_window_extent()
                assert frame.x0 <= box.x0 and box.x1 <= frame.x1, text.get_text()


def test_decode_figure_has_both_forms_in_both_panels_and_an_alt_text_without_measurements() -> None:
    contexts = [64, 128, 1024]
    fig, alt, _ = cache.decode_by_context(
        contexts,
        {"expanded": [9.7, 17.7, 131.7], "absorbed": [1.7, 1.8, 2.7]},
        {"expanded": [2152.7, 4305.3, 34443.1], "absorbed": [51.4, 69.2, 318.7]},
    )
    assert [len(ax.lines) for ax in fig.axes] == [2, 2]
    assert "ms" in fig.axes[0].get_ylabel() and "millions" in fig.axes[1].get_ylabel()
    assert not any(character.isdigit() for character in alt)
    assert "above everywhere" in alt


def test_decode_figure_does_not_claim_what_was_not_measured() -> None:
    times = {"expanded": [1.0, 9.0], "absorbed": [2.0, 3.0]}
    _, alt, _ = cache.decode_by_context([64, 128], times, times)
    assert "in places only" in alt


def test_directions_figure_draws_percent_and_both_floors() -> None:
    fig, alt, _ = cache.kept_by_directions(
        {"trained": [0.5, 0.9, 1.0], "untrained": [0.2, 0.4, 0.6]},
        {"best": {1: 3.0, 2: 2.5}, "random": {1: 3.6, 2: 3.5}},
        {"whole model": 2.4, "another": 2.3},
    )
    assert "trained and untrained" in alt and "best and random" in alt
    left, right = fig.axes
    assert list(left.lines[0].get_ydata()) == [50, 90, 100]
    assert [line.get_label() for line in right.lines] == ["best", "random", "whole model", "another"]
    assert not any(character.isdigit() for character in alt)
    assert style.png(fig).startswith(b"\x89PNG")


ROWS = [
    {"rank": rank, "seed": seed, "steps": steps, "evenly": False, "loss": 2 + 0.01 * rank + 0.1 * seed}
    for rank in (2, 8) for seed in (1, 2) for steps in (240, 720)
]  # fmt: skip


def test_every_seed_is_a_dot_and_every_mean_a_bar() -> None:
    fig, alt, caption = cache.loss_by_width(ROWS, [240, 720])
    for ax in fig.axes:
        dots = [line for line in ax.lines if line.get_marker() == "o"]
        bars = [line for line in ax.lines if line.get_marker() == "_"]
        assert [len(line.get_ydata()) for line in dots] == [2, 2]
        assert [line.get_ydata()[0] for line in bars] == pytest.approx([2.17, 2.23])
    assert "seeds" in alt and caption != alt
    assert len(cache.loss_by_width(ROWS, [240])[0].axes) == 1
