"""Trainers of a nano model for tests: a run of seconds on the text of this machine."""

from pathlib import Path
from typing import Any

import torch

from dsv3lib import DeepSeekV3, ModelConfig
from dsv3lib.training.loop.settings import TrainingConfig
from dsv3lib.training.loop.trainer import Trainer
from dsv3lib.training.text.data import PackedStream

SIZE = ModelConfig.preset("nano").replace(num_hidden_layers=2)


def trainer_of(
    text: tuple,
    out: Path | None = None,
    resume: bool = False,
    seq_len: int = 32,
    model_seed: int = 0,
    **settings: Any,
) -> Trainer:
    """A trainer of four steps, unless the settings of training say otherwise; ``text`` is domains and a tokenizer."""
    settings = {"batch_size": 4, "checkpoint_every": 2, "validation_batches": 1, "threads": 1, **settings}
    if not {"tokens", "minutes"} & settings.keys():
        settings.setdefault("steps", 4)
    model = DeepSeekV3(SIZE, generator=torch.Generator().manual_seed(model_seed))
    return Trainer(model, PackedStream(*text, seq_len), TrainingConfig(**settings), out=out, resume=resume)
