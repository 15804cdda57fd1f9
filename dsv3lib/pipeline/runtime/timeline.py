"""A real run's trace as a timeline: held against its schedule, and beside the simulation at the costs it measured.

Where processes share cores, the wall clock shows how they got in each other's way. So each action's cost is taken
from the rank's own processor time, and the schedule is simulated once more with it: what the run would take if every
rank had a core to itself. *Differs from the run*: there a whole backward hands its gradient on before the weights'
products are made, in the simulation after them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from ...errors import ScheduleError
from ..actions import Action, Schedule
from ..dependencies import Dependencies
from ..simulation import Event, Simulation, run_events
from .engine import Span

Costs = Mapping[tuple[int, int, str], float]
"""(rank, chunk, kind of action) → seconds; an overlapped pair stands under its forward's chunk."""


def timeline(schedule: Schedule, spans_of_ranks: Sequence[Sequence[Span]]) -> Simulation:
    """What really happened, in the form of a simulation: seconds from the first action on, no costs.

    Args:
        schedule: that was carried out. spans_of_ranks: ``StepResult.spans`` of each of its ranks; of one machine's
            clock.

    Raises:
        ScheduleError: a rank did another action than its list says, or one began before what it needs had begun.
    """
    begin = min((start for spans in spans_of_ranks for _, start, _ in spans), default=0.0)
    events = []
    for rank, (row, spans) in enumerate(zip(schedule.actions, spans_of_ranks, strict=True)):
        _refuse_another_order(rank, row, [name for name, _, _ in spans])
        events += [
            Event(rank, action, start - begin, end - begin)
            for action, (_, start, end) in zip(row, spans, strict=True)
        ]
    events.sort(key=lambda event: (event.start, event.rank))
    _refuse_effects_before_causes(schedule, events)
    return Simulation(schedule, None, tuple(events))


def _refuse_another_order(rank: int, row: Sequence[Action], did: Sequence[str]) -> None:
    for number, action in enumerate(row):
        found = did[number] if number < len(did) else "nothing"
        if found != str(action):
            raise ScheduleError(f"rank {rank}, action {number}: the run did {found}, the schedule says {action}")
    if len(did) > len(row):
        raise ScheduleError(f"rank {rank}: the run did {did[len(row)]} after the schedule's {len(row)} actions")


def _refuse_effects_before_causes(schedule: Schedule, events: Sequence[Event]) -> None:
    graph = Dependencies.of(schedule)
    made, linked = {}, []
    for event in events:
        [(needed, results)] = graph.of_row(event.rank, [event.action])
        linked.append((event, needed))
        made |= dict.fromkeys(results, event)
    for event, needed in linked:
        for need in needed:
            if made[need].start > event.start:
                raise ScheduleError(
                    f"rank {event.rank} began {event.action} at {event.start:.6f} s, before rank {made[need].rank} "
                    f"began {made[need].action}, which it needs, at {made[need].start:.6f} s"
                )


def costs_of(schedule: Schedule, cpu_of_ranks: Sequence[Sequence[float]]) -> Costs:
    """What each kind of action cost each chunk: the median over the micro-batches.

    Args:
        schedule: that was carried out. cpu_of_ranks: ``StepResult.cpu`` of each of its ranks.

    Returns:
        seconds.

    Raises:
        ScheduleError: there are other numbers of times than of actions.
    """
    found: dict[tuple[int, int, str], list[float]] = {}
    for rank, (row, seconds) in enumerate(zip(schedule.actions, cpu_of_ranks, strict=True)):
        if len(row) != len(seconds):
            raise ScheduleError(f"rank {rank}: {len(seconds)} times, expected {len(row)}, one an action")
        for action, one in zip(row, seconds, strict=True):
            found.setdefault((rank, action.direction, action.kind), []).append(one)
    return {key: median(times) for key, times in found.items()}


def simulate_at(schedule: Schedule, costs: Costs, communication: float = 0.0) -> Simulation:
    """The schedule in simulated time, at costs of its own for each chunk and kind of action.

    Args:
        schedule: any that can run. costs: from :func:`costs_of`. communication: seconds from rank to rank.
    """
    events = run_events(schedule, lambda at, a: costs[at, a.direction, a.kind], communication)
    return Simulation(schedule, None, events)


def idle_shares(run: Simulation) -> list[float]:
    """Idle time of each rank as a share, 0 to 1, of the whole run's time."""
    return [float(idle) / float(run.makespan) if run.makespan else 0.0 for idle in run.bubble]
