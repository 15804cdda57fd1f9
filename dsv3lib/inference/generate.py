"""Generation: prefill once, then one token at a time from the latent cache."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import InputError
from ..layers.cache import LatentCache

if TYPE_CHECKING:
    from ..model import DeepSeekV3


def generate(
    model: DeepSeekV3,
    input_ids: Int[Tensor, "B T"],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_tokens: Collection[int] | None = None,
    lengths: Int[Tensor, " B"] | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "B T_out"]:
    """Continue each row until a stop token or ``max_new_tokens``.

    Args:
        model: in any mode; no gradient is kept.
        input_ids: prompts, right-padded where ``lengths`` says that rows end early.
        max_new_tokens: at most so many are added to a row.
        temperature: 0 takes the likeliest token, otherwise logits are divided by it and sampled.
        top_p: sample among the likeliest tokens that together hold this probability.
        stop_tokens: a row ends with the first of these; by default the configuration's ``eos_token_id``.
        lengths: tokens of each prompt. generator: source of the sampling.

    Returns:
        Each row's prompt and continuation, side by side, filled up with ``pad_token_id`` (or the end token,
        or 0) to the longest row.

    Raises:
        InputError: a setting is out of range. ContextLengthError: prompt plus ``max_new_tokens`` is too long.
    """
    stops = _stops(model, stop_tokens)
    fill = next((t for t in (model.config.pad_token_id, model.config.eos_token_id) if t is not None), 0)
    starts = [input_ids.shape[1]] * input_ids.shape[0] if lengths is None else lengths.tolist()
    rows = [row[:n] for row, n in zip(input_ids.tolist(), starts, strict=True)]
    for tokens in stream(
        model, input_ids, max_new_tokens, temperature, top_p, stop_tokens, lengths, generator
    ):
        for row, start, token in zip(rows, starts, tokens.tolist(), strict=True):
            if len(row) == start or row[-1] not in stops:
                row.append(token)
    longest = max(map(len, rows))
    padded = [row + [fill] * (longest - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.int64, device=input_ids.device)


def stream(
    model: DeepSeekV3,
    input_ids: Int[Tensor, "B T"],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_tokens: Collection[int] | None = None,
    lengths: Int[Tensor, " B"] | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Int[Tensor, " B"]]:
    """Yield the next token of every row as soon as it is chosen; arguments as for ``generate``.

    A row that has ended goes on yielding tokens that mean nothing; the stream ends when all rows have.
    """
    check_settings(model, input_ids, max_new_tokens, temperature, top_p, lengths)
    stops = torch.tensor(sorted(_stops(model, stop_tokens)), dtype=torch.int64, device=input_ids.device)
    cache = LatentCache(model.config, capacity=min(input_ids.shape[1] + max_new_tokens, 1024))
    ended = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    for step in range(max_new_tokens):
        # Not held open across the yield: between two tokens the caller may train.
        with torch.inference_mode():
            if step == 0:
                logits = model(input_ids, cache=cache, lengths=lengths).logits
                last = -1 if lengths is None else lengths.to(logits.device) - 1
                logits = logits[torch.arange(len(logits), device=logits.device), last]
            else:
                logits = model(tokens[:, None], cache=cache).logits[:, -1]
            tokens = choose(logits, temperature, top_p, generator)
            ended |= torch.isin(tokens, stops)
        yield tokens.clone()
        if bool(ended.all()):
            return


def choose(
    logits: Float[Tensor, "*B vocab"],
    temperature: float,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "*B"]:
    """Pick a token from each row of logits."""
    if temperature == 0.0:
        return logits.argmax(-1)
    p = probabilities(logits, temperature, top_p)
    return torch.multinomial(p.flatten(0, -2), 1, generator=generator).view(p.shape[:-1])


def probabilities(
    logits: Float[Tensor, "*B vocab"], temperature: float, top_p: float = 1.0
) -> Float[Tensor, "*B vocab"]:
    """The distribution that is sampled from: softmax(logits / temperature), cut to its nucleus.

    The nucleus is the smallest set of likeliest tokens that holds at least ``top_p``; the rest gets 0. At
    temperature 0 all probability is on the likeliest token.
    """
    if temperature == 0.0:
        return torch.zeros_like(logits, dtype=torch.float32).scatter_(
            -1, logits.argmax(-1, keepdim=True), 1.0
        )
    p = (logits.float() / temperature).softmax(-1)
    if top_p < 1.0:
        ranked, order = p.sort(-1, descending=True)
        outside = ranked.cumsum(-1) - ranked >= top_p  # the token that crosses top_p is still inside
        p = p.masked_fill(outside.scatter(-1, order, outside), 0.0)
        p = p / p.sum(-1, keepdim=True)
    return p


def _stops(model: DeepSeekV3, stop_tokens: Collection[int] | None) -> set[int]:
    if stop_tokens is not None:
        return set(stop_tokens)
    return set() if model.config.eos_token_id is None else {model.config.eos_token_id}


def check_settings(
    model: DeepSeekV3,
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    lengths: Tensor | None,
) -> None:
    """Refuse what cannot be generated, before any work is done.

    Raises:
        InputError: a setting is out of range; it is named.
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens: {max_new_tokens}, expected at least 1")
    if not temperature >= 0.0 or temperature == float("inf"):
        raise InputError(
            f"temperature: {temperature}, expected a finite number >= 0 (0 takes the likeliest token)"
        )
    if not 0.0 < top_p <= 1.0:
        raise InputError(f"top_p: {top_p}, expected a number in (0, 1]")
    if lengths is not None and (lengths.shape != input_ids.shape[:1] or bool((lengths < 1).any())):
        raise InputError(
            f"lengths: {lengths.tolist()}, expected at least 1 for each of {input_ids.shape[0]} prompts"
        )
    total = input_ids.shape[1] + max_new_tokens
    if total - 1 > model.config.max_position_embeddings:
        raise InputError(
            f"max_new_tokens: a prompt of {input_ids.shape[1]} and {max_new_tokens} new tokens pass "
            f"max_position_embeddings ({model.config.max_position_embeddings})"
        )
