"""The figure of a GPU run: each kernel's share of what the machine can do, and how many times faster than peers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from dsv3lib.viz.style import PALETTE

COLOURS = {"fp8": PALETTE["backward-input"], "bf16": PALETTE["content"], "": PALETTE["latent"]}
MEANINGS = {"fp8": "bound by FP8 products", "bf16": "bound by BF16 products", "": "bound by memory"}


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Write the figure of one results file as SVG or PNG, by the path's ending."""
    cases = results["cases"]
    names = [case["name"] for case in cases]
    machine = results["machine"]
    height = 1.6 + 0.3 * len(cases)
    with plt.rc_context({"svg.hashsalt": "dsv3lib", "font.size": 9}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(12, height), sharey=True, layout="constrained")
        places = range(len(cases))
        for kind, meaning in MEANINGS.items():
            chosen = [i for i, case in enumerate(cases) if case["bound_by"] == kind]
            shares = [100 * cases[i]["share_of_limit"] for i in chosen]
            bars = left.barh(chosen, shares, color=COLOURS[kind], label=meaning)
            left.bar_label(bars, [f"{s:.0f} %" for s in shares], padding=2)
        left.set(
            title="Share of the machine's limit", xlabel="percent of the least possible time", xlim=(0, 115)
        )
        left.set_yticks(places, names)
        left.invert_yaxis()
        left.legend(loc="lower right", frameon=False)
        for i, case in enumerate(cases):
            for name, peer in case["peers"].items():
                right.plot(peer["times"], i, "o", color=PALETTE["neutral"])
                right.annotate(f" {name} {peer['times']:.2f}×", (peer["times"], i), va="center", fontsize=7)
        right.axvline(1.0, color=PALETTE["neutral"], linewidth=1)
        right.set(title="Speed against peers in the same run", xlabel="times as fast", xscale="log")
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(
            f"{machine['gpu']}, torch {machine['torch']}, triton {machine['triton']}, {machine['date'][:10]}"
        )
        temporary = path.with_name(f"{path.name}.tmp")
        hidden = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(temporary, format=path.suffix[1:], metadata=hidden)
        plt.close(figure)
    os.replace(temporary, path)
