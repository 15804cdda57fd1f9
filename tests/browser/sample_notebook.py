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
exercise("mla.1")

# %%
def cache_bytes(layers, kv_rank, rope_dim, bytes_per_value):
    ...

cache_bytes = check("mla.1", cache_bytes)

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
solution("mla.1")

# %%
progress()
"""

WRONG = """\
def cache_bytes(layers, kv_rank, rope_dim, bytes_per_value):
    return layers * kv_rank * bytes_per_value

cache_bytes = check("mla.1", cache_bytes)
"""
BROKEN = """\
def cache_bytes(layers, kv_rank, rope_dim, bytes_per_value):
    return layers / 0

cache_bytes = check("mla.1", cache_bytes)
"""
RIGHT = """\
def cache_bytes(layers, kv_rank, rope_dim, bytes_per_value):
    return layers * (kv_rank + rope_dim) * bytes_per_value

cache_bytes = check("mla.1", cache_bytes)
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
