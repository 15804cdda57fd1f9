"""The map: where a model's parameters are, and where a token's operations go.

``python -m dsv3lib.viz.model_map data/figures/v3_map.svg`` draws the picture of the README.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure

from ..config import ModelConfig
from ..model import DeepSeekV3
from ..model.costs import forward_flops
from . import style

PARTS = {
    "routed_experts": "routed experts",
    "shared_experts": "shared experts",
    "router": "router",
    "dense": "dense networks",
    "attention": "attention, projections",
    "attention_core": "attention, scores and values",
    "embedding": "embedding",
    "head": "output head",
}
"""Key → name, in the order of the bars."""

FILLS = {
    "routed_experts": ("#1d2f5f", ""),
    "shared_experts": ("#4f6ea8", ".."),
    "router": ("#ffffff", ""),
    "dense": ("#a9bfe0", "//"),
    "attention": ("#a85a16", "\\\\"),
    "attention_core": ("#f2c98a", ""),
    "embedding": ("#e3e1dc", "oo"),
    "head": ("#8a8782", "xx"),
}
"""Key → colour and hatch. Parts are no meanings of the palette: feed-forward networks are blue, attention brown, the
ends grey; neighbours differ in lightness or in hatch, so that a grey print tells them apart."""


def parts(config: ModelConfig, context: int) -> tuple[dict[str, int], dict[str, int]]:
    """Parameters and forward operations of the main model by part.

    Args:
        config: sizes; 671B is counted on the meta device, where tensors have shapes and no memory.
        context: tokens that the counted token attends to.

    Returns:
        Parameters, and operations per token; parts that have none are left out. Norms (0.0002 % of V3) and
        MTP modules are not on the map.
    """
    counts, flops = _parameters(config), forward_flops(config, context)
    return {k: counts[k] for k in PARTS if counts.get(k)}, {k: flops[k] for k in PARTS if flops.get(k)}


@functools.lru_cache  # a slider asks again and again
def _parameters(config: ModelConfig) -> dict[str, int]:
    with torch.device("meta"):
        return DeepSeekV3(config).parameter_counts()


def model_map(configs: Mapping[str, ModelConfig], context: int = 4096) -> tuple[Figure, str, str]:
    """Two bars a model, parameters above operations, each divided by part.

    Args:
        configs: name → configuration. context: tokens that the counted token attends to.

    Returns:
        The figure, its alt text and its caption.
    """
    fig, ax = style.figure(
        title="Almost all parameters are experts; a token meets few of them",
        xlabel="share of the bar's total (percent)", ylabel=None, size=(9.0, 1.4 + 1.15 * len(configs)),
    )  # fmt: skip
    labels, rows = [], []
    for number, (name, config) in enumerate(configs.items()):
        parameters, flops = parts(config, context)
        rows += [(2.5 * number, parameters), (2.5 * number + 1, flops)]
        labels += [
            f"{name}\n{_short(sum(parameters.values()))} parameters",
            f"{_short(sum(flops.values()))} operations\nper token",
        ]
    drawn = set()
    for y, values in rows:
        left, total = 0.0, sum(values.values())
        for part, value in values.items():
            width = 100 * value / total
            label = PARTS[part] if part not in drawn else None
            fill, hatch = FILLS[part]
            ax.barh(
                y, width, left=left, height=0.8, facecolor=fill, hatch=hatch, edgecolor=style.INK,
                linewidth=0.5, label=label,
            )  # fmt: skip
            drawn.add(part)
            if width >= 4:
                under = {"facecolor": style.PAPER, "edgecolor": "none", "pad": 1.2}
                ax.text(
                    left + width / 2, y, f"{width:.0f}", ha="center", va="center", fontsize=10, bbox=under
                )
            left += width
    ax.set_yticks([y for y, _ in rows], labels)
    ax.set_xlim(0, 100)
    ax.invert_yaxis()
    ax.grid(False)
    fig.legend(*_in_order(ax), loc="outside lower center", ncols=4)
    stories = []
    for name, ((_, parameters), (_, flops)) in zip(
        configs, zip(rows[::2], rows[1::2], strict=True), strict=True
    ):
        shares = [100 * v.get("routed_experts", 0) / sum(v.values()) for v in (parameters, flops)]
        stories.append(
            f"in {name}, routed experts hold {shares[0]:.0f} % of the first and {shares[1]:.0f} % of the second"
        )
    alt = (
        "Two bars a model, parameters above operations per token, each divided by part: "
        + "; ".join(stories)
        + "."
    )
    caption = (
        "Compare the two bars of a model: what fills the upper one is not what fills the lower one. Numbers are "
        f"percent; a token looks back on {context:,} tokens."
    )
    return fig, alt, caption


def _in_order(ax: matplotlib.axes.Axes) -> tuple[list, list[str]]:
    """Legend entries in the order of PARTS."""
    handles = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    names = [name for name in PARTS.values() if name in handles]
    return [handles[name] for name in names], names


def _short(count: int) -> str:
    """A count in engineering notation: 671.0B, 4.9M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)


def save_readme_picture(path: Path) -> None:
    """Draw V3 beside the tiny preset as an SVG, the same bytes every time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    configs = {"DeepSeek-V3": ModelConfig.preset("v3-671b"), "tiny": ModelConfig.preset("tiny")}
    # The whole drawing stands under the course's style: whatever else set matplotlib up before does not show.
    with matplotlib.rc_context({**style.rc(), "svg.hashsalt": "dsv3lib"}):
        fig, *_ = model_map(configs)
        fig.savefig(path, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    save_readme_picture(Path(sys.argv[1]))
