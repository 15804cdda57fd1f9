"""The figure of a CPU comparison: how many times faster, column by column, and the share of the machine's limit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from dsv3lib.viz.style import PALETTE

COLOURS = {"prefill": PALETTE["content"], "decode": PALETTE["latent"], "train": PALETTE["backward-input"]}


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Write the figure of one results file as SVG or PNG, by the path's ending."""
    columns = results["columns"]
    names = [f"{c['work']}\n{c['context']}" for c in columns]
    machine = results["machine"]
    with plt.rc_context({"svg.hashsalt": "dsv3lib", "font.size": 10}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
        for axes, key in ((left, "ratio"), (right, "share_of_limit")):
            bars = axes.bar(names, [c[key] for c in columns], color=[COLOURS[c["work"]] for c in columns])
            axes.bar_label(bars, [f"{c[key]:.2f}×" if key == "ratio" else f"{c[key]:.0%}" for c in columns])
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_xlabel("work and context (tokens)")
            axes.margins(y=0.12)
        left.axhline(1.0, color=PALETTE["neutral"], linewidth=1)
        left.set(title=f"Speed against transformers {machine['transformers']}", ylabel="times as fast")
        right.set(title="Speed against the machine's limit", ylabel="share of the limit")
        figure.suptitle(f"{machine['cpu']}, {machine['threads']} threads, FP32, {machine['date'][:10]}")
        temporary = path.with_name(f"{path.name}.tmp")
        figure.savefig(
            temporary, format=path.suffix[1:], metadata={"Date": None} if path.suffix == ".svg" else None
        )
        plt.close(figure)
    os.replace(temporary, path)
