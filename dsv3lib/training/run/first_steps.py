"""The first steps of a run, frozen: token ids and losses, so that a test can run them again anywhere.

The text of another machine differs, so the steps are repeated from the ids and not from the text. What they prove
is that the model, the losses, the optimizer, the schedule and the bias update still compute what they computed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ...config import ModelConfig
from ...errors import DataError
from ...files import write_whole
from ...model import DeepSeekV3
from ..loop.settings import TrainingConfig
from ..loop.trainer import Trainer
from ..text.data import Batch, PackedStream
from ..text.domains import ArithmeticDomain
from ..text.tokenizer import Tokenizer
from . import folder as run_folder
from .log import read_log
from .publish import stream_of_run

DEFAULT_STEPS = 4


class FrozenStream(PackedStream):
    """Gives back recorded batches, one after the other, and then no more.

    Args:
        batches: what ``record_first_steps`` wrote. tokenizer: any; nothing is tokenised.
    """

    def __init__(self, batches: list[dict[str, Any]], tokenizer: Tokenizer) -> None:
        first = torch.tensor(batches[0]["input_ids"])
        super().__init__([ArithmeticDomain()], tokenizer, first.shape[1], batch_size=first.shape[0])
        self._batches = list(batches)

    def next_batch(self, batch_size: int) -> Batch:
        """The next recorded batch.

        Raises:
            DataError: there is none left, or it has another size.
        """
        if not self._batches or len(self._batches[0]["input_ids"]) != batch_size:
            raise DataError(f"frozen text: no batch of {batch_size} rows is left; record more steps")
        batch = self._batches.pop(0)
        ids, documents = torch.tensor(batch["input_ids"]), torch.tensor(batch["document_ids"])
        return Batch(ids, ids.clone(), documents, torch.zeros_like(ids))


def record_first_steps(run: Path, out: Path, steps: int = DEFAULT_STEPS) -> None:
    """Write the first batches of a run, the losses that its log has for them, and those that FP64 gives.

    In FP32 the processor has its say: where two experts are all but equal, rounding settles which a token visits, and
    after a few steps losses differ in their third digit. In FP64 they agree to the ninth on any machine.

    Args:
        run: a run's folder, finished or not. out: the file. steps: how many.

    Raises:
        TrainingError: there is no run, or this machine's text is another one. DataError: it has fewer steps.
    """
    recorded, logged = run_folder.read_run(run), read_log(run).steps[:steps]
    if len(logged) < steps:
        raise DataError(f"{run}: has {len(logged)} steps, {steps} are to be recorded; let it run on")
    stream, batches = stream_of_run(run), []
    for record in logged:
        batch = stream.next_batch(record["batch_size"])
        batches.append({"input_ids": batch.input_ids.tolist(), "document_ids": batch.document_ids.tolist()})
    content = {
        "training": recorded["training"], "model": recorded["model"],
        "initial_weights": recorded["initial_weights"], "losses": [record["losses"] for record in logged],
        "batches": batches,
    }  # fmt: skip
    content["exact"] = run_again(content, stream.tokenizer, torch.float64)
    write_whole(out, json.dumps(content, separators=(",", ":")) + "\n")


def run_again(
    recorded: dict[str, Any], tokenizer: Tokenizer, dtype: torch.dtype = torch.float32
) -> list[dict[str, float]]:
    """The losses of recorded first steps, computed anew.

    Args:
        recorded: what ``record_first_steps`` wrote. tokenizer: any. dtype: of weights and sums; FP32 is the run's.
    """
    config = TrainingConfig.from_dict(recorded["training"])
    model = DeepSeekV3(
        ModelConfig.from_dict(recorded["model"]), generator=torch.Generator().manual_seed(config.seed)
    ).to(dtype)
    trainer = Trainer(model, FrozenStream(recorded["batches"], tokenizer), config)
    return [trainer.step()["losses"] for _ in recorded["batches"]]
