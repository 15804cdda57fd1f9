"""Figures of the latent cache: bytes against context, decode time against context, what a few directions keep.

Each function draws what it is given and returns the figure with its alt text. Alt texts of measured figures
name shapes and order only, because they are compared when a notebook is tested.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from . import style

CONTEXTS = tuple(2**power for power in range(10, 18))
"""1,024 to 131,072 tokens: from a short chat to V3's longest trained context."""

GPU_GIB = 80e9 / 2**30
"""Memory of one H800, the GPU that V3 was trained and served on: 80 GB, in GiB."""

_UNITS = (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
_BACKGROUND = {"boxstyle": "square,pad=0.15", "facecolor": style.PAPER, "edgecolor": "none", "alpha": 0.85}
_MEANINGS = {"MLA": "latent", "expanded": "content", "absorbed": "latent"}


def readable_bytes(count: int) -> str:
    """A count of bytes to three digits: ``8.58 GiB``, ``610 GiB``."""
    for unit, size in _UNITS:
        if count >= size:
            value = count / size
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{count:.0f} B"


def cache_by_context(bytes_per_token: Mapping[str, int], tokens: int) -> tuple[Figure, str, str]:
    """Cached bytes against the context, one line a design, read off at one context.

    Args:
        bytes_per_token: design → bytes over all layers, from the largest to the smallest or in any order.
        tokens: the context that is read off, in tokens.

    Returns:
        The figure, its alt text and its caption.
    """
    fig, ax = style.figure(
        "The cache of one conversation", "context (tokens)", "cache (GiB)", size=(8.6, 4.6)
    )
    _log_tokens(ax, CONTEXTS)
    for name, size in bytes_per_token.items():
        stroke = _stroke(name) | {"marker": ""}
        ax.plot(CONTEXTS, [size * n / 2**30 for n in CONTEXTS], **stroke)
        here = size * tokens / 2**30
        ax.plot([tokens], [here], marker="o", color=stroke["color"], markeredgecolor=style.PAPER)
        weight = "bold" if name == "MLA" else "normal"
        words = {"textcoords": "offset points", "color": stroke["color"], "weight": weight, "fontsize": 10}
        end = (CONTEXTS[-1], size * CONTEXTS[-1] / 2**30)
        ax.annotate(name, end, xytext=(8, 0), va="center", annotation_clip=False, **words)
        # Above a rising line there is room to the left, below it to the right; the lowest is read off below.
        below = size == min(bytes_per_token.values())
        right = tokens < (CONTEXTS[-1] if below else CONTEXTS[2])
        ax.annotate(
            readable_bytes(size * tokens),
            (tokens, here),
            xytext=(7 if right else -7, -15 if below else 7),
            ha="left" if right else "right",
            bbox=_BACKGROUND,
            **words,
        )
    ax.axhline(GPU_GIB, color=style.INK, linewidth=1)
    ax.text(CONTEXTS[0], GPU_GIB * 1.15, "all memory of one 80 GB GPU", fontsize=10)
    ax.axvline(tokens, color=style.INK, linewidth=1, linestyle=(0, (2, 3)))
    ax.set_ylim(0.02, 1500)
    _log_amounts(ax)
    read = ", ".join(f"{name} {readable_bytes(size * tokens)}" for name, size in bytes_per_token.items())
    alt = f"Parallel rising lines on two logarithmic axes. At {tokens:,} tokens: {read}."
    return fig, alt, (
        "All four grow in proportion to the context. What differs is the height: follow each line to where it meets "
        "the memory of one GPU."
    )


def decode_by_context(
    contexts: Sequence[int],
    milliseconds: Mapping[str, Sequence[float]],
    millions: Mapping[str, Sequence[float]],
) -> tuple[Figure, str, str]:
    """One decode step of one layer against the context: measured time beside counted operations.

    Args:
        contexts: cached tokens. milliseconds, millions: form ("expanded", "absorbed") → one value a context,
            times and operations.

    Returns:
        The figure, its alt text and its caption.
    """
    fig, (left, right) = style.figure(
        "One new token in one layer of V3's attention", "cached tokens", None, columns=2, size=(9.0, 4.0)
    )
    panels = (
        (left, milliseconds, "time, measured here (ms)"),
        (right, millions, "operations, counted (millions)"),
    )
    for ax, values, label in panels:
        _log_tokens(ax, contexts)
        _log_amounts(ax)
        ax.set_ylabel(label)
        for form, row in values.items():
            ax.plot(contexts, row, **_stroke(form), label=form)
    left.legend(frameon=False)
    above = all(slow > fast for slow, fast in zip(*milliseconds.values(), strict=True))
    alt = (
        "Two panels on logarithmic axes, measured time and counted operations against cached tokens. The "
        "operations of the expanded form lie far above those of the absorbed one, and the gap widens to the "
        f"right; its time lies above {'everywhere' if above else 'in places only'}."
    )
    return fig, alt, (
        "Left on your machine, right on paper. The absorbed form starts flat: its two matrices cost the same however "
        "many tokens are cached."
    )


def kept_by_directions(
    spectra: Mapping[str, Sequence[float]],
    losses: Mapping[str, Mapping[int, float]],
    floors: Mapping[str, float],
) -> tuple[Figure, str, str]:
    """What a few directions keep of all keys and values: their variance, and the model's loss.

    Args:
        spectra: two of them, name → share of the variance kept by the best 1, 2, 3, … directions, 0 to 1.
        losses: two of them, name → directions kept → loss in nats. floors: name → loss without any cut.

    Returns:
        The figure, its alt text and its caption.
    """
    fig, (left, right) = style.figure(
        "A few directions carry the keys and values", "directions kept", None, columns=2, size=(9.4, 4.6)
    )
    left.set_ylabel("variance kept (percent)")
    for (name, shares), meaning in zip(spectra.items(), ("latent", "neutral"), strict=False):
        stroke = style.line(meaning) | {"marker": ""}
        left.plot(range(1, len(shares) + 1), [100 * share for share in shares], **stroke, label=name)
    left.set_ylim(0, 103)
    right.set_xscale("log", base=2)
    right.set_ylabel("loss on new text (nats per byte)")
    for (name, row), meaning in zip(losses.items(), ("latent", "neutral"), strict=False):
        right.plot(list(row), list(row.values()), **style.line(meaning), label=name)
        right.set_xticks(list(row), [str(rank) for rank in row])
    for (name, loss), dash in zip(floors.items(), ("-", (0, (4, 2))), strict=False):
        right.axhline(loss, color=style.INK, linewidth=1, linestyle=dash, label=name)
    for ax in (left, right):
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, handlelength=3.2, frameon=False)
    alt = (
        f"Left: variance kept against directions kept, a curve for each of {' and '.join(spectra)}; both rise to all "
        f"of it. Right: loss against directions kept, a falling curve for each of {' and '.join(losses)}, and level "
        f"lines for {' and '.join(floors)}."
    )
    return fig, alt, (
        "Left, the steeper a curve, the fewer directions do most of the work. Right, where a curve meets the level "
        "line of the whole model, the directions left out were not needed."
    )


