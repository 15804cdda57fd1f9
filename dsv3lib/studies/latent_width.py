"""Study: the same small model with latents of 2 to 64 numbers, over seeds and for two lengths of training.

    python -m dsv3lib.studies.latent_width            # about seven minutes on one core

The model reads the bytes of Python's help topics. It has two dense layers of four heads, whose keys and values are
128 numbers a token; its hidden state has 64, so a latent of 64 compresses nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..config import ModelConfig
from ..model import DeepSeekV3
from .log import FOLDER, record

STEPS, LONG_STEPS, SEEDS = 240, 720, (1, 2, 3)
RANKS = (2, 4, 8, 16, 32, 64)
LEARNING_RATE, WARMUP, ROWS, LENGTH = 5e-3, 20, 8, 128
_UNSEEN = 8192
"""Bytes at the end of the text that no training reads."""


def read_bytes(device: torch.device | str = "cpu") -> tuple[Int[Tensor, " bytes"], Int[Tensor, "rows 256"]]:
    """The help topics as numbers from 0 to 255: to train on, and the last 8,192 as rows to test on."""
    text = torch.tensor(list("\n".join(topics.values()).encode()), device=device)
    return text[:-_UNSEEN], text[-_UNSEEN:].view(-1, 256)


def reader(rank: int, seed: int, evenly: bool = False) -> DeepSeekV3:
    """A fresh small model with a latent of ``rank`` numbers.

    Args:
        rank: width of the latent. seed: of the weights.
        evenly: scale W^UK and W^UV so that keys and values start as large as with a latent of 8; drawn as usual,
            they grow with the root of the rank.
    """
    config = ModelConfig.preset("nano").replace(
        vocab_size=256, num_hidden_layers=2, first_k_dense_replace=2, num_nextn_predict_layers=0,
        initializer_range=0.05, kv_lora_rank=rank,
    )  # fmt: skip
    model = DeepSeekV3(config, torch.Generator().manual_seed(seed))
    if evenly:
        for layer in model.model.layers:
            layer.self_attn.kv_b_proj.weight.data *= (8 / rank) ** 0.5
    return model


def train(
    model: DeepSeekV3,
    text: Int[Tensor, " bytes"],
    steps: int,
    seed: int,
    on_step: Callable[[], None] = lambda: None,
) -> DeepSeekV3:
    """Train on random pieces of the text; the rate rises for 20 steps and then falls to 0.

    Args:
        model: trained in place, and returned in evaluation mode. text: what it reads. steps: how many.
        seed: of the pieces. on_step: called after each step.
    """
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1, (step + 1) / WARMUP) * (1 - step / steps)
        starts = torch.randint(len(text) - LENGTH, (ROWS, 1), generator=draw)
        batch = text[(starts + torch.arange(LENGTH)).to(text.device)]
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        on_step()
    return model.eval()


def run(rank: int, seed: int, steps: int, evenly: bool = False) -> dict[str, Any]:
    """Train once; the loss on new text in nats a byte, and on as much of the text that was read."""
    text, unseen = read_bytes()
    model = train(reader(rank, seed, evenly), text, steps, seed)
    with torch.no_grad():
        seen = text[:_UNSEEN].view_as(unseen)
        return {"loss": round(model(unseen, labels=unseen).loss.item(), 4),
                "loss_seen": round(model(seen, labels=seen).loss.item(), 4)}  # fmt: skip


def summary(rows: Sequence[Mapping[str, Any]], steps: int, evenly: bool = False) -> dict[int, list[float]]:
    """The recorded losses by width of the latent, a value per seed, in nats per byte.

    Args:
        rows: of ``log.read("latent_width")``. steps: length of training. evenly: see :func:`reader`.
    """
    chosen = [row for row in rows if row["steps"] == steps and row["evenly"] == evenly]
    widths = sorted({row["rank"] for row in chosen})
    return {width: [row["loss"] for row in chosen if row["rank"] == width] for width in widths}


def settings() -> list[dict[str, Any]]:
    """Every run of the study, the short ones first."""
    short = [{"rank": r, "seed": s, "steps": STEPS, "evenly": False} for s in SEEDS for r in RANKS]
    even = [{"rank": 64, "seed": s, "steps": STEPS, "evenly": True} for s in SEEDS]
    long = [{"rank": r, "seed": s, "steps": LONG_STEPS, "evenly": False} for s in SEEDS[:2] for r in (8, 64)]
    return short + even + long


def main() -> None:
    """Run what is missing from the log."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the log")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    record("latent_width", settings(), run, asked.out)


if __name__ == "__main__":
    main()
