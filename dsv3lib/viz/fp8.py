"""FP8's figures: a format on a number line, error maps, outliers, sums of many terms, losses with their band.

Each function returns (figure, alt text, caption), as ``style.show`` takes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from dsv3lib.fp8 import formats
from dsv3lib.fp8.effect import relative_error
from dsv3lib.fp8.operands import along_rows, restored
from dsv3lib.viz import style

Shown = tuple[Figure, str, str]

SCALINGS = ("one scale per tensor", "one per row", "one per tile")
LOOKS = dict(zip(SCALINGS, ("backward-input", "rope", "forward"), strict=True))
WORST_SHOWN = 1.0  # of a relative error: beyond, a value has lost everything


def number_line(format: formats.FloatFormat = formats.E4M3, upto: float = 4.0) -> Shown:
    """Every value of a format: all of them by the powers of two, and those near zero as they lie.

    Args:
        format: whose values. upto: end of the second line.
    """
    values = formats.values(format)
    fig, axes = style.figure(
        f"Every value of {format.name}: {len(values)} sizes, as many in each doubling", None, None,
        rows=2, size=(9.0, 3.4),
    )  # fmt: skip
    subnormal = values < format.smallest_normal
    for ax, shown in ((axes[0], values > 0), (axes[1], values <= upto)):
        for part, meaning in ((shown & ~subnormal, "content"), (shown & subnormal, "backward-input")):
            ax.vlines(values[part].numpy(), 0, 1, color=style.colour(meaning), linewidth=1.0)
        ax.set_yticks([])
        ax.grid(visible=False)
        ax.spines["left"].set_visible(False)
    axes[0].set_xscale("log", base=2)
    axes[0].set_xlabel("value, each mark a doubling apart (sizes above 0)")
    axes[1].set_xlabel(f"the same values from 0 to {upto:g}, as they lie")
    alt = (
        f"Two rows of strokes. Above, on a scale of doublings, {2**format.mantissa_bits} strokes in each doubling up "
        f"to {format.largest:g}, and fewer below {format.smallest_normal:g}. Below, from 0 to {upto:g}: dense near "
        "zero, twice as far apart after each power of two."
    )
    return (
        fig,
        alt,
        "Red: subnormal, where the steps stop shrinking. What is smaller than half the first stroke is 0.",
    )


def error_maps(x: Float[Tensor, "T K"], errors: Mapping[str, Float[Tensor, "T K"]]) -> Shown:
    """Relative error of each value of an activation, under several scalings, beside the activation itself.

    Args:
        x: the activation. errors: title -> |x' - x| / |x|.
    """
    fig, axes = style.figure(
        "The same activation, scaled three ways: what is left of its small values", None, None,
        columns=1 + len(errors), size=(11.0, 3.6), sharey=True,
    )  # fmt: skip
    sizes = x.abs().clamp(min=1e-9).log10()
    low = float(sizes.quantile(0.01))
    image = axes[0].imshow(
        sizes.numpy(), aspect="auto", cmap=style.SEQUENTIAL, vmin=low, interpolation="nearest"
    )
    axes[0].set(title="size of x", xlabel="channel", ylabel="token")
    fig.colorbar(image, ax=axes[0], label="log10 |x|", location="bottom", shrink=0.9)
    for ax, (title, error) in zip(axes[1:], errors.items(), strict=True):
        shown = error.clamp(max=WORST_SHOWN)
        image = ax.imshow(
            shown.numpy(),
            aspect="auto",
            cmap=style.SEQUENTIAL,
            vmin=0,
            vmax=WORST_SHOWN,
            interpolation="nearest",
        )
        ax.set(title=title, xlabel="channel")
    fig.colorbar(
        image, ax=list(axes[1:]), label="relative error (1: all is lost)", location="bottom", shrink=0.6
    )
    for ax in axes:
        ax.grid(visible=False)
        ax.title.set_fontsize(11)
        for edge in range(128, x.shape[1], 128):
            ax.axvline(edge - 0.5, color=style.PAPER, linewidth=0.6, linestyle=":")
    alt = (
        "Four maps of tokens by channels. The first shows the sizes, with few very large values. In the map of one "
        "scale per tensor most is bright, that is, lost; per row the rows with a large value are; per tile only the "
        "128 channels around each large value are, and all else is dark."
    )
    return fig, alt, "Bright is lost. A scale is as good as the largest value that it has to serve is small."


def outlier_errors(
    sizes: Sequence[float], curves: Mapping[str, Sequence[float]], at: float | None = None
) -> Shown:
    """Error of all other values against the size of one outlier.

    Args:
        sizes: of the outlier, in times the typical value. curves: scaling -> error in per cent. at: marked size.
    """
    fig, ax = style.figure(
        "One outlier, and what it costs all the others", "size of the outlier (typical values = 1)",
        "error of the other values (%)",
    )  # fmt: skip
    for name, ys in curves.items():
        look = style.line(LOOKS[name]) | {"marker": ""}
        ax.plot(sizes, [max(y, 1e-3) for y in ys], **look, label=name)
        if at is not None:
            nearest = min(range(len(sizes)), key=lambda i: abs(sizes[i] - at))
            ax.plot([sizes[nearest]], [max(ys[nearest], 1e-3)], marker="o", color=look["color"], linestyle="")
    if at is not None:
        ax.axvline(at, color=style.colour("neutral"), linewidth=1.0, linestyle=":")
    ax.set(xscale="log", yscale="log", ylim=(1, 150))
    ax.set_yticks([1, 3, 10, 30, 100], ["1", "3", "10", "30", "100"])
    ax.legend(loc="upper left")
    alt = (
        "Three lines of error against the outlier's size, all near 3 per cent on the left. One scale per tensor and "
        "one per row climb to 100 per cent as the outlier grows; one per tile climbs far less."
    )
    return (
        fig,
        alt,
        "E4M3 reaches over five powers of ten, so nothing happens for long; then everything at once.",
    )


def error_against_k(ks: Sequence[int], curves: Mapping[str, Sequence[float]]) -> Shown:
    """Largest error of a sum of K products by accumulator, on doubly logarithmic axes.

    Args:
        ks: lengths of the sum. curves: label -> error relative to the sum of sizes.
    """
    fig, ax = style.figure(
        "A short accumulator loses more the longer it sums", "K (products in a sum)",
        "largest error (%)",
    )  # fmt: skip
    looks = ("backward-input", "rope", "forward", "content", "bias", "neutral", "latent")
    for (label, ys), meaning in zip(curves.items(), looks, strict=False):
        ax.plot(ks, [100 * max(y, 1e-12) for y in ys], **style.line(meaning), label=label)
    ax.axhline(2, color=style.INK, linewidth=0.8, linestyle=":")
    ax.annotate("2 %, the paper's figure at K = 4096", (ks[0], 2.2), fontsize=9)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(list(ks), [str(k) for k in ks])
    ax.legend(fontsize=9)
    alt = (
        "Lines of the largest error against the length of the sum. Without promotion they rise, the one with 14 bits "
        "to a few per cent, each with more bits below it; with promotion every 128 elements the line stays flat."
    )
    return (
        fig,
        alt,
        "Each further bit halves it. Promotion does what a dozen more bits would do, for one addition in 128.",
    )


def losses_with_band(results: Mapping[str, Any], part: str = "runs") -> Shown:
    """Run against run: relative loss error of each arm, its mean over seeds and its 95 % interval.

    Args:
        results: of ``benchmarks/fp8_loss.py``. part: which runs.
    """
    summary = {arm: s for arm, s in results[part]["summary"].items() if "mean" in s}
    claim = 100 * results["about"]["claim"]
    order = [
        a for a in ("jitter", "tile", "tile+block_gradients", "tensor", "two bits", "one bit") if a in summary
    ]
    fig, ax = style.figure(
        "Loss of each recipe against its FP32 twin, over seeds",
        "relative loss error (%)",
        None,
        size=(8.0, 3.6),
    )
    ax.axvspan(-claim, claim, color=style.colour("communication"), alpha=0.4, linewidth=0)
    runs = results[part]["losses"]
    for y, arm in enumerate(reversed(order)):
        one = summary[arm]
        meaning = "neutral" if arm == "jitter" else "forward" if arm == "tile" else "backward-input"
        points = [100 * relative_error(s[arm], s["fp32"]) for s in runs.values() if arm in s and "fp32" in s]
        ax.plot(points, [y + 0.18] * len(points), ".", color=style.colour(meaning), alpha=0.45, markersize=5)
        mean, low, high = (100 * one[key] for key in ("mean", "low", "high"))
        ax.errorbar(
            mean, y, xerr=[[mean - low], [high - mean]], color=style.colour(meaning), capsize=4, fmt="o"
        )
    ax.axvline(0, color=style.INK, linewidth=0.8)
    ax.set_yticks(range(len(order)), list(reversed(order)))
    alt = (
        "A row for each recipe with one point per seed, their mean and an interval, beside a shaded band of the "
        f"paper's ±{claim:g} per cent. The control without any FP8 scatters as the recipes do."
    )
    return (
        fig,
        alt,
        "The jittered control has no FP8 in it at all: what scatters as widely as that says nothing of FP8.",
    )


def along_the_run(rows: Sequence[Mapping[str, Any]], arms: Sequence[str], claim: float) -> Shown:
    """On a run's own weights: loss error and angle of the gradient by recipe, step by step.

    Args:
        rows: ``weights`` of ``benchmarks/fp8_loss.py``. arms: the recipes to show. claim: the paper's bound.
    """
    fig, axes = style.figure(
        "Same weights, same batch: what each recipe alone changes", None, None, columns=2, size=(10.5, 3.8)
    )
    looks = dict(zip(arms, ("forward", "rope", "bias", "backward-input", "latent"), strict=False))
    steps = [row["step"] for row in rows]
    for arm, meaning in looks.items():
        look = style.line(meaning) | {"linewidth": 1.4, "markersize": 3}
        axes[0].plot(steps, [100 * abs(r["effects"][arm]["loss_error"]) for r in rows], **look, label=arm)
        axes[1].plot(steps, [1 - r["effects"][arm]["cosine"]["experts"] for r in rows], **look, label=arm)
    axes[0].axhline(100 * claim, color=style.INK, linewidth=0.8, linestyle=":")
    axes[0].annotate(f"{100 * claim:g} %, the paper's bound", (steps[0], 110 * claim), fontsize=9)
    axes[0].set(xlabel="training step", ylabel="|relative loss error| (%)", yscale="log")
    axes[1].set(xlabel="training step", ylabel="1 - cosine of the experts' gradient", yscale="log")
    fig.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=len(arms), fontsize=9)
    alt = (
        "Two panels against the training step. Left, the loss errors jump about; those of one and two bits pass the "
        "paper's bound now and then. Right, the angle between gradients: fewer bits lie clearly above the paper's own."
    )
    return (
        fig,
        alt,
        "The loss of one batch notices two bits of mantissa now and then; the gradient does at every step.",
    )


def bytes_by_part(counted: Mapping[str, Mapping[str, int]]) -> Shown:
    """Bytes kept for the backward pass, by part, one bar a precision.

    Args:
        counted: precision -> part -> bytes.
    """
    parts = list(next(iter(counted.values())))
    fig, ax = style.figure("Kept for the backward pass, by part", None, "MiB", size=(8.5, 3.8))
    looks = ("neutral", "content", "forward", "rope")
    width = 0.8 / len(counted)
    for i, ((name, sizes), meaning) in enumerate(zip(counted.items(), looks, strict=False)):
        at = [p + (i - (len(counted) - 1) / 2) * width for p in range(len(parts))]
        ax.bar(at, [sizes.get(p, 0) / 2**20 for p in parts], width, **style.bar(meaning), label=name)
    ax.set_xticks(range(len(parts)), parts)
    ax.legend()
    alt = "Groups of bars by part of the model, one bar a precision: FP32 the tallest, FP8 the lowest at the linears."
    return (
        fig,
        alt,
        "FP8 saves where linear layers keep their inputs; norms and attention's core keep theirs as they were.",
    )


def maps_of(x: Float[Tensor, "T K"]) -> dict[str, Tensor]:
    """Relative error of each value of x under the three scalings.

    Args:
        x: FP32; K divides by 128.
    """
    row = x.abs().amax(1, keepdim=True) / formats.E4M3.largest
    per_row = (x / row).to(torch.float8_e4m3fn).float() * row
    backs = (restored(along_rows(x, "tensor")), per_row, restored(along_rows(x)))
    return {
        name: (back - x).abs() / x.abs().clamp(min=1e-12) for name, back in zip(SCALINGS, backs, strict=True)
    }