def directions_by_layer(
    directions: Mapping[str, Sequence[float | int]], latent: int, whole: int
) -> tuple[Figure, str, str]:
    """How many directions hold 90 percent of the variance of keys and values, layer by layer.

    Args:
        directions: two of them, name → a number per layer. latent: the latent's width, which no layer can exceed.
        whole: numbers in the keys and values of all heads together.
    """
    fig, ax = style.figure(
        f"{whole} numbers of keys and values, and the directions that they use",
        "layer",
        "directions (90 percent of variance)",
        size=(7.6, 3.8),
    )
    for (name, row), meaning in zip(directions.items(), ("latent", "neutral"), strict=False):
        ax.plot(range(len(row)), row, **style.line(meaning), label=name)
    ax.axhline(
        latent, color=style.INK, linewidth=1, linestyle=(0, (4, 2)), label=f"the latent's width, {latent}"
    )
    ax.set_ylim(0, 1.12 * latent)
    ax.set_xticks(range(len(next(iter(directions.values())))))
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3, handlelength=3.2, frameon=False)
    return (
        fig,
        f"Directions needed against layer, a curve for each of {' and '.join(directions)}, below a level line at the "
        "latent's width.",
        "The level line is what the latent leaves possible. The lower a curve, the fewer directions do the work.",
    )


def loss_by_width(rows: Sequence[Mapping[str, Any]], lengths: Sequence[int]) -> tuple[Figure, str, str]:
    """The recorded study: loss against the width of the latent, each dot a seed, a panel per length of training.

    Args:
        rows: of ``log.read("latent_width")``. lengths: steps of training, a panel each.
    """
    fig, axes = style.figure(
        "The latent's width against the loss, over seeds", "width of the latent (numbers)", None,
        columns=len(lengths), size=(9.6, 3.8), sharey=True, squeeze=False,
    )  # fmt: skip
    axes = axes[0]
    for ax, steps in zip(axes, lengths, strict=True):
        mine = [row for row in rows if row["steps"] == steps and not row["evenly"]]
        widths = sorted({row["rank"] for row in mine})
        for width in widths:
            found = [row["loss"] for row in mine if row["rank"] == width]
            look = {"color": style.colour("latent"), "linestyle": ""}
            ax.plot([width] * len(found), found, marker="o", markersize=5, markerfacecolor="none", **look)
            ax.plot([width], [sum(found) / len(found)], marker="_", markersize=22, markeredgewidth=2.5, **look)
        ax.set_xscale("log", base=2)
        ax.set_xticks(widths, [str(width) for width in widths])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_title(f"{steps} steps", fontsize=11, fontweight="normal")
    axes[0].set_ylabel("loss on new text (nats per byte)")
    return (
        fig,
        "Panels by length of training; in each, dots of single seeds and a bar for their mean above every width of the "
        "latent.",
        "Every dot is one training. Compare the height of the bars with the spread of the dots before you read an "
        "order into them.",
    )


def _stroke(name: str) -> dict[str, Any]:
    return style.line(_MEANINGS.get(name, "neutral"))


def _log_amounts(ax: Axes) -> None:
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    ax.yaxis.set_minor_locator(NullLocator())


def _log_tokens(ax: Axes, contexts: Sequence[int]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(contexts), [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in contexts])
    ax.xaxis.set_minor_locator(NullLocator())
