"""Generation: prefill once, then one token at a time from the latent cache."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import InputError
from ..layers.cache import LatentCache
from .acceptance import SpeculationStatistics
from .drafters import Drafter
from .request import Request, prefill
from .speculative import speculate

if TYPE_CHECKING:
    from ..model import DeepSeekV3


def generate(
    model: DeepSeekV3,
    input_ids: Int[Tensor, "*prompts"],
    max_new_tokens: int = 64,
    temperature: float | Sequence[float] = 0.0,
    top_p: float = 1.0,
    speculative: bool = False,
    *,
    top_k: int | None = None,
    stop_tokens: Collection[int] | None = None,
    lengths: Int[Tensor, "*rows"] | None = None,
    generator: torch.Generator | None = None,
    draft_tokens: int | str | None = None,
    drafter: Drafter | DeepSeekV3 | str | None = None,
    statistics: SpeculationStatistics | None = None,
    seeds: Sequence[int] | None = None,
) -> Int[Tensor, "B T_out"]:
    """Continue each row until a stop token or ``max_new_tokens``.

    Args:
        model: in any mode; no gradient is kept.
        input_ids: [B, T], prompts, right-padded where ``lengths`` says that rows end early.
        max_new_tokens: at most so many are added to a row.
        temperature: 0 takes the likeliest token, otherwise logits are divided by it and sampled; a sequence of B
            gives each row its own.
        top_p: sample among the likeliest tokens that together hold this probability.
        speculative: let a drafter guess and the model verify (paper §5.4.3): the same tokens where
            greedy, the same distribution where sampled, in fewer steps.
        top_k: sample among so many likeliest tokens, before ``top_p`` cuts further; by default all.
        stop_tokens: a row ends with the first of these; by default all that the checkpoint's
            ``generation_config.json`` names, else the configuration's ``eos_token_id``.
        lengths: [B], tokens of each prompt.
        generator: source of the sampling. Equal seeds give equal text, with and without speculation
            different ones.
        draft_tokens: how many tokens are drafted a step; by default one per MTP module, or what the drafter finds
            usual. "auto" chooses by measured time and acceptance, none where drafting does not pay. Only with
            ``speculative``.
        drafter: "mtp", the default; "lookup", n-grams of the text itself, which needs no MTP module; a smaller model of
            the same vocabulary; or a ``drafters.Drafter``. Only with ``speculative``.
        statistics: counts drafts and acceptances. Only with ``speculative``.
        seeds: [B], one for each row in place of ``generator``: a row's text is then the same alone and in any batch
            (but
            for rounding, and except with ``draft_tokens="auto"``).

    Returns:
        Each row's prompt and continuation, side by side, filled up with ``pad_token_id`` (or the end token,
        or 0) to the longest row.

    Raises:
        InputError: a setting is out of range, or the drafter cannot draft for this model.
        ContextLengthError: prompt plus ``max_new_tokens`` is too long.
    """
    request = Request.of(
        model, input_ids, max_new_tokens, temperature, top_p, stop_tokens, lengths, generator, top_k, seeds
    )
    for name, value in (("draft_tokens", draft_tokens), ("drafter", drafter), ("statistics", statistics)):
        if value is not None and not speculative:
            raise InputError(f"{name}: {value!r} given without speculation; pass speculative=True too")
    rows, starts = request.rows(), request.lengths.tolist()
    # Until it returns nobody gets hold of the model: to look at all its modules at every token would take a sixth.
    with model.choice.settled(model):
        if speculative:
            for round_ in speculate(model, request, draft_tokens, statistics, drafter=drafter):
                for row, tokens in zip(rows, round_.tokens, strict=True):
                    row.extend(tokens)
        else:
            for tokens in _steps(model, request):
                for row, start, token in zip(rows, starts, tokens.tolist(), strict=True):
                    if len(row) == start or row[-1] not in request.stops:
                        row.append(token)
    return request.pad(rows)


def stream(
    model: DeepSeekV3,
    input_ids: Int[Tensor, "*prompts"],
    max_new_tokens: int = 64,
    temperature: float | Sequence[float] = 0.0,
    top_p: float = 1.0,
    *,
    top_k: int | None = None,
    stop_tokens: Collection[int] | None = None,
    lengths: Int[Tensor, "*rows"] | None = None,
    generator: torch.Generator | None = None,
    seeds: Sequence[int] | None = None,
) -> Iterator[Int[Tensor, " B"]]:
    """Give the next token of every row as soon as it is chosen; arguments as for ``generate``.

    A row that has ended goes on giving tokens that mean nothing; the stream ends when all rows have. It may
    be abandoned at any point.

    Raises:
        InputError: as ``generate``, at the call and not at the first token.
    """
    request = Request.of(
        model, input_ids, max_new_tokens, temperature, top_p, stop_tokens, lengths, generator, top_k, seeds
    )
    return _steps(model, request)


def _steps(model: DeepSeekV3, request: Request) -> Iterator[Int[Tensor, " B"]]:
    ids, sampler = request.input_ids, request.sampler
    stops = torch.tensor(sorted(request.stops), dtype=torch.int64, device=ids.device)
    cache = LatentCache(model.config, capacity=request.reserve)
    ended = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    for step in range(request.max_new_tokens):
        # Not held open across the yield: between two tokens the caller may train.
        with torch.inference_mode():
            if step == 0:
                logits, _ = prefill(model, request, cache)
            else:
                logits = model(tokens[:, None], cache=cache).logits[:, -1]  # noqa: F821  the step before
            tokens = sampler.choose(logits)
            ended |= torch.isin(tokens, stops)
        yield tokens.clone()
        if bool(ended.all()):
            return
