"""Where a bubble comes from: the idle time of a rank, gap by gap, in F, B, W and F&B instead of in numbers.

The simulation only adds times and asks which is later. Give it amounts that remember how many F, I, W and F&B they are
made of, and its answer is a formula: the idle time of rank 0 of DualPipe at PP = 8 comes out as 3 F&B + 3 B − 9 W. The
formula holds as long as no comparison turns out differently, that is, near the costs at which it was derived.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from .actions import Action, Schedule
from .simulation import Costs, Number, run_events

SYMBOLS = ("F", "I", "W", "FB")
"""What amounts are counted in; the whole backward B is I + W."""


@dataclass(frozen=True, slots=True)
class Amount:
    """A time as a sum of costs, and its value: ``F, I, W, FB`` say how many of each."""

    value: Number
    counts: tuple[Number, ...] = (0, 0, 0, 0)

    def __add__(self, other: Amount | int) -> Amount:
        if isinstance(other, Amount):
            counts = tuple(a + b for a, b in zip(self.counts, other.counts, strict=True))
            return Amount(self.value + other.value, counts)
        return self if other == 0 else NotImplemented

    __radd__ = __add__

    def __neg__(self) -> Amount:
        return Amount(-self.value, tuple(-count for count in self.counts))

    def __sub__(self, other: Amount | int) -> Amount:
        return self + (-other)

    def __gt__(self, other: Amount | int) -> bool:
        return self.value > (other.value if isinstance(other, Amount) else other)

    def __lt__(self, other: Amount | int) -> bool:
        return self.value < (other.value if isinstance(other, Amount) else other)

    def __str__(self) -> str:
        """The sum in the paper's symbols, with B for I + W."""
        forward, inputs, weights, pairs = self.counts
        terms = [("F&B", pairs), ("F", forward), ("B", inputs), ("W", weights - inputs)]
        words = ""
        for symbol, count in terms:
            if count:
                sign = " − " if count < 0 else " + "
                size = "" if abs(count) == 1 else f"{_plain(abs(count))} "
                words += sign + size + symbol if words else ("−" if count < 0 else "") + size + symbol
        return words or "0"


@dataclass(frozen=True)
class Gap:
    """A time in which a rank waits: before which action, from when, and how long."""

    before: Action | None
    start: Amount
    length: Amount


@dataclass(frozen=True)
class Derivation:
    """The idle time of one rank in symbols: ``total`` is the sum of its ``gaps``."""

    rank: int
    total: Amount
    gaps: tuple[Gap, ...]


def derive(schedule: Schedule, rank: int = 0, costs: Costs | None = None) -> Derivation:
    """The idle time of a rank as a formula.

    Args:
        schedule: any that can run. rank: whose. costs: the point near which the formula holds (F = I = W = 1 and
            F&B = 3 by default). Where two paths are as long as each other there, their sums differ in symbols and
            agree in value; the one met first is taken.

    Raises:
        ScheduleError: the schedule deadlocks.
    """
    costs = costs or Costs()
    unit = {
        "F": _one("F", costs.of("F")), "I": _one("I", costs.of("I")), "W": _one("W", costs.of("W")),
        "FB": _one("FB", costs.of("FB")),
    }  # fmt: skip
    unit["B"] = unit["I"] + unit["W"]
    share = {
        (at, chunk): Fraction(schedule.stages, len(route.places))
        for route in schedule.routes
        for at, chunk in route.places
    }
    times = {(kind, part): _scaled(amount, part) for kind, amount in unit.items() for part in share.values()}
    events = run_events(schedule, lambda at, action: times[action.kind, share[at, action.direction]])
    end = max((event.end for event in events), key=lambda amount: amount.value)
    now, gaps = Amount(0), []
    for event in events:
        if event.rank == rank:
            start = event.start if isinstance(event.start, Amount) else Amount(event.start)
            if start > now:
                gaps.append(Gap(event.action, now, start - now))
            now = event.end
    if end > now:
        gaps.append(Gap(None, now, end - now))
    return Derivation(rank, sum((gap.length for gap in gaps), start=Amount(0)), tuple(gaps))


def _one(symbol: str, value: Number) -> Amount:
    return Amount(value, tuple(int(symbol == other) for other in SYMBOLS))


def _scaled(amount: Amount, part: Fraction) -> Amount:
    if part == 1:
        return amount
    return Amount(amount.value * float(part), tuple(count * part for count in amount.counts))


def _plain(count: Number) -> str:
    return str(int(count)) if count == int(count) else str(count)
