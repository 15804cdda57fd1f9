"""Event simulation of a pipeline schedule: when each action runs, idle time, live activations.

It sees lists of actions, the routes and the costs, and nothing else: no schedule's name decides anything. Each rank
takes its actions in order, each as early as what it needs has arrived. Costs may be integers or fractions, then
every result is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

from ..checks import require
from .actions import KINDS, Action, Schedule
from .dependencies import Dependencies, Result, walk

Number = int | float | Fraction


@dataclass(frozen=True)
class Costs:
    """How long things take, in any unit of time (paper §3.2.1, Table 2).

    Args:
        F: forward pass of one micro-batch through a rank's share of one model, 1/PP of the layers.
        B: the whole backward pass of it. W: its part for the weights; the inputs' part takes B − W.
        FB: an overlapped pair of a forward and a backward pass; F + B by default.
        communication: from the end of an action until its result is there on another rank.
        overlap: share of a communication, 0 to 1, during which the sender computes on; for the rest it waits.

    Raises:
        ConfigError: a cost is negative, not finite or no number, W exceeds B, or the share leaves [0, 1].
    """

    F: Number = 1
    B: Number = 2
    W: Number = 1
    FB: Number | None = None
    communication: Number = 0
    overlap: Number = 1

    def __post_init__(self) -> None:
        if self.FB is None:
            object.__setattr__(self, "FB", self.F + self.B if _is_cost(self.F) and _is_cost(self.B) else 0)
        for name in ("F", "B", "W", "FB", "communication", "overlap"):
            value = getattr(self, name)
            require(_is_cost(value), name, value, "a finite number >= 0, a time")
        require(self.W <= self.B, "W", self.W, f"at most B ({self.B}): W is a part of the backward pass")
        require(self.overlap <= 1, "overlap", self.overlap, "at most 1, the whole of a communication")

    def of(self, kind: str) -> Number:
        """The time of an action of this kind on a rank's whole share."""
        return {"F": self.F, "B": self.B, "I": self.B - self.W, "W": self.W, "FB": self.FB}[kind]


@dataclass(frozen=True, slots=True)
class Event:
    """One action in time."""

    rank: int
    action: Action
    start: Any
    end: Any


@dataclass(frozen=True)
class Simulation:
    """A schedule in time.

    Attributes:
        schedule, costs: what was simulated. timeline: every action with its start and end, in order of start.
    """

    schedule: Schedule
    costs: Costs | None
    timeline: tuple[Event, ...]

    @cached_property
    def makespan(self) -> Any:
        """Time from the start to the end of the last action."""
        return max((event.end for event in self.timeline), default=0)

    @cached_property
    def by_rank(self) -> tuple[tuple[Event, ...], ...]:
        """The events of each rank, in its order."""
        rows: list[list[Event]] = [[] for _ in range(self.schedule.stages)]
        for event in self.timeline:
            rows[event.rank].append(event)
        return tuple(map(tuple, rows))

    @cached_property
    def busy(self) -> list[Any]:
        """Time that each rank computes."""
        return [sum((event.end - event.start for event in row), start=0) for row in self.by_rank]

    @cached_property
    def bubble(self) -> list[Any]:
        """Idle time of each rank: makespan less busy time."""
        return [self.makespan - busy for busy in self.busy]

    @property
    def bubble_share(self) -> float:
        """Idle time of all ranks as a share of all time, 0 to 1."""
        total = float(self.makespan) * self.schedule.stages
        return float(sum(self.bubble)) / total if total else 0.0

    @cached_property
    def peak_activations(self) -> list[Number]:
        """Most micro-batches alive at once on each rank, in units of one micro-batch on 1/PP of the layers."""
        return self.peak_live("W")

    def peak_live(self, until: str = "W") -> list[Number]:
        """The same, counted until the inputs' backward ("I") or the weights' backward ("W") has run."""
        return [_whole(max((live for _, live in row), default=0)) for row in self.live(until)]

    def live(self, until: str = "W") -> list[list[tuple[Any, Number]]]:
        """How many micro-batches are alive on each rank over time.

        Args:
            until: which part of the backward pass lets go of the activations, "I" or "W".

        Returns:
            for each rank (time, live from then on); the forward pass of a pair counts from the pair's start,
            its backward pass until the pair's end.
        """
        ends = ("B", until)
        share = _chunk_shares(self.schedule)
        curves = []
        for rank, row in enumerate(self.by_rank):
            now, curve = 0, []
            for event in row:
                for single in event.action.parts or (event.action,):
                    if single.kind == "F":
                        now += share[rank, single.direction]
                        curve.append((event.start, now))
                for single in event.action.parts or (event.action,):
                    if single.kind in ends:
                        now -= share[rank, single.direction]
                        curve.append((event.end, now))
            curves.append(curve)
        return curves

    @cached_property
    def parameter_copies(self) -> Number:
        """Parameters of the fullest rank, in units of 1/PP of one model."""
        held = [0] * self.schedule.stages
        for (rank, _), share in _chunk_shares(self.schedule).items():
            held[rank] += share
        return _whole(max(held))


