"""Figures of decoupled RoPE: the way around the latent, the rotation itself, scores by distance, frequencies in use.

Each function draws what it is given and returns the figure, its alt text and its caption. Alt texts and captions of
measured figures name shapes and order only, because they are compared when a notebook is tested.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Wedge
from matplotlib.ticker import NullLocator

from . import style
from .diagram import diagram

Drawn = tuple[Figure, str, str]

POSITIONS = tuple(range(25))
"""Positions that the rotation's slider steps through."""

_SHOWN = 64
_DIMS_MEANING = ("neutral", "content", "forward", "rope")
_OFFSETS = (-0.24, -0.08, 0.08, 0.24)


def decoupled_path(
    latent: Sequence[float], before: Sequence[float], after: Sequence[float], position: int
) -> Drawn:
    """What a token leaves in the cache: the latent as it is, and beside it the one key that is turned.

    Args:
        latent: the first numbers of a worked token's latent. before, after: of its rotary key, untouched and
            turned. position: of the token.

    Returns:
        The figure, its alt text and its caption.
    """
    d = diagram("The position travels beside the latent", width=9.4, height=3.5)
    h = d.box(0.1, 1.35, "h_t", "[d]", w=0.9)
    c = d.box(2.3, 2.25, "c_t^{KV}", "[d_c]", meaning="latent", kept=True, w=1.1)
    k = d.box(2.3, 0.45, "k_t", "[d_h^R]", meaning="communication", w=1.1)
    r = d.box(5.35, 0.45, "k_t^R", "[d_h^R]", meaning="rope", kept=True, w=1.1)
    head = d.box(8.15, 1.35, "k_{t,i}", "[d_h + d_h^R]", w=1.15)
    d.arrow(h, c, "W^{DKV}", at=(1.5, 2.25))
    d.arrow(h, k, "W^{KR}", at=(1.5, 1.05))
    d.arrow(k, r, f"turned by position {position}", meaning="rope")
    d.arrow(c, head, "$W_i^{UK}$: a matrix for each head", at=(6.3, 2.3))
    d.arrow(r, head, "shared by all heads", at=(7.4, 1.0))
    d.numbers(3.75, 2.72, latent, meaning="latent", more=True)
    d.numbers(1.7, 0.02, before, meaning="communication", more=True)
    d.numbers(4.9, 0.02, after, meaning="rope", more=True)
    alt = (
        "From h of a token two arrows lead off. One goes to the latent c, which is kept in the cache and from "
        "which each head's matrix makes its content. The other goes to a short key, which is turned by the token's "
        "position, kept in the cache beside the latent, and shared by all heads. Strips of numbers show one real "
        "token: the key's numbers differ before and after the turn."
    )
    return d.figure, alt, "Doubled edges are kept in the cache. Only the orange path knows where the token stands."


def wavelength(dims: int, pair: int, theta: float = 10_000.0) -> float:
    """Tokens in which a pair turns around once, 2π·θ^(2i/R)."""
    return 2 * math.pi * theta ** (2 * pair / dims)


def rotation(position: int, pair: int, dims: int, theta: float = 10_000.0) -> Drawn:
    """One pair of numbers turned by a position, and the same pair at all positions before it.

    Args:
        position: of the token. pair: which of the ``dims`` / 2 pairs, 0 is the fastest. dims: R. theta: RoPE's base.

    Returns:
        The figure, its alt text and its caption.
    """
    speed = theta ** (-2 * pair / dims)
    fig, (left, right) = style.figure(
        f"Pair {pair} of {dims // 2} at position {position}", None, None, columns=2, size=(8.8, 3.7),
        width_ratios=(1, 1.75),
    )  # fmt: skip
    left.add_patch(Circle((0, 0), 1, fill=False, edgecolor=style.INK, linewidth=0.8))
    angle = position * speed
    for earlier in range(position):
        _hand(left, earlier * speed, style.colour("communication"), 1.2)
    degrees = math.degrees(angle % (2 * math.pi))
    left.add_patch(Wedge((0, 0), 0.28, 0, degrees, facecolor=style.colour("rope"), alpha=0.5))
    _hand(left, 0.0, style.INK, 1.0)
    _hand(left, angle, style.colour("rope"), 3.0)
    left.set(xlim=(-1.15, 1.15), ylim=(-1.15, 1.15), aspect="equal", xlabel="x of the pair", ylabel="y of the pair")
    left.set_xticks([-1, 0, 1])
    left.set_yticks([-1, 0, 1])
    places = [0.25 * step for step in range(4 * POSITIONS[-1] + 1)]
    right.plot(places, [math.cos(p * speed) for p in places], **(style.line("rope") | {"marker": ""}))
    right.plot([position], [math.cos(angle)], marker="o", markersize=9, color=style.colour("rope"))
    side, words = (8, "left") if position < 18 else (-8, "right")
    right.annotate(
        f"{angle:.3g} rad", (position, math.cos(angle)), textcoords="offset points",
        xytext=(side, 10 if math.cos(angle) < 0.6 else -16), ha=words,
    )  # fmt: skip
    right.set(xlabel="position (tokens)", ylabel="x of the pair", ylim=(-1.15, 1.15))
    turn = wavelength(dims, pair, theta)
    alt = (
        f"Left: a circle with the pair as an arrow, turned by {angle:.3g} radians at position {position}; fainter "
        "arrows are the positions before. Right: the pair's x against the position, a cosine that repeats every "
        f"{turn:,.4g} tokens."
    )
    return fig, alt, f"This pair turns around once in {turn:,.4g} tokens."


