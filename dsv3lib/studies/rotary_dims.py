"""How large must the decoupled part be? Small models with 0, 8, 16 and 32 rotary dimensions, several seeds each.

Half of the training rows are text. The other half are a copying task: the row's first byte names one of four
distances, and every later byte equals the one that stands so far before it. To copy, attention must find one exact
place among all before; content cannot help, for the letters are random. Measured afterwards, on rows never seen:

- the loss on text by position in the row: what is a longer context worth?
- the copies' loss and accuracy by distance.

    python -m dsv3lib.studies.rotary_dims --out data/studies/rotary_dims.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ..files import write_whole
from ..model import DeepSeekV3
from .position_free import PositionFreeModel
from .small_models import BYTES, manual, rows_of, small_config, train

ROTARY_DIMS = (0, 8, 16, 32)
SEEDS = (0, 1, 2, 3)
DISTANCES = (8, 16, 32, 64)
"""From a letter to its copy, in bytes."""
LENGTH = 128
"""Bytes in a row."""
FIRST_LETTER, LETTERS = 0x80, 16
"""Copied letters are bytes that the text hardly has."""
FIRST_NAME = 0xC0
"""The byte that names the first distance; the others follow."""
POSITION_BINS = 12


@dataclass(frozen=True)
class Measured:
    """What one trained model came to; losses in nats per byte.

    Attributes:
        rotary_dims: d_h^R. seed: of weights and text. text_loss: mean loss on new text.
        loss_by_position: mean loss in each twelfth of a row, from its beginning.
        copy_loss, copy_accuracy: distance in bytes → of the letters to copy.
        seconds: of processor time.
    """

    rotary_dims: int
    seed: int
    text_loss: float
    loss_by_position: list[float]
    copy_loss: dict[str, float]
    copy_accuracy: dict[str, float]
    seconds: float


def model_with(rotary_dims: int, seed: int) -> DeepSeekV3:
    """A fresh model; with 0 rotary dimensions one that has no positions at all."""
    generator = torch.Generator().manual_seed(seed)
    kind = DeepSeekV3 if rotary_dims else PositionFreeModel
    return kind(small_config(BYTES, rotary_dims or 2), generator)


def copying_rows(
    which: Int64[Tensor, " B"], generator: torch.Generator
) -> tuple[Int64[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Rows of random letters that repeat after the distance that their first byte names.

    Args:
        which: the distance of each row, as its index in ``DISTANCES``. generator: of the letters.

    Returns:
        The rows, [B, ``LENGTH``], and where there is a letter to copy.
    """
    letters = FIRST_LETTER + torch.randint(LETTERS, (len(which), LENGTH), generator=generator)
    place, distance = torch.arange(LENGTH), torch.tensor(DISTANCES)[which][:, None]
    rows = letters.gather(1, 1 + (place - 1) % distance)
    rows[:, 0] = FIRST_NAME + which
    return rows, place > distance


def training_loss(text: Tensor, generator: torch.Generator) -> Callable[[DeepSeekV3, int], Tensor]:
    """The loss of one step: four rows of text, four of copying."""

    def loss_of(model: DeepSeekV3, step: int) -> Tensor:
        rows = rows_of(text, 8, LENGTH, generator)
        which = torch.randint(len(DISTANCES), (4,), generator=generator)
        rows[4:], _ = copying_rows(which, generator)
        return model(rows, labels=rows).loss

    return loss_of


@torch.no_grad()
def byte_losses(model: DeepSeekV3, rows: Int64[Tensor, "B T"]) -> tuple[Float[Tensor, "B S"], Bool[Tensor, "B S"]]:
    """Loss in nats of every byte but the first (S = T - 1), and whether the likeliest byte was the right one."""
    logits = model(rows).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
    return losses.view(len(rows), -1), logits.argmax(-1) == rows[:, 1:]


def measure(model: DeepSeekV3, unseen: Tensor, rows: int = 96) -> dict[str, Any]:
    """Loss by position on new text, and the copy by distance; the same rows for every model."""
    generator = torch.Generator().manual_seed(99)
    plain = rows_of(unseen, rows, LENGTH, generator)
    losses, _ = byte_losses(model, plain)
    bins = [part.mean().item() for part in losses.mean(0).tensor_split(POSITION_BINS)]
    copy_loss, copy_accuracy = {}, {}
    for index, distance in enumerate(DISTANCES):
        copies, scored = copying_rows(torch.full((rows,), index), generator)
        losses_of_copy, right = byte_losses(model, copies)
        copy_loss[str(distance)] = losses_of_copy[scored[:, 1:]].mean().item()
        copy_accuracy[str(distance)] = right[scored[:, 1:]].float().mean().item()
    return {
        "text_loss": losses.mean().item(),
        "loss_by_position": bins,
        "copy_loss": copy_loss,
        "copy_accuracy": copy_accuracy,
    }


def run_one(rotary_dims: int, seed: int, steps: int) -> Measured:
    """Train one model and measure it."""
    started = time.process_time()
    text, unseen = manual()
    model = model_with(rotary_dims, seed)
    for _ in train(model, steps, training_loss(text, torch.Generator().manual_seed(1000 + seed))):
        pass
    return Measured(rotary_dims, seed, **measure(model, unseen), seconds=time.process_time() - started)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study, or go on with it: what the file holds already is not trained again."""
    parser = argparse.ArgumentParser(description="Loss and copying with 0, 8, 16 and 32 rotary dimensions.")
    parser.add_argument("--out", type=Path, default=Path("data/studies/rotary_dims.json"))
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--dims", type=int, nargs="+", default=list(ROTARY_DIMS))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # for so small a model, sharing the work costs more than it saves
    record = json.loads(args.out.read_text()) if args.out.exists() else {"steps": args.steps, "runs": []}
    if record["steps"] != args.steps:
        parser.error(f"--steps {args.steps}: {args.out} holds runs of {record['steps']}; name another file")
    done = {(run["rotary_dims"], run["seed"]) for run in record["runs"]}
    for seed in args.seeds:
        for dims in args.dims:
            if (dims, seed) not in done:
                record["runs"].append(asdict(run_one(dims, seed, args.steps)))
                args.out.parent.mkdir(parents=True, exist_ok=True)
                write_whole(args.out, json.dumps(record, indent=1) + "\n")
                last = record["runs"][-1]
                print(dims, seed, round(last["text_loss"], 3), last["copy_accuracy"], round(last["seconds"]))


if __name__ == "__main__":
    main()
