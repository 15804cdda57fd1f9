"""A small lesson that has one of everything a learner can touch, for the browser to drive."""

from __future__ import annotations

from pathlib import Path

from dsv3lib.course import pairing

SOURCE = """\
# %% [markdown]
# # A small lesson

# %%
from dsv3lib.course import check, exercise, measured, predict, progress, reveal, setup, solution
session = setup(seed=1, device="cpu")

# %%
predict("mla.p1", "What happens to the scores?", options=["they grow", "they stay", "they shrink"])

# %%
reveal("mla.p1", "they stay", because="The products are reordered.")

# %%
predict("mla.p2", "How many KiB a token?", number=(1, 10_000, "KiB"))

# %%
reveal("mla.p2", 68.6, unit="KiB")

# %%
exercise("start.1")

# %%
def expert_parameters(hidden_size, intermediate_size):
    ...

expert_parameters = check("start.1", expert_parameters)

# %%
from dsv3lib.viz import style
from dsv3lib.viz.live import live

def draw(heads):
    fig, ax = style.figure("Cache per token and layer", "context (tokens)", "cache (KiB)")
    ax.plot([0, 4096], [0, 2621 * heads], **style.line("content"), label=f"MHA, {heads} heads")
    ax.plot([0, 4096], [0, 4718], **style.line("latent"), label="MLA")
    ax.legend()
    return fig, f"Two straight lines from zero; MHA has {heads} heads."

live(draw, heads=[1, 2, 4, 8], start={"heads": 2}, labels={"heads": "heads of MHA"})

# %%
solution("start.1")

# %%
progress()
"""

WRONG = """\
def expert_parameters(hidden_size, intermediate_size):
    return 2 * hidden_size * intermediate_size

expert_parameters = check("start.1", expert_parameters)
"""
BROKEN = """\
def expert_parameters(hidden_size, intermediate_size):
    return hidden_size / 0

expert_parameters = check("start.1", expert_parameters)
"""
RIGHT = """\
def expert_parameters(hidden_size, intermediate_size):
    return 3 * hidden_size * intermediate_size

expert_parameters = check("start.1", expert_parameters)
"""


def write_sample(root: Path) -> str:
    """Write the small lesson, not executed, under ``root``; return its path from there."""
    source = root / "source" / "00_small.py"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(SOURCE, encoding="utf-8")
    book = pairing.read_source(source)
    pairing.carry_ids(book, None, "00_small")
    pairing.write_notebook(book, root / "00_small.ipynb")
    return "00_small.ipynb"
