"""Many lines of one meaning, told apart: shades from dark to light, and the line's name at its end."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb

from . import style

_DARKEST, _LIGHTEST = 0.62, 0.45
"""How far the ends are mixed with ink and with paper."""
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1)))
_CLOSEST = 0.062
"""Smallest distance of two names, as a share of the panel's height."""


def shades(meaning: str, count: int) -> list[str]:
    """Colours of one meaning, from dark to light; the palette's own lies in the middle.

    Args:
        meaning: of the palette. count: how many.
    """
    own, ink, paper = (to_rgb(c) for c in (style.colour(meaning), style.INK, style.PAPER))
    made = []
    for i in range(count):
        place = 2 * i / (count - 1) - 1 if count > 1 else 0.0
        other, share = (ink, -place * _DARKEST) if place < 0 else (paper, place * _LIGHTEST)
        made.append(to_hex([(1 - share) * a + share * b for a, b in zip(own, other, strict=True)]))
    return made


def fan(
    ax: Axes, x: Sequence[float | int], lines: Sequence[Sequence[float]], names: Sequence[str], meaning: str
) -> None:
    """Draw lines of one meaning, ordered by where they end: shade, dash and a name at the end tell them apart.

    Args:
        ax: a panel whose limits of y may be set here. x: of every line. lines: values. names: of the lines.
        meaning: of the palette.
    """
    order = sorted(range(len(lines)), key=lambda i: lines[i][-1])
    for place, (i, colour) in enumerate(zip(order, shades(meaning, len(order)), strict=True)):
        ax.plot(x, lines[i], color=colour, linestyle=_DASHES[place % len(_DASHES)], linewidth=1.5)
    low, high = ax.get_ylim()
    least = _CLOSEST * (high - low)
    heights = spread([lines[i][-1] for i in order], least)
    for i, y in zip(order, heights, strict=True):
        ax.annotate(
            names[i], (x[-1], lines[i][-1]), xytext=(1.02, (y - low) / (high - low)),
            textcoords="axes fraction", va="center", fontsize=8.5, annotation_clip=False,
        )  # fmt: skip


def spread(values: Sequence[float], least: float) -> list[float]:
    """Rising values moved as little as is simple, until neighbours are ``least`` apart."""
    placed = list(values)
    for _ in range(len(placed) * 4):
        for i in range(1, len(placed)):
            short = least - (placed[i] - placed[i - 1])
            if short > 1e-12:
                placed[i - 1] -= short / 2
                placed[i] += short / 2
    return placed
