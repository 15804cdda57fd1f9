"""How many tokens to draft in a round, or none, from running acceptance and measured time (adaptive speculation).

A round with m drafts yields 1 + a₁ + a₁a₂ + … + a₁…a_m tokens, a_k the probability that draft k stands when those
before it did, and takes t_m seconds. The best m has the most tokens a second, and m = 0 is plain decoding: where
drafts do not pay, none are made. Both sides of the quotient are learned from the rounds themselves, since they move:
a pass over m + 1 tokens costs more where attention is bound by arithmetic, acceptance falls and rises with the text.
So what is not the best is tried again now and then, and the time that trials lose stays below a stated share of all;
where few drafts lose so clearly that more could not win, more are not tried.
What one text taught, the next one of the same model begins with: over few tokens the first trials would weigh.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from statistics import median
from typing import Protocol, runtime_checkable
from weakref import WeakKeyDictionary

from ..errors import InputError
from .acceptance import Round

_REMEMBERED = 5  # rounds, and trials, whose median counts
_FORGETS = 0.97  # weight of a round after each further one
_PRIOR = (2.4, 3.0)  # draft k before any was seen: as an MTP module is hoped to draft, and soon outweighed
_FIRST_TRIAL = 3  # rounds of a number that nobody has tried yet
_TRIAL = 2
_CLEARLY = 1.1  # more drafts are not tried where they would take so much longer a token
_TICK = 1e-9  # seconds; a coarse clock may not have moved
LOSES_AT_MOST = 0.02
"""Share of time that trials of other numbers of drafts may lose."""


@runtime_checkable
class DraftCount(Protocol):
    """Who says how many drafts the next round has."""

    most: int

    def next(self) -> int:
        """Drafts of the next round, 0 to ``most``."""
        ...

    def saw(self, round_: Round) -> None:
        """Hear what came of it."""
        ...


class FixedCount:
    """Always the same number.

    Args:
        most: of drafts a round.

    Raises:
        InputError: below 1.
    """

    def __init__(self, most: int) -> None:
        if most < 1:
            raise InputError(
                f'draft_tokens: {most}, expected at least 1, or "auto"; without drafts is speculative=False'
            )
        self.most = most

    def next(self) -> int:
        """``most``."""
        return self.most

    def saw(self, round_: Round) -> None:
        """Nothing changes."""


class AdaptiveCount:
    """The number of drafts that gives the most tokens a second here and now.

    Args:
        most: of drafts a round. loses: share of time that trials may lose. clock: gives seconds.
    """

    def __init__(
        self, most: int, loses: float = LOSES_AT_MOST, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.most, self._loses, self._clock = most, loses, clock
        self._stood = [list(_PRIOR) for _ in range(most)]  # of each depth: stood, judged
        self._ratios: list[deque[float]] = [deque(maxlen=_REMEMBERED) for _ in range(most + 1)]  # t_m / t_0
        self._paces: deque[float] = deque(maxlen=_REMEMBERED)  # t_0, as the last rounds tell it
        self._lost = [0.0] * (most + 1)  # seconds that the last trial of m lost
        self._tried = [0.0] * (most + 1)  # when it ended, in seconds of rounds: between two of them all may rest
        self._spent = 0.0  # seconds of all rounds
        self._now, self._left, self._on_trial = 0, 0, False
        self._rounds: list[tuple[float, float]] = []  # of this trial, or the one round: seconds and tokens
        self._began = self._clock()

    def begin_with(self, earlier: AdaptiveCount) -> None:
        """Take over what another run of the same model has learned; the two go on apart.

        Args:
            earlier: with as many drafts at most.
        """
        self._stood = [list(of_depth) for of_depth in earlier._stood]
        self._ratios, self._paces = [ratios.copy() for ratios in earlier._ratios], earlier._paces.copy()
        self._lost, self._tried = list(earlier._lost), list(earlier._tried)
        self._spent = earlier._spent

    def next(self) -> int:
        """The best number, or one whose turn it is to be tried; the round's time runs from here."""
        if self._left == 0:
            self._choose()
        self._began = self._clock()
        return self._now

    def _choose(self) -> None:
        best = self.best()
        self._now, self._left, self._on_trial, self._rounds = best, 1, False, []
        unknown = next((m for m, ratios in enumerate(self._ratios) if not ratios), None)
        if unknown is not None and not self._cannot_pay(unknown):
            self._now, self._left, self._on_trial = unknown, _FIRST_TRIAL, True
            return
        for m in range(self.most + 1):
            patience = self._spent - self._tried[m]
            if m != best and self._ratios[m] and patience * self._loses / self.most >= self._lost[m]:
                self._now, self._left, self._on_trial = m, _TRIAL, True
                return

    def _cannot_pay(self, m: int) -> bool:
        """Whether m drafts, which nobody has tried, would lose though the last one cost half of that before it."""
        if m < 2:
            return False
        before, last = median(self._ratios[m - 2]), median(self._ratios[m - 1])
        best = self.best()
        ratio = median(self._ratios[best]) / tokens_of_a_round(self.acceptance()[:best])
        expected = (last + (last - before) / 2) / tokens_of_a_round(self.acceptance()[:m])
        return expected > _CLEARLY * ratio

    def saw(self, round_: Round) -> None:
        """Count the round: its time, its tokens, and what became of its drafts."""
        m = self._now
        seconds, rows = self._clock() - self._began, sum(map(bool, round_.tokens))
        if not rows:
            return
        self._left = max(self._left - 1, 0)
        for accepted, tokens in zip(round_.accepted, round_.tokens, strict=True):
            for k in range(min(m, accepted + 1) if tokens else 0):  # a guess that was not made did not stand either
                stood, judged = self._stood[k]
                self._stood[k] = [stood * _FORGETS + (k < accepted), judged * _FORGETS + 1]
        self._spent += seconds
        self._rounds.append((max(seconds, _TICK), sum(map(len, round_.tokens)) / rows))
        if self._left == 0:  # a trial's last round, or one like those before
            self._learn(m)
            spent, gained = map(sum, zip(*self._rounds, strict=True))
            self._lost[m] = max(spent - gained / self.tokens_a_second(self.best()), 0.0)
            self._tried[m] = self._spent

    def _learn(self, m: int) -> None:
        """What the rounds took: of a trial, over what others take now: a shared machine is not always as quick."""
        if not self._paces:
            self._ratios[m].append(1.0)
        if not self._paces or not self._on_trial:
            self._paces.append(self._rounds[-1][0] / median(self._ratios[m]))
        else:
            seconds = median(seconds for seconds, _ in self._rounds[1:])  # the first makes up for what was not read yet
            self._ratios[m].append(seconds / median(self._paces))

    def acceptance(self) -> list[float]:
        """a_k: of the drafts at depth k whose forerunners stood, the share that stood, newest rounds first."""
        return [stood / judged for stood, judged in self._stood]

    def seconds(self, m: int) -> float:
        """t_m at present; NaN before any round with m drafts."""
        return median(self._ratios[m]) * median(self._paces) if self._ratios[m] else float("nan")

    def tokens_a_second(self, m: int) -> float:
        """Expected, of a row; 0 while m was never tried."""
        return tokens_of_a_round(self.acceptance()[:m]) / self.seconds(m) if self._ratios[m] else 0.0

    def best(self) -> int:
        """The number of drafts with the most tokens a second."""
        return max(range(self.most + 1), key=self.tokens_a_second)


