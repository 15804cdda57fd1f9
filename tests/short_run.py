"""A training run of six steps of a very small model, with the folder that real runs have."""

import torch

from dsv3lib import DeepSeekV3, ModelConfig
from dsv3lib.training.loop.settings import TrainingConfig
from dsv3lib.training.loop.trainer import Trainer
from dsv3lib.training.text.data import PackedStream
from dsv3lib.training.text.domains import builtin_domains
from dsv3lib.training.text.tokenizer import default_tokenizer

NAMES, STEPS, WIDTH = ("docs", "arithmetic"), 6, 32
SHAPE = ModelConfig.preset("nano").replace(num_hidden_layers=2, hidden_size=32, num_nextn_predict_layers=2)
SETTINGS = TrainingConfig(
    steps=STEPS,
    batch_size=2,
    batch_size_start=2,
    batch_warmup_steps=0,
    validation_batches=0,
    threads=1,
    ema_decay=0.0,
)


def trained(out, shape=SHAPE, config=SETTINGS, stop_after=None):
    """Train in the folder ``out``, to the end or to a step, and give it back."""
    stream = PackedStream(builtin_domains(NAMES), default_tokenizer(), WIDTH)
    model = DeepSeekV3(shape, generator=torch.Generator().manual_seed(0))
    run = Trainer(model, stream, config, out=out, source={"data": None, "without": [], "text": "small"})
    for record in run:
        if record["step"] == stop_after:
            break
    return out
