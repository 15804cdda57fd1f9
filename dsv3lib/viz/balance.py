"""Figures of balancing: before and after, the bias's step, its drift, the ways compared, experts and texts.

Each function draws what it is given and returns the figure, its alt text and its caption.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor

from ..training.loop.comparison import Outcome
from ..training.loop.specialisation import Specialisation
from . import style
from .expert_load import heat_map
from .load_history import relative
from .shades import fan, shades

_WAYS = {"none": "neutral", "sequence": "backward-input", "batch": "rope", "bias": "bias"}
"""Way to balance → meaning. The two losses take colours that stand apart in grey; neither is about RoPE."""
_NAMES = {"none": "nothing", "sequence": "loss, per sequence", "batch": "loss, per batch", "bias": "bias"}


def _plain(meaning: str, **other: Any) -> dict[str, Any]:
    return style.line(meaning) | {"marker": ""} | other


def before_and_after(runs: Mapping[str, Outcome]) -> tuple[Figure, str, str]:
    """Loads of a run's last quarter, without and with the bias, and MaxVio batch by batch.

    Args:
        runs: "none" and "bias".
    """
    config = runs["bias"].model.config
    fig, axes = style.figure(
        "One number per expert, moved by a sign, keeps all of them at work", None, None,
        columns=3, size=(10.4, 3.5), width_ratios=[1, 1, 1.1],
    )  # fmt: skip
    layers = [f"layer {i}" for i in config.moe_layers]
    for ax, way, title in zip(axes, ("none", "bias"), ("no balancing", "with the bias"), strict=False):
        heat_map(ax, relative(runs[way].tail().load.sum(0).numpy()), layers, config.n_group)
        ax.set_title(f"{title}, last quarter", fontsize=11, fontweight="normal")
    for way, label in (("none", "no balancing"), ("bias", "bias")):
        violation = runs[way].batch_violation.mean(1)
        axes[2].plot(
            range(1, len(violation) + 1), violation, **_plain(_WAYS[way], linestyle="-"), label=label
        )
    axes[2].set(xlabel="training step", ylabel="MaxVio of each batch", ylim=(0, 4))
    axes[2].set_yticks(range(5))
    axes[2].legend(loc="upper right", fontsize=9)
    return (
        fig,
        "Two heat maps of layers by experts, and two curves. Without balancing a few experts are dark red and most "
        "dark blue; with the bias all are pale. One curve climbs to the worst value and stays, the other stays below.",
        "Red: more tokens than the mean; blue: fewer. The curves are rougher than the maps, since a batch is small: "
        "the bias levels the long run, not each batch.",
    )


def steps_of_gamma(violations: Mapping[float | int, Sequence[float] | Tensor]) -> tuple[Figure, str, str]:
    """MaxVio while a bias is found on frozen affinities, one panel per γ.

    Args:
        violations: γ → MaxVio of each batch.
    """
    fig, axes = style.figure(
        "A small step settles slowly, a large one swings for ever", None, None,
        columns=len(violations), size=(10.4, 3.0), sharey=True,
    )  # fmt: skip
    for ax, (gamma, row) in zip(axes, violations.items(), strict=True):
        ax.plot(
            range(1, len(row) + 1),
            row,
            **_plain("bias" if gamma else "neutral", linestyle="-", linewidth=1.1),
        )
        ax.set_title(f"γ = {gamma:g}", fontsize=11, fontweight="normal")
        ax.set(xlabel="update", ylim=(0, 3.2))
    axes[0].set_ylabel("MaxVio of the batch")
    return (
        fig,
        "Panels with one curve each, by rising step. Without a step the curve stays high; the smallest step falls "
        "slowly and stays low; larger steps fall at once and then swing, the larger the wider.",
        "The bias can place an expert no finer than γ. Where γ is larger than the differences between tokens, an "
        "expert is chosen by nearly all or by nearly none.",
    )


def drift(bias: Float[np.ndarray, "steps E"], layer: str) -> tuple[Figure, str, str]:
    """A layer's biases over the steps, as they are and with their mean taken off.

    Args:
        bias: after each step. layer: its name.
    """
    fig, axes = style.figure(
        "The biases drift together; only their differences choose", None, None, columns=2, size=(9.6, 3.6)
    )
    steps = range(1, len(bias) + 1)
    mean = bias.mean(-1, keepdims=True)
    for ax, values, title in (
        (axes[0], bias, "as the rule moves them"),
        (axes[1], bias - mean, "their mean taken off"),
    ):
        fan(ax, list(steps), values.T.tolist(), [str(e) for e in range(bias.shape[1])], "bias")
        ax.plot(
            steps, values.mean(-1), color=style.INK, linewidth=2, linestyle=(0, (4, 2)), label="their mean"
        )
        ax.set_title(f"{layer}, {title}", fontsize=11, fontweight="normal")
        ax.set(xlabel="training step", ylabel="bias (added to the affinity)")
        ax.legend(loc="best")
    return (
        fig,
        "Two panels with a curve per expert. Left, as the rule moves the biases: the curves fan out and their dashed "
        "mean leaves zero. Right, with the mean taken off at each step: the same fan around zero.",
        "Numbers at the right name the experts. Which experts a token gets is the same on both sides.",
    )


def ways_compared(rows: Sequence[Mapping[str, Any]]) -> tuple[Figure, str, str]:
    """The recorded study: balance against loss, and what experts tell of the text; each dot is a seed.

    Args:
        rows: of ``studies.read("balance_ways")``.
    """
    fig, (left, right) = style.figure(
        "Balanced in three ways, over seeds", None, None, columns=2, size=(10.4, 4.2), width_ratios=[1.15, 1]
    )
    base = {row["seed"]: row["settled_validation_loss"] for row in rows if row["way"] == "none"}
    kinds = list(dict.fromkeys((row["way"], row.get("alpha")) for row in rows))
    for place, (way, alpha) in enumerate(kinds):
        mine = [r for r in rows if (r["way"], r.get("alpha")) == (way, alpha) and r["seed"] in base]
        label = _NAMES[way] + ("" if alpha is None else f", α = {alpha:g}")
        x = [float(np.mean(r["frozen_violation"])) for r in mine]
        y = [r["settled_validation_loss"] - base[r["seed"]] for r in mine]
        shade = style.colour(_WAYS[way]) if alpha is None else shades(_WAYS[way], 5)[_place(rows, way, alpha)]
        marker = style.STROKES[_WAYS[way]][1]
        look = {"color": shade, "marker": marker, "linestyle": "", "markeredgecolor": style.INK}
        left.plot(x, y, markersize=5, alpha=0.75, **look)
        left.plot([np.mean(x)], [np.mean(y)], markersize=11, label=label, **look)
        bits = [float(np.mean(r["bits"])) for r in mine]
        right.plot(bits, [place] * len(bits), markersize=5, alpha=0.75, **look)
        right.plot([np.mean(bits)], [place], markersize=11, **look)
    left.axhline(0, color=style.INK, linewidth=0.8)
    left.set(
        xlabel="MaxVio of the frozen model, training mixture",
        ylabel="loss, less that of the unbalanced run\n(nats per token)",
    )
    left.set_xlim(0, 3.1)
    left.legend(fontsize=8.5, loc="best")
    right.set_yticks(range(len(kinds)), [_NAMES[w] + ("" if a is None else f", {a:g}") for w, a in kinds])
    right.invert_yaxis()
    right.set(xlabel="a domain tells of the expert (bits)")
    right.set_xlim(0, None)
    return (
        fig,
        "Left, a scatter of runs: MaxVio of the frozen model against the difference in loss; unbalanced runs lie far "
        "right on the zero line, the balanced ones left. Right, a row of dots per way: bits that a domain tells of an "
        "expert.",
        "Small marks are single seeds, large ones their means; loss is compared within a seed. Left is level, lower is "
        "better.",
    )


def _place(rows: Sequence[Mapping[str, Any]], way: str, alpha: float) -> int:
    """Where a strength stands among a way's, as a shade from 4 (weak, light) to 0 (strong, dark)."""
    order = sorted({row["alpha"] for row in rows if row["way"] == way}, reverse=True)
    return order.index(alpha) if len(order) > 1 else 2


