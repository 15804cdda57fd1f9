"""Validation: the loss of each domain on documents that training never sees, per token and per byte.

A loss per token depends on the vocabulary: longer tokens are fewer and harder. Bits per byte do not, so they
are what runs with different tokenizers are compared by (the paper's BPB, Table 5).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from ...errors import TrainingError
from ...model import DeepSeekV3
from ..text.data import IGNORED_LABEL, Batch, PackedStream
from ..text.tokenizer import SPECIAL_TOKENS, Tokenizer
from .balance import load_entropy, max_violation

Forward = Callable[[Batch], tuple[float, Tensor]]
DEFAULT_BATCHES = 4
DEFAULT_BATCH_SIZE = 8


@dataclass(frozen=True)
class DomainLoss:
    """What one domain's validation text costs the model.

    ``loss`` is in nats per token, ``bits_per_byte`` in bits per byte of UTF-8; ``tokens`` counts the targets.
    """

    loss: float
    bits_per_byte: float
    tokens: int


@dataclass(frozen=True)
class Evaluation:
    """Validation losses by domain, and the balance over all of the validation text.

    ``max_violation`` and ``load_entropy`` are by mixture layer, from loads summed over all batches: the
    global measures, where a training step's are batch-wise.
    """

    domains: dict[str, DomainLoss]
    max_violation: list[float]
    load_entropy: list[float]

    @property
    def loss(self) -> float:
        """Nats per token over all domains' targets; NaN where there was no validation text."""
        tokens = sum(d.tokens for d in self.domains.values())
        return sum(d.loss * d.tokens for d in self.domains.values()) / tokens if tokens else math.nan

    def to_dict(self) -> dict:
        """As JSON knows it."""
        return asdict(self)


@torch.no_grad()
def evaluate(
    model: DeepSeekV3,
    stream: PackedStream,
    batches: int = DEFAULT_BATCHES,
    batch_size: int = DEFAULT_BATCH_SIZE,
    forward: Forward | None = None,
) -> Evaluation:
    """Validation loss of each domain of a stream; the stream's place and the model's mode do not change.

    loss = Σ nats / Σ targets over the domain's text; bits per byte = Σ nats / (ln 2 · Σ bytes of the
    targets). A domain without validation documents is left out.

    Args:
        model: the model, on any device.
        stream: gives ``validation_batches``, which are the same at every call.
        batches: most batches of each domain. batch_size: rows of each.
        forward: gives a batch's main loss and each expert's load; by default the model in one piece.

    Raises:
        TrainingError: a loss is not finite; the domain is named.
    """
    width = token_bytes(stream.tokenizer)
    was_training = model.training
    model.eval()
    domains, loads = {}, 0
    try:
        for name in stream.domain_names:
            nats, tokens, size = 0.0, 0, 0
            for batch in stream.validation_batches(name, batches, batch_size):
                mean, load = _whole(model, batch) if forward is None else forward(batch)
                targets = _targets(batch)
                if not math.isfinite(mean):
                    raise TrainingError(
                        f"validation: the loss on domain {name!r} is {mean}; the weights are spoilt"
                    )
                nats += mean * targets.numel()
                tokens += targets.numel()
                size += int(width[targets].sum())
                loads = loads + load
            if tokens:
                domains[name] = DomainLoss(nats / tokens, nats / math.log(2) / max(size, 1), tokens)
    finally:
        model.train(was_training)
    if isinstance(loads, int):
        return Evaluation({}, [], [])
    return Evaluation(domains, max_violation(loads).tolist(), load_entropy(loads).tolist())


def _whole(model: DeepSeekV3, batch: Batch) -> tuple[float, Int64[Tensor, "layers E"]]:
    device = model.lm_head.weight.device
    out = model(
        batch.input_ids.to(device), labels=batch.labels.to(device), document_ids=batch.document_ids.to(device)
    )
    return out.losses["main"].item(), out.expert_load.cpu()


def _targets(batch: Batch) -> Int64[Tensor, " N"]:
    same = batch.document_ids[:, 1:] == batch.document_ids[:, :-1]
    return batch.labels[:, 1:][same & (batch.labels[:, 1:] != IGNORED_LABEL)]


def token_bytes(tokenizer: Tokenizer) -> Int64[Tensor, " V"]:
    """How many bytes of text each token stands for; 0 for the special tokens, which stand for none.

    A byte-level vocabulary writes every byte as one printable character, so a token's length is its bytes.
    """
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    sizes = torch.zeros(len(vocabulary), dtype=torch.int64)
    for token, index in vocabulary.items():
        sizes[index] = 0 if token in SPECIAL_TOKENS else len(token)
    return sizes
