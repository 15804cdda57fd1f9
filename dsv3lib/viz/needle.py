"""The needle map, depth by length, for each way to stretch RoPE; and the loss by position beside it.

Each function draws what it is given and returns the figure, its alt text and its caption, which name no measured value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from . import style

Drawn = tuple[Figure, str, str]
Map = Mapping[str, Sequence[float]]

MEANINGS = {"yarn": "rope", "interpolation": "content", "ntk": "forward", "none": "neutral"}
_SAID = {"yarn": "YaRN", "interpolation": "interpolation", "ntk": "NTK-aware", "none": "no change"}


def mean_map(maps: Sequence[Map]) -> dict[str, list[float]]:
    """The mean over seeds of needle maps: length → share of right answers at each depth."""
    lengths = list(maps[0])
    return {
        length: [sum(column) / len(column) for column in zip(*(one[length] for one in maps), strict=True)]
        for length in lengths
    }


def needle_maps(
    before: Mapping[str, Map], after: Mapping[str, Map], depths: Sequence[float], unseen: Sequence[bool]
) -> Drawn:
    """Heat maps of depth by length, one column a method, before and after the extension.

    Args:
        before, after: method → length → share of right answers at each depth. depths: as shares of the row.
        unseen: for each depth whether training had no needle there; marked by a bar at the edge.

    Returns:
        The figure, its alt text and its caption.
    """
    fig, axes = style.figure(
        "The needle, by depth and length", None, None, rows=2, columns=len(before), size=(9.6, 5.6),
        sharex=True, sharey=True,
    )  # fmt: skip
    for row, (when, maps) in zip(axes, (("before", before), ("after", after)), strict=True):
        for ax, (method, found) in zip(row, maps.items(), strict=True):
            picture = ax.imshow(
                [[100 * found[length][i] for length in found] for i in range(len(depths))],
                cmap=style.SEQUENTIAL, vmin=0, vmax=100, aspect="auto",
            )  # fmt: skip
            ax.grid(False)
            ax.set_title(f"{_SAID.get(method, method)}, {when}", fontsize=10, fontweight="normal")
            ax.set_xticks(range(len(found)), list(found))
            ax.set_yticks(range(len(depths)), [f"{100 * depth:.0f}" for depth in depths], fontsize=8)
            for i, new in enumerate(unseen):
                if new:
                    ax.plot([-0.5, -0.5], [i - 0.45, i + 0.45], color=style.colour("backward-input"), linewidth=6)
    for ax in axes[-1]:
        ax.set_xlabel("length (tokens)")
    for row in axes:
        row[0].set_ylabel("depth (percent)")
    fig.colorbar(picture, ax=axes, shrink=0.7).set_label("right answers (percent)")
    alt = (
        "Two rows of heat maps, before and after the extension, one column a way to stretch the positions. In each "
        "the length grows to the right and the needle's depth downwards; bright cells are right answers. Marks at "
        "the left edge are depths at which training had no needle."
    )
    return fig, alt, "Bright is found. A mark at the left: no needle stood at that depth in training."


def loss_by_position(curves: Mapping[str, Sequence[Sequence[float]]], trained: int, longest: int, when: str) -> Drawn:
    """Loss of text against the position, one band a method, over the trained length and beyond.

    Args:
        curves: method → one curve a seed, of equal parts of a row. trained: the length trained before.
        longest: tokens of a row. when: "before" or "after" the extension.

    Returns:
        The figure, its alt text and its caption.
    """
    fig, ax = style.figure(
        f"Loss by position, {when} the extension", "position (tokens)", "loss on new text (nats a byte)",
        size=(8.6, 4.2),
    )  # fmt: skip
    for method, seeds in curves.items():
        places = [(i + 0.5) * longest / len(seeds[0]) for i in range(len(seeds[0]))]
        stroke: dict[str, Any] = style.line(MEANINGS[method])
        columns = list(zip(*seeds, strict=True))
        ax.plot(places, [sum(c) / len(c) for c in columns], **stroke, label=_SAID[method])
        ax.fill_between(places, list(map(min, columns)), list(map(max, columns)), color=stroke["color"], alpha=0.2)
    ax.axvline(trained, color=style.INK, linewidth=1, linestyle=(0, (2, 3)))
    ax.annotate("trained to here", (trained, 1), xycoords=("data", "axes fraction"), xytext=(4, -10),
                textcoords="offset points", fontsize=9)  # fmt: skip
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4, handlelength=3.2, frameon=False)
    alt = (
        "Loss against the position in a long row, one band a way to stretch the positions; a dashed line marks the "
        "length that was trained before."
    )
    return fig, alt, "To the right of the dashed line are positions that the model had never seen before the extension."