def tokens_of_a_round(acceptance: Sequence[float]) -> float:
    """1 + a₁ + a₁a₂ + … : expected tokens of a round whose draft k stands with a_k after all before it.

    Args:
        acceptance: conditional, one a draft.
    """
    total, all_stood = 1.0, 1.0
    for a in acceptance:
        all_stood *= a
        total += all_stood
    return total


_LATEST: WeakKeyDictionary[object, dict[Hashable, AdaptiveCount]] = WeakKeyDictionary()


def count_of(
    draft_tokens: int | str | None, usual: int, model: object = None, run: Hashable = None
) -> DraftCount:
    """What ``generate``'s argument ``draft_tokens`` stands for.

    Args:
        draft_tokens: a number, ``None`` for the drafter's usual one, or "auto".
        usual: the drafter's.
        model: whose latest run of the same kind "auto" begins with; with ``None`` it begins anew.
        run: of which kind it is: what costs and acceptance hang on.

    Raises:
        InputError: a number below 1, or another word.
    """
    if draft_tokens == "auto":
        count = AdaptiveCount(usual + 1)  # a chain of two modules was seen to gain most by three drafts
        if model is not None:
            of_model, kind = _LATEST.setdefault(model, {}), (run, count.most)
            if kind in of_model:
                count.begin_with(of_model[kind])
            of_model[kind] = count
        return count
    if isinstance(draft_tokens, str):
        raise InputError(f'draft_tokens: {draft_tokens!r}, expected a number from 1 on, or "auto"')
    return FixedCount(usual if draft_tokens is None else draft_tokens)
