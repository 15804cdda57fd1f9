"""What an action waits for, and the walk through a schedule: each rank in its own order, as soon as it can.

A *result* is what one pass leaves behind: ``("F", route, depth, microbatch)`` an activation, ``"I"`` the gradient of
a stage's inputs, ``"W"`` that of its weights. A forward pass needs the activation of the place before, an inputs'
backward the gradient from the place after and its own activation, a weights' backward its own inputs' backward.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..errors import ScheduleError
from .actions import Action, Schedule

Result = tuple[str, int, int, int]
"""(kind, route, depth, microbatch)."""


@dataclass(frozen=True)
class Dependencies:
    """The graph of a schedule's routes: what each single action makes and needs.

    Attributes:
        places: (rank, chunk) → (route, depth).
        ranks: for each route the rank at each depth.
    """

    places: dict[tuple[int, int], tuple[int, int]]
    ranks: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, schedule: Schedule) -> Dependencies:
        """The graph of a schedule."""
        places = {
            place: (number, depth)
            for number, route in enumerate(schedule.routes)
            for depth, place in enumerate(route.places)
        }
        return cls(places, tuple(tuple(rank for rank, _ in route.places) for route in schedule.routes))

    def of_row(self, rank: int, row: Sequence[Action]) -> list[tuple[tuple[Result, ...], tuple[Result, ...]]]:
        """What each action of a rank needs before it starts, and what it makes; a pair needs and makes both.

        One loop and no calls: a pipeline of 64 ranks has tens of thousands of actions.
        """
        both = []
        for action in row:
            needs: list[Result] = []
            makes: list[Result] = []
            for single in action.parts or (action,):
                route, depth = self.places[rank, single.direction]
                kind, micro = single.kind, single.microbatch
                if kind == "F":
                    if depth:
                        needs.append(("F", route, depth - 1, micro))
                elif kind == "W":
                    needs.append(("I", route, depth, micro))
                else:
                    if depth < len(self.ranks[route]) - 1:
                        needs.append(("I", route, depth + 1, micro))
                    needs.append(("F", route, depth, micro))
                if kind == "B":
                    makes += [("I", route, depth, micro), ("W", route, depth, micro)]
                else:
                    makes.append((kind, route, depth, micro))
            both.append((tuple(needs), tuple(makes)))
        return both

    def rank_of(self, result: Result) -> int:
        """The rank that makes a result."""
        return self.ranks[result[1]][result[2]]

    def sends(self, rank: int, single: Action) -> int | None:
        """The rank that waits for what this action makes, or None if nobody else does."""
        route, depth = self.places[rank, single.direction]
        towards = {"F": depth + 1, "I": depth - 1, "B": depth - 1}.get(single.kind, -1)
        if not 0 <= towards < len(self.ranks[route]) or self.ranks[route][towards] == rank:
            return None
        return self.ranks[route][towards]


def walk(schedule: Schedule) -> Iterator[tuple[int, Action, tuple[Result, ...], tuple[Result, ...]]]:
    """Carry out every action as soon as its turn on its rank has come and what it needs is there.

    Yields:
        (rank, action, results needed, results made), in an order in which they can happen.

    Raises:
        ScheduleError: the ranks wait for one another, or for something that nobody does; it names the actions.
    """
    graph = Dependencies.of(schedule)
    links = [graph.of_row(rank, row) for rank, row in enumerate(schedule.actions)]
    position = [0] * len(links)
    made: set[Result] = set()
    sleeping: dict[Result, list[int]] = defaultdict(list)
    awake = list(reversed(range(len(links))))
    while awake:
        rank = awake.pop()
        row, mine = schedule.actions[rank], links[rank]
        while position[rank] < len(mine):
            needed, results = mine[position[rank]]
            missing = next((need for need in needed if need not in made), None)
            if missing is not None:
                sleeping[missing].append(rank)
                break
            action = row[position[rank]]
            position[rank] += 1
            yield rank, action, needed, results
            made.update(results)
            for result in results:
                if result in sleeping:
                    awake += sleeping.pop(result)
    if sleeping:
        raise ScheduleError(_deadlock(schedule, graph, position, sleeping))


def _deadlock(
    schedule: Schedule, graph: Dependencies, position: list[int], sleeping: dict[Result, list[int]]
) -> str:
    """The waiting actions in words, following who waits for whom until the circle closes."""
    waits = {rank: result for result, ranks in sleeping.items() for rank in ranks}
    seen: list[int] = []
    rank = min(waits)
    while rank in waits and rank not in seen:
        seen.append(rank)
        rank = graph.rank_of(waits[rank])
    circle = seen[seen.index(rank) :] if rank in seen else seen
    lines = []
    for one in circle:
        result = waits[one]
        other = graph.rank_of(result)
        here = schedule.actions[one][position[one]]
        rest = schedule.actions[other][position[other] :]
        makes = (made for _, made in graph.of_row(other, rest))
        maker = next((a for a, made in zip(rest, makes, strict=True) if result in made), None)
        if maker is None:
            kind, route, depth, micro = result
            chunk = schedule.routes[route].places[depth][1]
            lines.append(f"rank {one} waits at {here} for {kind}{chunk}.{micro}, which rank {other} never does")
        elif maker is here:
            lines.append(f"rank {one} waits at {here} for a part of itself")
        else:
            whose = "its own" if other == one else f"rank {other}'s"
            lines.append(f"rank {one} waits at {here} for {whose} {maker}")
    return f"deadlock in {schedule.name!r}: " + "; ".join(lines)