def simulate(
    schedule: Schedule,
    F: Number = 1,
    B: Number = 2,
    W: Number = 1,
    FB: Number | None = None,
    communication: Number = 0,
    overlap: Number = 1,
) -> Simulation:
    """Run a schedule in simulated time.

    A chunk that is 1/(2·PP) of the model, as those of an interleaved or V-shaped schedule, takes half of each cost.

    Args:
        schedule: any that can run. F, B, W, FB, communication, overlap: see :class:`Costs`.

    Returns:
        ``.timeline``, ``.bubble`` and ``.peak_activations`` (one number a rank), ``.parameter_copies``, ``.makespan``.

    Raises:
        ConfigError: a cost makes no sense. ScheduleError: the schedule deadlocks; it names the actions.
    """
    costs = Costs(F, B, W, FB, communication, overlap)
    share = _chunk_shares(schedule)
    # A whole share keeps its costs as they are, and fractions stay exact.
    times = {
        (kind, part): costs.of(kind) if part == 1 else _part_of(costs.of(kind), part)
        for kind in KINDS
        for part in set(share.values())
    }

    def duration(rank: int, action: Action) -> Number:
        return times[action.kind, share[rank, action.direction]]

    return Simulation(schedule, costs, run_events(schedule, duration, communication, (1 - overlap) * communication))


def run_events(
    schedule: Schedule, duration: Callable[[int, Action], Any], delay: Any = 0, held: Any = 0
) -> tuple[Event, ...]:
    """Start and end of every action, for any durations.

    Args:
        schedule: actions and routes. duration: (rank, action) → time.
        delay: from the end of an action until its result is there on another rank.
        held: how long a rank waits after an action whose result it sends.

    Returns:
        the events, in order of start, and of rank where they start together.

    Raises:
        ScheduleError: the schedule deadlocks.
    """
    graph = Dependencies.of(schedule)
    free: list[Any] = [0] * len(schedule.actions)
    ready: dict[Result, tuple[int, Any]] = {}
    events = []
    for rank, action, needed, results in walk(schedule):
        start = free[rank]
        for need in needed:
            source, end = ready[need]
            there = end + delay if source != rank else end
            if there > start:
                start = there
        end = start + duration(rank, action)
        free[rank] = end
        if held and any(graph.sends(rank, single) is not None for single in action.parts or (action,)):
            free[rank] = end + held
        for result in results:
            ready[result] = (rank, end)
        events.append(Event(rank, action, start, end))
    order = sorted(range(len(events)), key=lambda i: (events[i].start, events[i].rank, i))
    return tuple(events[i] for i in order)


def _chunk_shares(schedule: Schedule) -> dict[tuple[int, int], Number]:
    """(rank, chunk) → its layers, in units of 1/PP of the model: 1, or a half, which floats hold exactly."""
    return {place: _whole(schedule.stages / len(r.places)) for r in schedule.routes for place in r.places}


def _part_of(cost: Number, part: Number) -> Number:
    """A share of a cost; of a fraction, exactly."""
    return cost * Fraction(part) if isinstance(cost, Fraction) else _whole(cost * part)


def _whole(value: Number) -> Number:
    """An integer where the number is one."""
    return int(value) if value == int(value) else value


def _is_cost(value: Any) -> bool:
    is_number = isinstance(value, int | float | Fraction) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value >= 0