def experts_by_domain(
    by_domain: Int[Tensor, "domains E"],
    domains: Sequence[str],
    layer: str,
    test: Specialisation,
    row: int,
    groups: int,
) -> tuple[Figure, str, str]:
    """Who works for which text, and how much of that chance alone would make.

    Args:
        by_domain: visits. domains: their names. layer: its name. test: what the domain tells of the expert, as it
            is and with the domains' names shuffled among the documents. row: the layer's in it. groups: of experts.
    """
    fig, axes = style.figure(
        "Level in the mixture, uneven in each text",
        None,
        None,
        columns=2,
        size=(10.4, 3.8),
        width_ratios=[3, 2],
    )
    heat_map(axes[0], relative(by_domain.numpy()), domains, groups)
    axes[0].set_title(f"{layer}: visits relative to the domain's mean", fontsize=11, fontweight="normal")
    axes[1].hist(
        test.by_chance[:, row].numpy(), bins=25, **style.bar("communication"), label="names shuffled"
    )
    axes[1].axvline(float(test.bits[row]), color=style.colour("bias"), linewidth=2.5, label="as it is")
    axes[1].set(xlabel="what the domain tells of the expert (bits)", ylabel="shuffles", xlim=(0, None))
    axes[1].legend()
    return (
        fig,
        "A heat map of text domains by experts with a pattern that differs from row to row, and a histogram of what "
        "shuffled names give, left of the line that marks the real order.",
        "One frozen model. Each row is one kind of text; the histogram shows how much pattern chance makes when the "
        "same documents get each other's names.",
    )


def bits_by_layer(test: Specialisation, first: int = 1) -> tuple[Figure, str, str]:
    """What the domain of a text tells of the expert, layer by layer, and what chance alone would tell.

    Args:
        test: of ``specialisation_test``. first: the first layer that has experts.
    """
    fig, ax = style.figure(
        "The domain tells of the expert, in every layer",
        "layer",
        "mutual information (bits)",
        size=(7.6, 3.6),
    )
    layers = range(first, first + len(test.bits))
    low, high = (test.by_chance.quantile(share, dim=0).numpy() for share in (0.025, 0.975))
    ax.plot(layers, test.bits.numpy(), **style.line("bias"), label="the domains as they are")
    ax.fill_between(
        layers, low, high, color=style.colour("neutral"), alpha=0.6, label="domains shuffled (95 percent)"
    )
    ax.set_ylim(0, None)
    ax.set_xticks(list(layers))
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, handlelength=3.2, frameon=False)
    return (
        fig,
        "Mutual information against layer: a curve of the real domains, high above a thin band of shuffled ones.",
        "Zero would mean that every domain uses the experts alike.",
    )