def score_by_distance(
    content: Sequence[float], position: Sequence[float], layer: int, head: int
) -> Drawn:
    """A trained head's score against the distance, its two parts apart.

    Args:
        content, position: mean score at distances 0, 1, 2, …, already multiplied by the softmax scale.
        layer, head: whose.

    Returns:
        The figure, its alt text and its caption.
    """
    fig, ax = style.figure(
        f"Layer {layer}, head {head}: content and position apart", "distance to the key (tokens)",
        "score before the softmax", size=(8.6, 3.9),
    )  # fmt: skip
    shown = min(_SHOWN, len(content))
    for name, row, meaning in (("content", content, "content"), ("position", position, "rope")):
        ax.plot(range(shown), row[:shown], **(style.line(meaning) | {"marker": ""}), label=f"{name} part")
    both = [a + b for a, b in zip(content[:shown], position[:shown], strict=True)]
    ax.plot(range(shown), both, color=style.INK, linewidth=1, label="their sum")
    ax.axhline(0, color=style.INK, linewidth=0.6)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3, handlelength=3.2, frameon=False)
    alt = (
        "Three lines against the distance from the query: the mean content part of the score, the mean position "
        "part, and their sum. The position part waves; where it is highest is where this head looks."
    )
    return fig, alt, "Where the orange line peaks, this head prefers to look; it need not be the nearest token."


def frequencies_used(shares: Sequence[Sequence[float]], names: Sequence[str], wavelengths: Sequence[float]) -> Drawn:
    """Which pairs of rotary dimensions make the position part of each head's score.

    Args:
        shares: head by pair, each row sums to 1. names: of the rows. wavelengths: of the pairs, in tokens.

    Returns:
        The figure, its alt text and its caption.
    """
    fig, ax = style.figure("Which frequencies trained heads use", "pair: tokens for one turn", None, size=(8.6, 3.9))
    picture = ax.imshow(shares, cmap=style.SEQUENTIAL, vmin=0, aspect="auto")
    ax.grid(False)
    ax.set_xticks(range(len(wavelengths)), [f"{turn:,.0f}" for turn in wavelengths])
    ax.set_yticks(range(len(names)), names)
    bar = fig.colorbar(picture, ax=ax)
    bar.set_label("share of the position part")
    alt = (
        "A heat map, one row a head, one column a pair of dimensions from the fastest at the left to the slowest "
        "at the right. Bright cells say which pairs make the head's position scores; heads differ."
    )
    return fig, alt, "One row a head: what a head uses was learnt, the frequencies themselves are fixed."


def rotary_dims_study(runs: Mapping[int, Sequence[Mapping]]) -> Drawn:
    """The recorded study: loss by place in the row, and copying by distance, for each number of rotary dimensions.

    Args:
        runs: rotary dimensions → one record a seed, as ``dsv3lib.studies.rotary_dims`` writes them.

    Returns:
        The figure, its alt text and its caption.
    """
    fig, (left, right) = style.figure(
        "A few rotary dimensions do most of it", None, None, columns=2, size=(9.4, 4.4)
    )
    for (dims, row), meaning in zip(sorted(runs.items()), _DIMS_MEANING, strict=False):
        curves = [run["loss_by_position"] for run in row]
        places = [(i + 0.5) / len(curves[0]) * 100 for i in range(len(curves[0]))]
        mean = [sum(column) / len(column) for column in zip(*curves, strict=True)]
        left.plot(places, mean, **style.line(meaning), label=f"{dims} rotary dims")
        low, high = ([pick(column) for column in zip(*curves, strict=True)] for pick in (min, max))
        left.fill_between(places, low, high, color=style.colour(meaning), alpha=0.25, linewidth=0)
    left.set(xlabel="place in the row (percent of its length)", ylabel="loss on new text (nats per byte)")
    distances = list(next(iter(runs.values()))[0]["copy_accuracy"])
    for (_, row), meaning, offset in zip(sorted(runs.items()), _DIMS_MEANING, _OFFSETS, strict=False):
        for at, distance in enumerate(distances):
            values = [100 * run["copy_accuracy"][distance] for run in row]
            marks = {"marker": style.STROKES[meaning][1], "color": style.colour(meaning), "markersize": 7}
            right.plot([at + offset] * len(values), values, linestyle="", **marks)
    right.set_xticks(range(len(distances)), distances)
    right.set(xlabel="distance of the copy (bytes)", ylabel="copied rightly (percent)", ylim=(-3, 104))
    right.xaxis.set_minor_locator(NullLocator())
    fig.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, handlelength=3.2, frameon=False)
    alt = (
        "Left: loss against the place in the row, one band a number of rotary dimensions. Without any, the line "
        "lies far above the others and does not fall along the row; the others fall at first. Right: share of letters "
        "copied rightly at four distances, one mark a seed. Without rotary dimensions the marks lie at the bottom, "
        "with them far above."
    )
    return fig, alt, "One band, or one mark, for each seed: from 0 to 8 is the large step, from 16 to 32 hardly any."


def _hand(ax: Axes, angle: float, ink: str, width: float) -> None:
    ax.annotate(
        "", (math.cos(angle), math.sin(angle)), (0, 0),
        arrowprops={"arrowstyle": "-|>", "color": ink, "linewidth": width, "shrinkA": 0, "shrinkB": 0},
    )  # fmt: skip
