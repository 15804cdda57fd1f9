"""Bits per byte of a model and of its baselines, all on the same validation tokens.

Every figure is Σ bits / Σ bytes over the same targets: the tokens that have another token of their document
before them in their row. A baseline sees no more than the model does: the same rows, cut at the same places.
"""

from __future__ import annotations

import lzma
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from ...model import DeepSeekV3
from ..loop.evaluate import DEFAULT_BATCH_SIZE, token_bytes
from ..text.data import Batch, PackedStream
from ..text.tokenizer import Tokenizer
from .ngram import KneserNey

GZIP_LEVEL, XZ_PRESET = 9, 9 | lzma.PRESET_EXTREME


def segments(batches: Iterable[Batch]) -> Iterator[Int[np.ndarray, " n"]]:
    """Token runs of one document in one row: what a baseline may look back over. Padding is left out."""
    for batch in batches:
        for ids, documents, labels in zip(batch.input_ids, batch.document_ids, batch.labels, strict=True):
            row = ids[labels >= 0].numpy()
            owner = documents[labels >= 0].numpy()
            yield from np.split(row, np.flatnonzero(np.diff(owner)) + 1)


def target_bytes(batches: Iterable[Batch], tokenizer: Tokenizer) -> int:
    """Bytes of text that the targets stand for."""
    width = token_bytes(tokenizer).numpy()
    return int(sum(width[part[1:]].sum() for part in segments(batches)))


def ngram_bits(model: KneserNey, batches: Sequence[Batch]) -> float:
    """Bits that an n-gram model spends on the targets."""
    return float(sum(-np.log2(model.probabilities(part)[1:]).sum() for part in segments(batches)))


def unigram_bits(frequencies: Float[np.ndarray, " V"], batches: Sequence[Batch]) -> float:
    """Bits that fixed token frequencies spend on the targets."""
    return float(sum(-np.log2(frequencies[part[1:]]).sum() for part in segments(batches)))


def compressed_bits(batches: Sequence[Batch], tokenizer: Tokenizer) -> dict[str, float]:
    """Bits of gzip and xz on the targets' text in one piece; they have learnt nothing before.

    Returns:
        "gzip" (deflate at level 9) and "xz" (preset 9e), container included.
    """
    text = tokenizer.decode([token for part in segments(batches) for token in part[1:].tolist()]).encode()
    deflate = zlib.compressobj(GZIP_LEVEL, wbits=31)
    return {
        "gzip": 8.0 * len(deflate.compress(text) + deflate.flush()),
        "xz": 8.0 * len(lzma.compress(text, preset=XZ_PRESET)),
    }


@torch.no_grad()
def first_drafts(model: DeepSeekV3, batches: Sequence[Batch]) -> tuple[float, list[float]]:
    """What speculation may expect on held-out text: the model's entropy, and how often each MTP depth agrees.

    Depth k agrees at position i where its likeliest token is the main model's own for the same place: greedy
    acceptance of the k-th draft, the tokens before it given.

    Returns:
        (mean entropy of the main model's prediction in bits per token, agreement by depth, 0 to 1).
    """
    was_training = model.training
    model.eval()
    entropy, count = 0.0, 0
    agreed, tried = [0] * model.config.num_nextn_predict_layers, [0] * model.config.num_nextn_predict_layers
    for batch in batches:
        out = model(batch.input_ids, return_mtp=True)
        real = batch.labels >= 0
        p = out.logits.float().log_softmax(-1)
        entropy -= float((p.exp() * p).sum(-1)[real].sum()) / math.log(2)
        count += int(real.sum())
        best = out.logits.argmax(-1)
        for k, logits in enumerate(out.mtp_logits, start=1):
            same = logits.argmax(-1) == best[:, k:]
            within = real[:, k:] & (batch.document_ids[:, k:] == batch.document_ids[:, :-k])
            agreed[k - 1] += int((same & within).sum())
            tried[k - 1] += int(within.sum())
    model.train(was_training)
    return entropy / max(count, 1), [a / max(t, 1) for a, t in zip(agreed, tried, strict=True)]


def drafts_by_domain(
    model: DeepSeekV3, stream: PackedStream, domains: Iterable[str], batches: int, batch_size: int = DEFAULT_BATCH_SIZE
) -> dict[str, dict[str, Any]]:
    """``first_drafts`` on each domain's held-out text, as a checkpoint's record has it.

    Args:
        domains: their names. batches, batch_size: of each, at most.
    """
    found = {}
    for name in domains:
        entropy, agreement = first_drafts(model, stream.validation_batches(name, batches, batch_size))
        found[name] = {"entropy": entropy, "agreement": agreement}
    return found


def training_batches(stream: PackedStream, steps: int, batch_size: int) -> Iterator[Batch]:
    """The batches that a run of so many steps has read, from a fresh stream."""
    for _ in range(steps):
        yield stream.next_batch(batch_size)
