"""The needle study: a model trained at 128 tokens, read at 2, 4 and 8 times that, before and after an extension.

For each seed one base model is trained on text and needles. Then, for each way to stretch RoPE (YaRN, position
interpolation, NTK-aware, none), it is measured as it is under the stretched configuration, extended in V3's two phases
by a few steps, and measured again: the needle map (depth by length), its control with shuffled keys, questions that
need two needles, and the loss by position.

    python -m dsv3lib.studies.needle_study --out data/studies/needle.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import ModelConfig
from ..files import write_whole
from ..model import DeepSeekV3
from ..training.loop.context_extension import METHODS, extended_config, phases
from . import needle
from .small_models import PEAK_LEARNING_RATE, manual, rows_of, small_config, train

TRAINED, TARGET, FACTOR = 128, 1024, 8.0
LENGTHS = (128, 256, 512, 1024)
DEPTHS = tuple(round(0.05 + 0.1 * step, 2) for step in range(10))
CONTROLS = DEPTHS[::3]
"""Where shuffled keys and linked questions are measured too."""
ROTARY_DIMS = 16
TOKENS_A_STEP = 2048
ANSWER_WEIGHT = 2.0
"""How much an answer counts against a byte of text: there are few of them in a row."""
POSITION_BINS = 16


def base_config() -> ModelConfig:
    """The model that is trained, with the context that it is trained at."""
    return small_config(needle.VOCABULARY, ROTARY_DIMS, max_position_embeddings=TRAINED)


def loss_at(
    text: Tensor, length: int, rows: int, generator: torch.Generator
) -> Callable[[DeepSeekV3, int], Tensor]:
    """The loss of one step: text, and the answers weighed more."""

    def loss_of(model: DeepSeekV3, step: int) -> Tensor:
        ids, is_answer = needle.training_rows(text, rows, length, generator)
        logits, targets = model(ids).logits[:, :-1], ids[:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        return losses.mean() + ANSWER_WEIGHT * losses[is_answer[:, 1:]].mean()

    return loss_of


def measure(model: DeepSeekV3, unseen: Tensor, rows: int, lengths: Sequence[int] = LENGTHS) -> dict[str, Any]:
    """The needle map and all that stands beside it; every model is asked the same."""
    generator = torch.Generator().manual_seed(77)
    found: dict[str, Any] = {"map": {}, "shuffled": {}, "linked": {}}
    for length in lengths:
        row, control, linked = [], [], []
        for depth in DEPTHS:
            asked = needle.prompts(unseen, rows, length, depth, generator)
            row.append(needle.accuracy(model, asked))
            if depth in CONTROLS:
                control.append(needle.accuracy(model, needle.shuffled_keys(asked, generator)))
                both = needle.prompts(unseen, rows, length, depth, generator, linked=True)
                linked.append(needle.accuracy(model, both))
        found["map"][str(length)] = row
        found["shuffled"][str(length)] = sum(control) / len(control)
        found["linked"][str(length)] = sum(linked) / len(linked)
    plain = rows_of(unseen, max(2, rows // 2), lengths[-1], torch.Generator().manual_seed(78))
    found["loss_by_position"] = needle.loss_by_position(model, plain, POSITION_BINS)
    return found


def with_config(model: DeepSeekV3, method: str) -> DeepSeekV3:
    """The same weights under a stretched configuration."""
    stretched = DeepSeekV3(extended_config(model.config, method, TRAINED, TARGET, FACTOR))
    stretched.load_state_dict(model.state_dict())
    return stretched.eval()


def run_seed(seed: int, steps: int, extension_steps: int, rows: int) -> dict[str, Any]:
    """Train, stretch, measure, extend, measure again."""
    started = time.process_time()
    text, unseen = manual()
    base = DeepSeekV3(base_config(), torch.Generator().manual_seed(seed))
    batch = TOKENS_A_STEP // TRAINED
    losses = loss_at(text, TRAINED, batch, torch.Generator().manual_seed(100 + seed))
    for step, loss in enumerate(train(base, steps, losses), start=1):
        if step % 100 == 0:
            print(f"seed {seed}, step {step} of {steps}: loss {loss:.2f}", flush=True)
    found: dict[str, Any] = {"seed": seed, "methods": {}}
    found["trained"] = measure(base, unseen, rows, lengths=(TRAINED,))
    for method in METHODS:
        model = with_config(base, method)
        before = measure(model, unseen, rows)
        for phase in phases(TRAINED, TARGET, extension_steps, TOKENS_A_STEP):
            losses = loss_at(text, phase.length, phase.batch_size, torch.Generator().manual_seed(200 + seed))
            for _ in train(model, phase.steps, losses, peak=PEAK_LEARNING_RATE / 10, constant=True):
                pass
        found["methods"][method] = {"before": before, "after": measure(model, unseen, rows)}
    found["seconds"] = time.process_time() - started
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study, or go on with it: what the file holds already is not trained again."""
    parser = argparse.ArgumentParser(description="The needle map before and after a context extension.")
    parser.add_argument("--out", type=Path, default=Path("data/studies/needle.json"))
    parser.add_argument("--steps", type=int, default=1000, help="of the base model")
    parser.add_argument("--extension-steps", type=int, default=30, help="of each of the two phases")
    parser.add_argument("--rows", type=int, default=12, help="prompts for each cell of the map")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # for so small a model, sharing the work costs more than it saves
    settings = {"steps": args.steps, "extension_steps": args.extension_steps, "rows": args.rows}
    record = json.loads(args.out.read_text()) if args.out.exists() else {**settings, "depths": DEPTHS, "seeds": []}
    if any(record[name] != value for name, value in settings.items()):
        parser.error(f"{settings}: {args.out} was made with other settings; name another file")
    done = {one["seed"] for one in record["seeds"]}
    for seed in args.seeds:
        if seed not in done:
            record["seeds"].append(run_seed(seed, args.steps, args.extension_steps, args.rows))
            write_whole(args.out, json.dumps(record, indent=1) + "\n")
            print(seed, {name: one["after"]["map"] for name, one in record["seeds"][-1]["methods"].items()})


if __name__ == "__main__":
    main()
