"""What a round of speculation costs, part by part, and the speed-up that follows from it and from acceptance."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count as counting
from typing import Any

import torch
from measure import interleave, seconds_of
from torch import Tensor

from dsv3lib import DeepSeekV3, LatentCache
from dsv3lib.inference.acceptance import SpeculationStatistics
from dsv3lib.inference.draft_count import FixedCount, tokens_of_a_round
from dsv3lib.inference.drafters import Drafting, Drafts
from dsv3lib.inference.request import Request
from dsv3lib.inference.speculative import Speculation

MOST = 3  # drafts a round
WIDEST = 5  # tokens of a pass


class NoDrafts(FixedCount):
    """Rounds without drafts, as "auto" has them where none pay."""

    def next(self) -> int:
        """None."""
        return 0


class DraftClock:
    """A drafting whose calls are timed.

    Args:
        drafting: does the work.
    """

    def __init__(self, drafting: Drafting) -> None:
        self._drafting, self.seconds = drafting, 0.0

    def draft(self, text: Tensor, n: Tensor, sizes: Tensor) -> Drafts:
        """As ``Drafting.draft``."""
        made: list[Drafts] = []
        self.seconds += seconds_of(lambda: made.append(self._drafting.draft(text, n, sizes)))
        return made[0]

    def confirm(self, before: Tensor, n: Tensor, hidden: Tensor) -> None:
        """As ``Drafting.confirm``: what is kept for the next draft is part of its cost."""
        self.seconds += seconds_of(lambda: self._drafting.confirm(before, n, hidden))


@dataclass(frozen=True)
class Costs:
    """Median seconds at one context.

    Args:
        passes: over 1, 2, … tokens. drafts: of no drafts, of one, two, …, by temperature; the first is what it costs
            to keep what a later draft will need. rounds: likewise, whole rounds with so many drafts.
        head: of the output head over one token.
    """

    passes: tuple[float, ...]
    drafts: dict[float, tuple[float, ...]]
    rounds: dict[float, tuple[float, ...]]
    head: float

    def speedup(self, acceptance: Sequence[float], temperature: float) -> float:
        """Tokens a second with len(acceptance) drafts a round, over those of passes over one token.

        Args:
            acceptance: conditional, depth by depth.
        """
        m = len(acceptance)
        if m == 0:
            return 1.0
        spent = self.passes[m] + self.drafts[temperature][m]
        return tokens_of_a_round(acceptance) * self.passes[0] / spent

    def as_json(self) -> dict[str, Any]:
        """For the results file: milliseconds, the head's share of the drafts, and what of a round is neither."""
        shares, rest = {}, {}
        for t, drafts in self.drafts.items():
            shares[str(t)] = [round(m * self.head / drafts[m], 4) for m in range(1, len(drafts))]
            rest[str(t)] = [_ms(r - d - p) for r, d, p in zip(self.rounds[t], drafts, self.passes, strict=False)]
        return {
            "pass_ms": [_ms(s) for s in self.passes],
            "pass_over_one_token": [round(s / self.passes[0], 3) for s in self.passes],
            "drafts_ms": {str(t): [_ms(s) for s in drafts] for t, drafts in self.drafts.items()},
            "round_ms": {str(t): [_ms(s) for s in rounds] for t, rounds in self.rounds.items()},
            "rest_of_a_round_ms": rest,
            "head_ms": _ms(self.head),
            "heads_share_of_drafts": shares,
        }


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 4)


def measure_costs(
    model: DeepSeekV3, prompt: Tensor, temperatures: Sequence[float], new: int, budget_s: float
) -> Costs:
    """Costs behind a prompt [1, context]: passes and the head in turn, then rounds of each number of drafts in turn."""
    with torch.inference_mode():
        passes, head = _passes_and_head(model, prompt, budget_s)
    drafts, rounds = {}, {}
    for temperature in temperatures:
        found: list[list[tuple[float, float]]] = [[] for _ in range(MOST + 1)]
        for seed in range(2):
            for m in range(MOST + 1):
                found[m] += _rounds(model, prompt, m, temperature, new, seed)
        drafts[temperature] = tuple(statistics.median(d for d, _ in one) for one in found)
        rounds[temperature] = tuple(statistics.median(r for _, r in one) for one in found)
    return Costs(passes, drafts, rounds, head)


def _passes_and_head(model: DeepSeekV3, prompt: Tensor, budget_s: float) -> tuple[tuple[float, ...], float]:
    context = prompt.shape[1]
    cache = LatentCache(model.config, capacity=context + WIDEST)
    hidden = model(prompt, cache=cache).hidden[:, -1]
    turn = counting()

    def read(n_new: int) -> None:
        # Each time other tokens, so that other experts are read, as in use.
        start = 7 * next(turn) % max(context - n_new, 1)
        model(prompt[:, start : start + n_new], cache=cache)
        cache.crop(context)

    sides = {str(n): (lambda n=n: read(n)) for n in range(1, WIDEST + 1)}
    timed = interleave(sides | {"head": lambda: model.lm_head(hidden)}, budget_s, least=5)
    return tuple(timed[name].median for name in sides), timed["head"].median


def _rounds(
    model: DeepSeekV3, prompt: Tensor, m: int, temperature: float, new: int, seed: int
) -> list[tuple[float, float]]:
    """Seconds of drafting and of the whole, round by round, but for the first, which reads the prompt, and the last."""
    draw = torch.Generator().manual_seed(seed)
    request = Request.of(model, prompt, new, temperature, stop_tokens=(), generator=draw)
    count = FixedCount(m) if m else NoDrafts(MOST)
    speculation = Speculation(model, request, count)
    speculation.begin()
    speculation.drafting = clock = DraftClock(speculation.drafting)
    found = []
    while not bool(speculation.ended.all()):
        clock.seconds, left = 0.0, new - int(speculation.n[0]) + prompt.shape[1]
        whole = seconds_of(speculation.step)
        if left > m:
            found.append((clock.seconds, whole))
    return found[1:] or found


def conditional(counts: SpeculationStatistics) -> list[float]:
    """a_k: of the drafts at depth k whose forerunners stood, the share that stood."""
    stood = [1.0, *counts.acceptance_by_depth]
    return [b / a if a else 0.0 for a, b in zip(stood, stood[1:], strict=False)]


def speedup_at(acceptance: Sequence[float], pass_costs: Sequence[float], draft_cost: float) -> list[float]:
    """Speed-up with 0, 1, … drafts for costs that are given: another machine's.

    Args:
        acceptance: conditional, depth by depth. pass_costs: over 1, 2, … tokens. draft_cost: of one draft; both over
            the first pass cost.
    """
    most = min(len(acceptance), len(pass_costs) - 1)
    return [
        tokens_of_a_round(acceptance[:m]) * pass_costs[0] / (pass_costs[m] + m * draft_cost * pass_costs[0])
        for m in range(most + 1)
    ]
