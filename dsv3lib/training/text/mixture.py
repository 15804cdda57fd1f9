"""The mixture of domains with a cap on passes (epochs): repeated data loses its worth after about four passes.

A share that would read a domain more often than the cap allows is cut to what the cap allows, and what it gives
up goes to the other domains in the proportion of their shares (water-filling): round by round, because a domain
may reach its cap by what it receives.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

from dsv3lib.errors import DataError
from dsv3lib.training.text.data import PackedStream
from dsv3lib.training.text.domains import Domain
from dsv3lib.training.text.order import DocumentOrder, Split
from dsv3lib.training.text.tokenizer import Tokenizer

MAX_PASSES = 4.0
"""Muennighoff et al. (2023): up to four passes over data are worth nearly as much as fresh data."""
_SAMPLED_DOCUMENTS = 48


def training_tokens(domain: Domain, split: Split, tokenizer: Tokenizer) -> int | None:
    """About how many tokens one pass over a domain's training documents has; None where it never ends.

    Bytes per token are measured on a fixed sample of documents, BOS and EOS counted.
    """
    if domain.count is None or domain.size_bytes is None:
        return None
    order, tokens, size = DocumentOrder(domain, split, "train", seed=0), 0, 0
    for index in islice(order.epoch(0), _SAMPLED_DOCUMENTS):
        text = domain.read(index).text
        tokens += len(tokenizer.encode(text, bos=True, eos=True))
        size += len(text.encode("utf-8", "replace"))
    trained = sum(split.part(i) == "train" for i in range(domain.count)) / domain.count
    return round(domain.size_bytes * trained * tokens / max(size, 1))


def capped_weights(
    weights: Mapping[str, float],
    available: Mapping[str, int | None],
    budget: int,
    max_passes: float | int = MAX_PASSES,
) -> dict[str, float]:
    """Shares of the training tokens under which no domain is read more than ``max_passes`` times.

    Args:
        weights: domain -> share wanted, any scale. available: domain -> training tokens of one pass, None
            where it never ends. budget: tokens of the whole run.
        max_passes: the cap, above 0.

    Returns:
        Shares that sum to 1. Where all domains together cannot fill the run, every one has its cap's share of
        what there is: the cap is then broken by all alike, as the passes reported will show.

    Raises:
        DataError: a number is out of range.
    """
    if budget < 1 or max_passes <= 0:
        raise DataError(f"budget is {budget}, max_passes is {max_passes}; both must be above 0")
    total = sum(weights.values())
    if total <= 0 or min(weights.values()) < 0:
        raise DataError(f"weights are {dict(weights)}; expected shares of at least 0, one above 0")
    caps = {
        name: float("inf") if available[name] is None else max_passes * available[name] / budget
        for name in weights
    }
    caps |= {name: 0.0 for name, weight in weights.items() if weight == 0}
    if sum(caps.values()) <= 1.0:
        return {name: cap / sum(caps.values()) for name, cap in caps.items()}
    fixed: dict[str, float] = {}
    while True:
        free = {name: weight for name, weight in weights.items() if name not in fixed}
        scale = (1.0 - sum(fixed.values())) / sum(free.values())
        over = {name: caps[name] for name, weight in free.items() if weight * scale > caps[name]}
        if not over:
            return {name: fixed.get(name, weights[name] * scale) for name in weights}
        fixed |= over


def cap_passes(stream: PackedStream, tokens: int | None, max_passes: float | int = MAX_PASSES) -> list[str]:
    """Cut the shares of a fresh stream's domains so that none is read more than ``max_passes`` times.

    Args:
        stream: reweighed in place. tokens: of the whole run; None (a run by the clock) changes nothing.
        max_passes: the cap.

    Returns:
        Notes for the user: which shares were cut, from what to what.
    """
    if tokens is None:
        return []
    names = stream.domain_names
    wanted = dict(zip(names, stream.weights, strict=True))
    available = {
        domain.name: training_tokens(domain, split, stream.tokenizer)
        for domain, split in zip(stream.domains, stream.splits, strict=True)
    }
    used = capped_weights(wanted, available, tokens, max_passes)
    cut = [
        f"{name} {wanted[name]:.1%} -> {used[name]:.1%}" for name in names if used[name] < wanted[name] - 1e-9
    ]
    if not cut:
        return []
    stream.reweigh(used)
    return [
        f"little text: at most {max_passes:g} passes over a domain, so its share is cut ({', '.join(cut)})"
    ]
