"""Figures of long context: the slowed rotary pairs, the attention that is left, what ports lose, costs.

Each function draws what it is given and returns the figure, its alt text and its caption. Those of measured figures
name no measured value, because they are compared when a notebook is tested.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from . import style

Drawn = tuple[Figure, str, str]

_MEANINGS = {"as trained": "neutral", "YaRN": "rope", "interpolation": "content", "NTK-aware": "forward"}


def wavelengths(speeds: Mapping[str, Sequence[float]], trained: int, longest: int) -> Drawn:
    """Tokens in which each pair turns round once, and how many times it was slowed, one line a method.

    Args:
        speeds: method → radians a token of each pair; "as trained" is what the others are compared with.
        trained: tokens of the context trained before. longest: of the one wanted.

    Returns:
        The figure, its alt text and its caption.
    """
    fig, (left, right) = style.figure(
        "Which pairs are slowed, and how much", "pair of rotary dimensions (number)", None, columns=2, size=(10.0, 4.0)
    )
    plain = speeds["as trained"]
    pairs = range(len(plain))
    for name, values in speeds.items():
        look: dict[str, Any] = style.line(_MEANINGS[name]) | {"markersize": 3}
        left.plot(pairs, [2 * math.pi / v for v in values], **look, label=name)
        if name != "as trained":
            right.plot(pairs, [a / b for a, b in zip(plain, values, strict=True)], **look, label=name)
    for length, words, at, align, up in (
        (trained, "trained context", pairs[-1], "right", -12), (longest, "context wanted", 0, "left", 3),
    ):  # fmt: skip
        left.axhline(length, color=style.INK, linewidth=0.8, linestyle=(0, (2, 3)))
        left.annotate(
            f"{words}, {length:,}", (at, length), xytext=(0, up), textcoords="offset points", fontsize=9, ha=align
        )
    left.set(yscale="log", ylabel="one whole turn (tokens)")
    right.set(ylabel="slowed (times)", ylim=(0, None))
    fig.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(speeds), fontsize=9)
    alt = (
        "Two panels against the number of the pair. Left, tokens for one turn on a logarithmic axis: a straight rising "
        "line as trained; YaRN follows it for the first pairs and runs above it, in parallel, for the last; "
        "interpolation runs above it everywhere. Right, how many times each pair is slowed: interpolation the same for "
        "all, YaRN not at all for the first pairs, then a ramp, then as much as interpolation; NTK-aware always more."
    )
    return (
        fig, alt,
        "Above the lower dotted line a pair never turned round while the model was trained: further on it would meet "
        "angles that it has never seen.",
    )  # fmt: skip


def ramp_of(pairs: Sequence[float], factor: float, original: int) -> Drawn:
    """How many times each pair is slowed, for a factor and a trained length.

    Args:
        pairs: how many times each is slowed, 1 to ``factor``. factor: s. original: the trained context, in tokens.
    """
    fig, ax = style.figure(
        f"{original:,} tokens stretched {factor:g} times", "pair of rotary dimensions (number)", "slowed (times)",
        size=(7.4, 3.4),
    )  # fmt: skip
    ax.bar(range(len(pairs)), pairs, **style.bar("rope"))
    ax.set(ylim=(0, 68))
    whole = sum(math.isclose(p, 1) for p in pairs)
    full = sum(math.isclose(p, factor) for p in pairs)
    said = f"{whole} pairs stay as they are, {full} are slowed {factor:g} times."
    return fig, f"A bar for each pair, from 1 up to {factor:g}. {said}", said


def share_of_attention(shares: Mapping[str, Mapping[int, float]]) -> Drawn:
    """Share of attention that one token keeps, against the context, one line a softmax scale.

    Args:
        shares: which scale → context → share.
    """
    fig, ax = style.figure(
        "What one token keeps", "context (tokens)", "its share of attention (percent)", size=(7.6, 3.8)
    )
    looks = ("neutral", "content", "rope")
    for (name, row), meaning in zip(shares.items(), looks, strict=False):
        ax.plot(list(row), [100 * share for share in row.values()], **style.line(meaning), label=name)
    ax.set(xscale="log", ylim=(0, 104))
    ax.set_xticks(list(next(iter(shares.values()))), [f"{n // 1024}K" for n in next(iter(shares.values()))])
    ax.minorticks_off()
    ax.legend()
    alt = "Falling lines from a half at the left: without a temperature the fastest; with its square hardly at all."
    return fig, alt, "The same token with the same lead over the others, in ever more company."


def what_ports_lose(lost: Mapping[str, Sequence[float]], unit: str) -> Drawn:
    """What reading a model with other settings costs, a dot for each seed.

    Args:
        lost: mistake → a difference to the right settings for each seed. unit: of the difference.
    """
    fig, ax = style.figure("Right weights, wrong settings", unit, None, size=(8.6, 3.2))
    for y, values in enumerate(lost.values()):
        look = style.line(("rope", "content", "bias", "forward", "latent")[y % 5]) | {"linestyle": ""}
        ax.plot(values, [y] * len(values), **look, alpha=0.8)
        ax.plot([sum(values) / len(values)], [y], marker="|", markersize=18, color=style.INK)
    ax.axvline(0, color=style.INK, linewidth=1)
    ax.set_xscale("symlog", linthresh=0.01)
    ax.set_xlim(left=min(0.0, *map(min, lost.values())) - 0.002)
    ax.set_xticks([0, 0.01, 0.1, 1], ["0", "0.01", "0.1", "1"])
    ax.minorticks_off()
    ax.set_yticks(range(len(lost)), list(lost))
    ax.set_ylim(len(lost) - 0.5, -0.5)
    alt = f"A row of dots for each of {len(lost)} mistakes, a dot a seed, logarithmic beside zero."
    return fig, alt, "Nothing fails, nothing warns. The axis is logarithmic from 0.01 on; bar: the mean."


def costs(
    contexts: Sequence[int], prefill: Sequence[int | float], rest: Sequence[int | float], decode: Sequence[int | float]
) -> Drawn:
    """Operations of one layer against the context: attention of the prefill, all else of the prefill, one token.

    Args:
        contexts: tokens. prefill: of attention over the whole prompt. rest: of all other products of the layer over it.
        decode: of attention for one more token.
    """
    fig, ax = style.figure("Where MLA ends", "context (tokens)", "operations of one layer", size=(7.6, 4.2))
    for values, meaning, name in (
        (prefill, "latent", "read the prompt: attention"),
        (rest, "neutral", "read the prompt: all other products"),
        (decode, "rope", "write one token: attention"),
    ):  # fmt: skip
        ax.plot(contexts, values, **style.line(meaning), label=name)
    ax.set(xscale="log", yscale="log")
    ax.set_xticks(list(contexts), [f"{n // 1024}K" for n in contexts])
    ax.minorticks_off()
    ax.legend()
    alt = (
        "Three straight lines on logarithmic axes. That of the prompt's attention is twice as steep as the others and "
        "crosses that of the prompt's other products."
    )
    return fig, alt, "Twice the slope is the square: ten times the context, a hundred times the work."
