"""Validation of a pipeline schedule: complete, in order, no deadlock, every send with its receive.

One validator for every schedule, those of the library and those made by hand. It reads actions and routes alone.
"""

from __future__ import annotations

from collections import defaultdict

from ..errors import ScheduleError
from .actions import KINDS, Action, Schedule
from .dependencies import Dependencies, walk


def validate(schedule: Schedule) -> None:
    """Check that a schedule can run and does everything exactly once.

    Each micro-batch passes forward and backward once at each place of its route, the backward whole (B) or in its two
    parts (I, then W); every action's dependencies are met in some order of the ranks; and what a rank sends to
    another comes in the order in which the other takes it.

    Args:
        schedule: actions and routes.

    Raises:
        ScheduleError: names the rank and the action: unknown, missing, doubled or out of order; in a deadlock, the
            actions that wait for each other; on a link, the send that another receive meets.
    """
    if len(schedule.actions) != schedule.stages:
        raise ScheduleError(
            f"{schedule.name!r} has lists of actions for {len(schedule.actions)} ranks, expected {schedule.stages}"
        )
    graph = Dependencies.of(schedule)
    for rank, row in enumerate(schedule.actions):
        _check_known(schedule, graph, rank, row)
        _check_once(schedule, rank, row)
    for _ in walk(schedule):
        pass
    _check_links(schedule, graph)


def _check_known(schedule: Schedule, graph: Dependencies, rank: int, row: list[Action]) -> None:
    """Every action is of a kind, a chunk and a micro-batch that there are."""
    for action in row:
        wrong = None
        if action.kind not in KINDS:
            wrong = f"the kind is {action.kind!r}, expected one of {', '.join(KINDS)}"
        elif (action.kind == "FB") != (len(action.parts) == 2):
            wrong = f"has {len(action.parts)} parts; a pair FB has two, all others none"
        elif action.parts and (action.parts[0].kind, action.parts[1].kind) != ("F", "B"):
            wrong = "a pair is a forward F and a whole backward B"
        for single in () if wrong else action.parts or (action,):
            place = graph.places.get((rank, single.direction))
            if place is None:
                there = sorted(chunk for at, chunk in graph.places if at == rank)
                wrong = f"no direction or chunk {single.direction} here, expected one of {there}"
            elif not 0 <= single.microbatch < schedule.routes[place[0]].microbatches:
                count = schedule.routes[place[0]].microbatches
                wrong = f"micro-batch {single.microbatch}, expected one in [0, {count})"
        if wrong:
            raise ScheduleError(f"rank {rank} of {schedule.name!r}, {action}: {wrong}")


def _check_once(schedule: Schedule, rank: int, row: list[Action]) -> None:
    """Every pass exactly once, and in an order in which the rank itself can do them."""
    at: dict[tuple[str, int, int], int] = {}
    for number, action in enumerate(row):
        for single in action.parts or (action,):
            key = (single.kind, single.direction, single.microbatch)
            if key in at:
                raise ScheduleError(f"rank {rank} of {schedule.name!r}: {single} stands there twice")
            at[key] = number
    for route in schedule.routes:
        for place, chunk in route.places:
            if place == rank:
                _check_passes(schedule.name, rank, chunk, route.microbatches, at)


def _check_passes(
    name: str, rank: int, chunk: int, count: int, at: dict[tuple[str, int, int], int]
) -> None:
    """Each micro-batch of one chunk: forward, then backward, whole or in its two parts."""
    where = f"rank {rank} of {name!r}"
    for micro in range(count):
        forward, whole, inputs, weights = (at.get((kind, chunk, micro)) for kind in ("F", "B", "I", "W"))
        what = f"{chunk}.{micro}"
        if forward is None:
            raise ScheduleError(f"{where}: F{what} is missing")
        if whole is not None and (inputs is not None or weights is not None):
            part = "I" if inputs is not None else "W"
            raise ScheduleError(
                f"{where}: B{what} is the whole backward, and {part}{what} does a part of it again"
            )
        if whole is None and inputs is None:
            raise ScheduleError(f"{where}: F{what} has no backward: B{what}, or I{what} and W{what}, is missing")
        if whole is None and weights is None:
            raise ScheduleError(f"{where}: I{what} is there, and W{what}, the weights' part, is missing")
        first, backward = (inputs, "I") if whole is None else (whole, "B")
        if first < forward:
            raise ScheduleError(f"{where}: {backward}{what} stands before its forward F{what}")
        if weights is not None and weights < inputs:
            raise ScheduleError(f"{where}: W{what} stands before I{what}, whose result it needs")


def _check_links(schedule: Schedule, graph: Dependencies) -> None:
    """What one rank sends another on a link, in order, is what the other takes, in order (first in, first out)."""
    sent: dict[tuple, list[int]] = defaultdict(list)
    taken: dict[tuple, list[int]] = defaultdict(list)
    for rank, row in enumerate(schedule.actions):
        for action in row:
            for single in action.parts or (action,):
                if single.kind == "W":
                    continue
                route, depth = graph.places[rank, single.direction]
                ranks, kind = graph.ranks[route], "F" if single.kind == "F" else "I"
                source, target = (depth - 1, depth + 1) if kind == "F" else (depth + 1, depth - 1)
                if 0 <= target < len(ranks) and ranks[target] != rank:
                    sent[kind, route, depth].append(single.microbatch)
                if 0 <= source < len(ranks) and ranks[source] != rank:
                    taken[kind, route, source].append(single.microbatch)
    for link in sent.keys() | taken.keys():
        if sent[link] == taken[link]:
            continue
        kind, route, depth = link
        other = depth + 1 if kind == "F" else depth - 1
        source, target = graph.ranks[route][depth], graph.ranks[route][other]
        chunk = schedule.routes[route].places[other][1]
        wrong = next((s, t) for s, t in zip(sent[link], taken[link], strict=False) if s != t)
        what, taker = ("activation", "F") if kind == "F" else ("gradient", "B")
        raise ScheduleError(
            f"{schedule.name!r}: rank {source} sends rank {target} the {what} of micro-batch {wrong[0]}, and there "
            f"{taker}{chunk}.{wrong[1]} is next to take one: sends and receives of a link must come in the same order"
        )

