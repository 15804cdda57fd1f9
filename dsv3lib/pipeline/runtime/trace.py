"""Chrome trace of a run: what each rank did when, for chrome://tracing or Perfetto."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ...files import write_whole
from .engine import Span


def chrome_trace(spans_of_ranks: Sequence[Sequence[Span]]) -> dict[str, list[dict]]:
    """The trace of all ranks in Chrome's trace event format, times in microseconds from the first action on.

    Args:
        spans_of_ranks: ``StepResult.spans`` of each rank; clocks of several machines may differ.
    """
    begin = min((start for spans in spans_of_ranks for _, start, _ in spans), default=0.0)
    events: list[dict] = []
    for rank, spans in enumerate(spans_of_ranks):
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}})
        for action, start, end in spans:
            kind = "FB" if action.startswith("[") else action[0]
            events.append(
                {"ph": "X", "name": action, "cat": kind, "pid": rank, "tid": 0,
                 "ts": (start - begin) * 1e6, "dur": (end - start) * 1e6}
            )  # fmt: skip
    return {"traceEvents": events}


def write_chrome_trace(path: str | Path, spans_of_ranks: Sequence[Sequence[Span]]) -> None:
    """Write :func:`chrome_trace` to a file.

    Args:
        path: of the JSON file. spans_of_ranks: of each rank.
    """
    write_whole(Path(path), json.dumps(chrome_trace(spans_of_ranks)))
