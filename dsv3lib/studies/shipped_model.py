"""The shipped checkpoint beside real text of this machine, as the lessons read it."""

from __future__ import annotations

import torch

from ..model import DeepSeekV3
from ..training.text.data import PackedStream
from ..training.text.folder import open_domains
from ..training.text.tokenizer import Tokenizer

NAME = "tiny-v3"


def open_shipped(seq_len: int = 64, seed: int = 0) -> tuple[DeepSeekV3, PackedStream]:
    """``tiny-v3`` in evaluation mode and FP32, and the built-in text by its own tokenizer.

    Args:
        seq_len: tokens of a row of the text. seed: of the text's order.

    Raises:
        CheckpointError: this installation has no such checkpoint, or only half of it.
    """
    text = PackedStream(open_domains()[0], Tokenizer.from_pretrained(NAME), seq_len, seed=seed)
    return DeepSeekV3.from_pretrained(NAME, dtype=torch.float32).eval(), text
