"""Asynchronous communication: work that is launched, goes on beside the arithmetic, and is waited for later.

An exchange of expert parallelism has two hops, and the second begins when the first has arrived. So it is a thread of
its own that carries exchanges out, one after the other in the order of their launch: what DeepSeek-V3 gives 20 of a
GPU's 132 multiprocessors (paper §3.2.2) is here a thread, which waits for the network while the rank computes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch


class Flight(NamedTuple):
    """One exchange in time, seconds of the wall clock.

    Args:
        name: whose it is, and what.
        launched: from when on it could go.
        began, ended: when the communication itself began, and had arrived.
        awaited: when the rank began to wait for it: from ``launched`` to here the rank computed something else.
        taken: when it went on.
    """

    name: str
    launched: float
    began: float
    ended: float
    awaited: float
    taken: float


class UnderWay:
    """An exchange that was launched."""

    def __init__(self, name: str, launched: float, future: Future, flights: list[Flight]) -> None:
        self._name, self._launched, self._future, self._flights = name, launched, future, flights

    def wait(self) -> Any:
        """What the exchange brought; raises what it raised."""
        awaited = time.time()
        result, began, ended = self._future.result()
        self._flights.append(Flight(self._name, self._launched, began, ended, awaited, time.time()))
        return result


class Wires:
    """Where a rank's exchanges are launched, in the same order on all ranks that take part in them.

    Args:
        at_once: launch and wait at once, so that nothing is overlapped: the slow twin, with the same numbers.

    Attributes:
        flights: those that have been waited for, in that order.
    """

    def __init__(self, at_once: bool = False) -> None:
        self.flights: list[Flight] = []
        self._thread = None if at_once else ThreadPoolExecutor(1, thread_name_prefix="exchanges")

    def launch(self, name: str, exchange: Callable[[], Any]) -> UnderWay:
        """Let an exchange go.

        Args:
            name: for the trace. exchange: makes it, and returns what it brought.
        """
        launched = time.time()
        if self._thread is not None:
            return UnderWay(name, launched, self._thread.submit(_carry_out, exchange), self.flights)
        done: Future = Future()
        done.set_result(_carry_out(exchange))
        flight = UnderWay(name, launched, done, [])
        flight.wait()
        result, began, ended = done.result()
        self.flights.append(Flight(name, launched, began, ended, launched, time.time()))
        return flight


def _carry_out(exchange: Callable[[], Any]) -> tuple[Any, float, float]:
    began = time.time()
    with torch.no_grad():  # a thread has its own grad mode
        result = exchange()
    return result, began, time.time()
