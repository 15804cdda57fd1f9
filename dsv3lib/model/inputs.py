"""What the model refuses to take in: the wrong shape, dtype, range or cache, each with its name and the way out."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import CacheError, ContextLengthError, InputError
from ..layers.cache import LatentCache

IGNORED = -100  # a label that is no target
_INTEGERS = (torch.int64, torch.int32)


def check_inputs(
    config: ModelConfig,
    input_ids: Tensor,
    labels: Tensor | None = None,
    cache: LatentCache | None = None,
    lengths: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> None:
    """Refuse what the model cannot work with, before any work is done.

    Values are looked at on the CPU alone: reading them back would stall another device, and its embedding
    reports an id out of range itself.

    Args:
        config: the model's. The others as in ``DeepSeekV3.forward``.

    Raises:
        InputError: ids, labels, documents or lengths of the wrong shape, dtype or range, or labels beside a cache.
        ContextLengthError: the sequence is longer than ``max_position_embeddings``.
        CacheError: the cache was made for another model.
    """
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise InputError(
            f"input_ids: shape {tuple(input_ids.shape)}, expected [batch, tokens], neither of them 0"
        )
    named = {"input_ids": input_ids, "labels": labels, "document_ids": document_ids, "lengths": lengths}
    for name, tensor in named.items():
        if tensor is not None and tensor.dtype not in _INTEGERS:
            raise InputError(f"{name}: dtype {tensor.dtype}, expected integers (torch.int64)")
    for name in ("labels", "document_ids"):
        if named[name] is not None and named[name].shape != input_ids.shape:
            raise InputError(
                f"{name}: shape {tuple(named[name].shape)}, expected that of input_ids {tuple(input_ids.shape)}"
            )
    if lengths is not None and lengths.shape != input_ids.shape[:1]:
        raise InputError(
            f"lengths: shape {tuple(lengths.shape)}, expected one number for each of {input_ids.shape[0]} rows"
        )
    limit = config.max_position_embeddings
    if input_ids.shape[1] > limit:
        raise ContextLengthError(
            f"input_ids: {input_ids.shape[1]} tokens, max_position_embeddings is {limit}; shorten the input"
        )
    if cache is not None:
        _check_cache(config, cache, labels)
    if input_ids.device.type == "cpu":
        _check_values(config, input_ids, labels, lengths)


def _check_cache(config: ModelConfig, cache: LatentCache, labels: Tensor | None) -> None:
    if labels is not None:
        raise InputError(
            "labels: a loss over cached tokens is not defined; pass the whole sequence without a cache"
        )
    made = (cache.config.latent_dim, cache.config.num_hidden_layers)
    wanted = (config.latent_dim, config.num_hidden_layers)
    if made != wanted:
        raise CacheError(
            f"the cache was made for {made[0]} values a token in {made[1]} layers, the model has {wanted[0]} in "
            f"{wanted[1]}; begin a LatentCache with the model's own config"
        )


def _check_values(
    config: ModelConfig, input_ids: Tensor, labels: Tensor | None, lengths: Tensor | None
) -> None:
    vocab = config.vocab_size
    low, high = (int(v) for v in input_ids.aminmax())
    if low < 0 or high >= vocab:
        raise InputError(f"input_ids: holds {low if low < 0 else high}, expected ids in [0, {vocab})")
    if labels is not None:
        wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= vocab))]
        if wrong.numel():
            raise InputError(f"labels: holds {int(wrong[0])}, expected ids in [0, {vocab}) or {IGNORED}")
    if lengths is not None and bool(((lengths < 0) | (lengths > input_ids.shape[1])).any()):
        raise InputError(
            f"lengths: {lengths.tolist()}, expected numbers in [0, {input_ids.shape[1]}], the tokens of a row"
        )
