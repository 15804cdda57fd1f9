"""A pipeline schedule as plain data: actions, the routes that micro-batches take, and who does what in which order.

A rank carries out a list of actions one after the other. An action is a forward pass ``F``, a whole backward pass
``B``, one of its two parts (``I``, the gradient of the inputs; ``W``, the gradient of the weights), or an overlapped
pair ``FB``: a forward and a backward pass side by side (paper §3.2.1, Figure 4). Nothing here computes; validation,
simulation and the runtime all read the same lists.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..errors import ScheduleError

Kind = Literal["F", "B", "I", "W", "FB"]
KINDS: tuple[Kind, ...] = ("F", "B", "I", "W", "FB")

_SINGLE = re.compile(r"\s*([FBIW])(\d+)\.(\d+)\s*")
_PAIR = re.compile(r"\s*\[(.+)&(.+)\]\s*")


@dataclass(frozen=True, slots=True)
class Action:
    """One thing that a rank does for one micro-batch; an overlapped pair does it for two.

    Args:
        kind: "F" forward, "B" whole backward, "I" its part for the inputs, "W" its part for the weights,
            "FB" an overlapped pair.
        direction: which way the micro-batch travels, counted from rank 0 (0: from rank 0 on, 1: from the last rank);
            where a rank holds two chunks of one model instead, the number of the chunk.
        microbatch: counted from 0 in its direction.
        parts: of a pair, its forward and its backward; empty otherwise.
    """

    kind: Kind
    direction: int = 0
    microbatch: int = 0
    parts: tuple[Action, ...] = ()

    @property
    def chunk(self) -> int:
        """The chunk of the model that computes, among those of the rank: the same number as the direction."""
        return self.direction

    def singles(self) -> tuple[Action, ...]:
        """The parts of a pair, or the action itself."""
        return self.parts or (self,)

    def __str__(self) -> str:
        if self.parts:
            return f"[{' & '.join(map(str, self.parts))}]"
        return f"{self.kind}{self.direction}.{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """The action that a text such as ``F0.3`` or ``[F0.7 & B1.3]`` stands for.

        Raises:
            ScheduleError: the text is no action.
        """
        if found := _SINGLE.fullmatch(text):
            return cls(found[1], int(found[2]), int(found[3]))
        if found := _PAIR.fullmatch(text):
            return pair(cls.parse(found[1]), cls.parse(found[2]))
        raise ScheduleError(f"{text!r} is no action; write F0.3, B0.3, I0.3, W0.3 or [F0.7 & B1.3]")


def pair(forward: Action, backward: Action) -> Action:
    """An overlapped pair: a forward and a whole backward pass of two micro-batches, side by side.

    Raises:
        ScheduleError: the parts are not an F and a B.
    """
    if (forward.kind, backward.kind) != ("F", "B"):
        raise ScheduleError(f"[{forward} & {backward}]: a pair is a forward F and a whole backward B")
    return Action("FB", forward.direction, forward.microbatch, (forward, backward))


@dataclass(frozen=True)
class Route:
    """The places that a micro-batch visits on its way forward; backward it takes the same way home.

    Args:
        places: (rank, chunk) in the order of the model's layers; each holds as many layers.
        microbatches: how many travel on it, numbered from 0.
    """

    places: tuple[tuple[int, int], ...]
    microbatches: int


@dataclass
class Schedule:
    """Who does what, in which order.

    Args:
        name: for people; nothing is computed from it.
        stages: pipeline ranks, PP.
        microbatches: the total over all routes.
        actions: one list for each rank.
        routes: one model cut into places; two for a schedule with two directions.
    """

    name: str
    stages: int
    microbatches: int
    actions: list[list[Action]]
    routes: tuple[Route, ...]

    @classmethod
    def by_hand(
        cls, rows: Sequence[Sequence[Action | str]], routes: tuple[Route, ...], name: str = "by hand"
    ) -> Schedule:
        """A schedule from lists of actions or of their texts, one list a rank; :func:`~.validate` judges it.

        Raises:
            ScheduleError: a text is no action.
        """
        actions = [[one if isinstance(one, Action) else Action.parse(one) for one in row] for row in rows]
        return cls(name, len(actions), sum(route.microbatches for route in routes), actions, routes)

    def copy(self, name: str | None = None) -> Schedule:
        """A copy whose lists can be changed while this one stays."""
        return replace(self, name=name or self.name, actions=[list(row) for row in self.actions])

    def swapped(self, rank: int, first: int, second: int) -> Schedule:
        """A copy in which two actions of a rank have changed places."""
        changed = self.copy(f"{self.name}, two actions swapped")
        row = changed.actions[rank]
        row[first], row[second] = row[second], row[first]
        return changed

    def rows(self) -> list[str]:
        """The actions of each rank as one line of text."""
        return [" ".join(map(str, row)) for row in self.actions]


def straight(stages: int, microbatches: int) -> tuple[Route, ...]:
    """One chunk a rank, from rank 0 to the last: GPipe, 1F1B, ZB1P."""
    return (Route(tuple((rank, 0) for rank in range(stages)), microbatches),)


def looped(stages: int, microbatches: int, chunks: int = 2) -> tuple[Route, ...]:
    """Several chunks a rank, round after round from rank 0 to the last: interleaved 1F1B."""
    return (Route(tuple((rank, chunk) for chunk in range(chunks) for rank in range(stages)), microbatches),)


def vee(stages: int, microbatches: int) -> tuple[Route, ...]:
    """Two chunks a rank, down to the last rank and back up to rank 0: ZBV, DualPipeV."""
    down = [(rank, 0) for rank in range(stages)]
    return (Route(tuple(down + [(rank, 1) for rank in reversed(range(stages))]), microbatches),)


def both_ways(stages: int, microbatches: int) -> tuple[Route, ...]:
    """Two copies of the model, entered from both ends, half of the micro-batches each: DualPipe."""
    there = tuple((rank, 0) for rank in range(stages))
    back = tuple((rank, 1) for rank in reversed(range(stages)))
    return Route(there, microbatches // 2), Route(back, microbatches // 2)
