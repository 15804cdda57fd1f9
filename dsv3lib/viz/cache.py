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


def cache_by_context(bytes_per_token: Mapping[str, int], tokens: int) -> tuple[Figure, str]:
    """Cached bytes against the context, one line a design, read off at one context.

    Args:
        bytes_per_token: design → bytes over all layers, from the largest to the smallest or in any order.
        tokens: the context that is read off, in tokens.

    Returns:
        The figure and its alt text.
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
    return fig, f"Parallel rising lines on two logarithmic axes. At {tokens:,} tokens: {read}."


def decode_by_context(
    contexts: Sequence[int],
    milliseconds: Mapping[str, Sequence[float]],
    millions: Mapping[str, Sequence[float]],
) -> tuple[Figure, str]:
    """One decode step of one layer against the context: measured time beside counted operations.

    Args:
        contexts: cached tokens. milliseconds, millions: form ("expanded", "absorbed") → one value a context,
            times and operations.

    Returns:
        The figure and its alt text.
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
    return fig, alt


def kept_by_directions(
    spectra: Mapping[str, Sequence[float]],
    losses: Mapping[str, Mapping[int, float]],
    floors: Mapping[str, float],
) -> tuple[Figure, str]:
    """What a few directions keep of all keys and values: their variance, and the model's loss.

    Args:
        spectra: two of them, name → share of the variance kept by the best 1, 2, 3, … directions, 0 to 1.
        losses: two of them, name → directions kept → loss in nats. floors: name → loss without any cut.

    Returns:
        The figure and its alt text.
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
    first, second = spectra
    faster = sum(spectra[first]) > 1.05 * sum(spectra[second])
    chosen, drawn = (row[sorted(row)[len(row) // 2]] for row in losses.values())
    alt = (
        f"Left: variance kept against directions kept. The curve called {first} rises "
        f"{'faster than' if faster else 'about as fast as'} the one called {second}. Right: loss against "
        f"directions kept. Half-way, {' and '.join(losses)} "
        f"{'lie far apart, the former lower' if drawn > chosen + 0.2 else 'lie close together'}."
    )
    return fig, alt


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
