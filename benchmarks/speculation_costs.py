"""What a round of speculation costs, part by part, and the speed-up that follows from it and from acceptance."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count as counting
from typing import Any

import torch
from measure import seconds_of
from torch import Tensor

from dsv3lib import DeepSeekV3, LatentCache
from dsv3lib.inference.acceptance import SpeculationStatistics
from dsv3lib.inference.draft_count import FixedCount, tokens_of_a_round
from dsv3lib.inference.drafters import Drafting, Drafts
from dsv3lib.inference.generate import stream
from dsv3lib.inference.request import Request
from dsv3lib.inference.speculative import Speculation

MOST = 3  # drafts a round
WIDEST = 5  # tokens of a pass
IN_A_ROW = 8  # passes, and rounds


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
        plain: of a token in plain decoding, by temperature.
        passes: over 1, 2, … tokens. drafts: of no drafts, of one, two, …, by temperature; the first is what it costs
            to keep what a later draft will need. rounds: likewise, whole rounds with so many drafts.
        head: of the output head over one token.
    """

    plain: dict[float, float]
    passes: tuple[float, ...]
    drafts: dict[float, tuple[float, ...]]
    rounds: dict[float, tuple[float, ...]]
    head: float

    def speedup(self, acceptance: Sequence[float], temperature: float) -> float:
        """Tokens a second with len(acceptance) drafts a round, over those of plain decoding.

        Args:
            acceptance: conditional, depth by depth.
        """
        m = len(acceptance)
        if m == 0:
            return 1.0
        return tokens_of_a_round(acceptance) * self.plain[temperature] / self.rounds[temperature][m]

    def as_json(self) -> dict[str, Any]:
        """For the results file: milliseconds, the head's share of the drafts, and what of a round is neither."""
        shares, rest = {}, {}
        for t, drafts in self.drafts.items():
            shares[str(t)] = [round(m * self.head / drafts[m], 4) for m in range(1, len(drafts))]
            rest[str(t)] = [_ms(r - d - p) for r, d, p in zip(self.rounds[t], drafts, self.passes, strict=False)]
        return {
            "plain_ms": {str(t): _ms(s) for t, s in self.plain.items()},
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


def measure_costs(model: DeepSeekV3, prompt: Tensor, temperatures: Sequence[float], new: int) -> Costs:
    """Costs behind a prompt [1, context]: plain tokens, rounds of each number of drafts, passes and the head in turn.

    A machine that others share is quick in one second and slow in the next: so all of them are timed for a stretch
    before any is timed again, and not one by one, since in use each finds its own code and weights in the caches.
    """
    single = _passes_and_head(model, prompt)
    of_single: dict[str, list[float]] = {name: [] for name in single}
    plain, drafts, rounds = {}, {}, {}
    for temperature in temperatures:
        tokens: list[float] = []
        found: list[list[tuple[float, float]]] = [[] for _ in range(MOST + 1)]
        for seed in range(2):
            runs = [_TimedRun(model, prompt, m, temperature, new, seed) for m in range(MOST + 1)]
            draw = torch.Generator().manual_seed(seed)
            alone = stream(model, prompt, new, temperature, stop_tokens=(), generator=draw)
            next(alone)
            for left in range(new - 1, 0, -IN_A_ROW):
                in_a_row = range(min(IN_A_ROW, left))
                tokens += [seconds_of(lambda: next(alone)) for _ in in_a_row]  # noqa: B023  called at once
                for run, seconds in zip(runs, found, strict=True):
                    seconds += [round_ for _ in in_a_row for round_ in run.round()]
                with torch.inference_mode():
                    for name, call in single.items():
                        of_single[name] += [seconds_of(call) for _ in in_a_row]
        plain[temperature] = statistics.median(tokens)
        drafts[temperature] = tuple(statistics.median(d for d, _ in one) for one in found)
        rounds[temperature] = tuple(statistics.median(r for _, r in one) for one in found)
    medians = {name: statistics.median(seconds) for name, seconds in of_single.items()}
    head = medians.pop("head")
    return Costs(plain, tuple(medians.values()), drafts, rounds, head)


@torch.inference_mode()
def _passes_and_head(model: DeepSeekV3, prompt: Tensor) -> dict[str, Callable[[], Any]]:
    context = prompt.shape[1]
    cache = LatentCache(model.config, capacity=context + WIDEST)
    hidden = model(prompt, cache=cache).hidden[:, -1:]
    engine = model.choice.few_tokens(hidden, model.begin(prompt[:, -1:], LatentCache(model.config, mtp=True)))
    turn = counting()

    def read(n_new: int) -> None:
        # Each time other tokens, so that other experts are read, as in use.
        start = 7 * next(turn) % max(context - n_new, 1)
        model(prompt[:, start : start + n_new], cache=cache)
        cache.crop(context)

    passes = {str(n): (lambda n=n: read(n)) for n in range(1, WIDEST + 1)}
    return passes | {"head": lambda: (model.lm_head if engine is None else engine.head)(hidden)}


class _TimedRun:
    """Speculation with m drafts a round, each round timed but the first, which reads the prompt, and the last."""

    def __init__(
        self, model: DeepSeekV3, prompt: Tensor, m: int, temperature: float, new: int, seed: int
    ) -> None:
        draw = torch.Generator().manual_seed(seed)
        request = Request.of(model, prompt, new, temperature, stop_tokens=(), generator=draw)
        self._run = Speculation(model, request, FixedCount(m) if m else NoDrafts(MOST))
        self._run.begin()
        self._run.drafting = self._clock = DraftClock(self._run.drafting)
        self._end, self._m, self._rounds = prompt.shape[1] + new, m, 0

    def round(self) -> list[tuple[float, float]]:
        """Seconds of drafting and of the whole; empty where the round does not count, or the text has ended."""
        if bool(self._run.ended.all()):
            return []
        self._clock.seconds, left = 0.0, self._end - int(self._run.n[0])
        whole = seconds_of(self._run.step)
        self._rounds += 1
        return [(self._clock.seconds, whole)] if self._rounds > 1 and left > self._m else []


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
