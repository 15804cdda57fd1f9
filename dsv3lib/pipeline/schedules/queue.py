"""A rank's actions, written down one after the other: who is next in each direction, and which weights wait."""

from __future__ import annotations

from collections import Counter, deque

from ..actions import Action, pair


class ActionQueue:
    """Appends actions; numbers the micro-batches of each direction or chunk by itself.

    Attributes:
        actions: what has been written down. deferred: weights' backwards that wait, oldest first.
    """

    def __init__(self) -> None:
        self.actions: list[Action] = []
        self.deferred: deque[Action] = deque()
        self._next: Counter[tuple[str, int]] = Counter()

    def count(self, kind: str, direction: int) -> int:
        """How many passes there have been: "F" forward, "B" backward (whole, or their inputs' part)."""
        return self._next[kind, direction]

    def _take(self, kind: str, direction: int) -> int:
        number = self._next[kind, direction]
        self._next[kind, direction] += 1
        return number

    def forward(self, direction: int) -> None:
        """The next forward pass of a direction."""
        self.actions.append(Action("F", direction, self._take("F", direction)))

    def backward(self, direction: int) -> None:
        """The next backward pass of a direction, whole."""
        self.actions.append(Action("B", direction, self._take("B", direction)))

    def inputs(self, direction: int) -> None:
        """The inputs' part of the next backward pass; its weights' part waits."""
        number = self._take("B", direction)
        self.actions.append(Action("I", direction, number))
        self.deferred.append(Action("W", direction, number))

    def oldest_weights(self) -> None:
        """The weights' backward that has waited longest."""
        self.actions.append(self.deferred.popleft())

    def split_backward(self, direction: int) -> None:
        """The next backward pass in its two parts, one right after the other."""
        self.inputs(direction)
        self.actions.append(self.deferred.pop())

    def overlapped(self, forward: int, backward: int) -> None:
        """A pair: the next forward pass of one direction beside the next backward pass of another."""
        f = Action("F", forward, self._take("F", forward))
        self.actions.append(pair(f, Action("B", backward, self._take("B", backward))))
