"""The figure of speculation: speed-up against the number of drafts, measured and predicted, by domain."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from dsv3lib.viz.style import PALETTE


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Write the figure of one results file as SVG or PNG, by the path's ending."""
    machine, groups = results["machine"], results["by_domain"]
    temperatures = sorted({group["temperature"] for group in groups})
    colours = [PALETTE[name] for name in ("content", "backward-input", "forward", "bias", "rope", "latent", "neutral")]
    with plt.rc_context({"svg.hashsalt": "dsv3lib", "font.size": 10}):
        figure, axes = plt.subplots(
            1, len(temperatures), figsize=(5.5 * len(temperatures), 4.4), layout="constrained", sharey=True,
            squeeze=False,
        )  # fmt: skip
        for ax, temperature in zip(axes[0], temperatures, strict=True):
            here = [group for group in groups if group["temperature"] == temperature]
            for group, colour in zip(here, colours, strict=False):
                ways = [way for way in group["ways"] if way["way"].isdigit()]
                drafts = [0, *(int(way["way"]) for way in ways)]
                ax.plot(drafts, [1, *(w["speedup"] for w in ways)], "o-", color=colour, label=group["domain"])
                ax.plot(drafts, [1, *(w["predicted"] for w in ways)], "x:", color=colour)
            ax.axhline(1.0, color=PALETTE["neutral"], linewidth=1)
            ax.set_xticks(range(4))
            ax.set(title="greedy" if temperature == 0 else f"temperature {temperature:g}", xlabel="drafts a round")
            ax.spines[["top", "right"]].set_visible(False)
        axes[0][0].set_ylabel("times plain decoding's tokens a second")
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", frameon=False,
                      title="measured;\ndotted: predicted")  # fmt: skip
        figure.suptitle(
            f"{results['model']}, MTP chain, batch 1: {machine['cpu']}, {machine['threads']} threads, "
            f"{machine['date'][:10]}"
        )
        temporary = path.with_name(f"{path.name}.tmp")
        figure.savefig(
            temporary, format=path.suffix[1:], metadata={"Date": None} if path.suffix == ".svg" else None
        )
        plt.close(figure)
    os.replace(temporary, path)
