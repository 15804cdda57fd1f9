"""Chrome trace of a run: what each rank did when, for chrome://tracing or Perfetto."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ...files import write_whole
from ...parallel.wires import Flight
from .engine import Span

ACTIONS, STAGES, EXCHANGES = range(3)
"""Rows of one rank in the picture: the schedule's actions, the blocks' stages, the experts' all-to-alls."""


def chrome_trace(
    spans_of_ranks: Sequence[Sequence[Span]],
    stages_of_ranks: Sequence[Sequence[Span]] = (),
    flights_of_ranks: Sequence[Sequence[Flight]] = (),
) -> dict[str, list[dict]]:
    """The trace of all ranks in Chrome's trace event format, times in microseconds from the first action on.

    Args:
        spans_of_ranks: ``StepResult.spans`` of each rank; clocks of several machines may differ.
        stages_of_ranks: ``StepResult.stages``, in a row below. flights_of_ranks: ``StepResult.experts.flights``, in a
            third row: each from when its communication began to when it had arrived, with the times at which it was
            launched ("launch"), waited for ("wait") and taken ("taken").
    """
    begin = min((start for spans in spans_of_ranks for _, start, _ in spans), default=0.0)
    events: list[dict] = []

    def add(rank: int, row: int, name: str, kind: str, start: float, end: float, **times: float) -> None:
        event = {"ph": "X", "name": name, "cat": kind, "pid": rank, "tid": row, "ts": (start - begin) * 1e6,
                 "dur": (end - start) * 1e6}  # fmt: skip
        if times:
            event["args"] = {what: (time - begin) * 1e6 for what, time in times.items()}
        events.append(event)

    for rank, spans in enumerate(spans_of_ranks):
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}})
        for action, start, end in spans:
            add(rank, ACTIONS, action, "FB" if action.startswith("[") else action[0], start, end)
    for rank, stages in enumerate(stages_of_ranks):
        for name, start, end in stages:
            add(rank, STAGES, name, "stage", start, end)
    for rank, flights in enumerate(flights_of_ranks):
        for one in flights:
            times = {"launch": one.launched, "wait": one.awaited, "taken": one.taken}
            add(rank, EXCHANGES, one.name, "exchange", one.began, one.ended, **times)
    return {"traceEvents": events}


def write_chrome_trace(
    path: str | Path,
    spans_of_ranks: Sequence[Sequence[Span]],
    stages_of_ranks: Sequence[Sequence[Span]] = (),
    flights_of_ranks: Sequence[Sequence[Flight]] = (),
) -> None:
    """Write :func:`chrome_trace` to a file.

    Args:
        path: of the JSON file. spans_of_ranks, stages_of_ranks, flights_of_ranks: of each rank.
    """
    trace = chrome_trace(spans_of_ranks, stages_of_ranks, flights_of_ranks)
    write_whole(Path(path), json.dumps(trace))
