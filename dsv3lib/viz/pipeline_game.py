"""A game: the reader puts the actions of a small pipeline in order, the simulator runs and scores them.

    PipelineGame(stages=3, microbatches=4)      # last in a cell: buttons of what each rank could do next

Nothing is refused that could be written down: an order in which ranks wait for each other is a deadlock here too, and
the game names it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from ..errors import ScheduleError
from ..pipeline.actions import Action, Schedule, straight
from ..pipeline.dependencies import walk
from ..pipeline.schedules import SCHEDULES, check_sizes, schedule
from ..pipeline.simulation import Costs, Event, Simulation, run_events, simulate
from ..pipeline.validation import validate
from . import style
from .pipeline import gantt_stack
from .pipeline_view import events_of, look, script, view_data

RIVALS = ("gpipe", "1f1b", "zb1p")


class PipelineGame:
    """A schedule under way, one chunk a rank.

    Args:
        stages: ranks. microbatches: each passes forward and backward everywhere, whole or in its two parts.
        costs: of the actions; F = W = 1, B = 2 by default.

    Raises:
        ConfigError: a size is below 1.
    """

    def __init__(self, stages: int = 3, microbatches: int = 4, costs: Costs | None = None) -> None:
        check_sizes("1f1b", stages, microbatches)
        self.stages, self.microbatches, self.costs = stages, microbatches, costs or Costs()
        self.rows: list[list[Action]] = [[] for _ in range(stages)]
        self._widget: Any = None

    # ---- rules ---------------------------------------------------------------------------------------

    def choices(self, rank: int) -> list[Action]:
        """What a rank could do next: the next forward, the next backward (whole or in parts), weights that wait."""
        row = self.rows[rank]
        count = {kind: sum(one.kind == kind for one in row) for kind in "FBIW"}
        found = []
        if count["F"] < self.microbatches:
            found.append(Action("F", 0, count["F"]))
        backward = count["B"] + count["I"]
        if backward < count["F"]:
            found += [Action("B", 0, backward), Action("I", 0, backward)]
        waiting = [one.microbatch for one in row if one.kind == "I"][count["W"] :]
        if waiting:
            found.append(Action("W", 0, waiting[0]))
        return found

    def play(self, moves: Sequence[tuple[int, str] | list]) -> None:
        """Start again and make these moves, (rank, text of the action) each.

        Raises:
            ScheduleError: a move is none of the rank's choices; what was played before stands.
        """
        before, self.rows = self.rows, [[] for _ in range(self.stages)]
        for rank, text in moves:
            allowed = {str(one): one for one in self.choices(rank)} if 0 <= rank < self.stages else {}
            if text not in allowed:
                self.rows = before
                raise ScheduleError(f"rank {rank}: {text!r} is no move now; there are {', '.join(allowed) or 'none'}")
            self.rows[rank].append(allowed[text])

    def schedule(self) -> Schedule:
        """What stands there so far."""
        rows = [list(row) for row in self.rows]
        return Schedule("yours", self.stages, self.microbatches, rows, straight(self.stages, self.microbatches))

    def finished(self) -> bool:
        """Whether every rank has nothing left to do."""
        return not any(self.choices(rank) for rank in range(self.stages))

    def so_far(self) -> tuple[tuple[Event, ...], str]:
        """The events of all that can run already, and who waits for what."""
        made, done, waiting = self.schedule(), [0] * self.stages, ""
        try:
            for rank, *_ in walk(made):
                done[rank] += 1
        except ScheduleError as error:
            waiting = str(error)
        made.actions = [row[:count] for row, count in zip(made.actions, done, strict=True)]
        return run_events(made, lambda _rank, action: self.costs.of(action.kind)), waiting

    def rivals(self) -> dict[str, Simulation]:
        """The library's schedules of the same size, in time."""
        c = self.costs
        return {
            SCHEDULES[name].title: simulate(schedule(name, self.stages, self.microbatches), c.F, c.B, c.W)
            for name in RIVALS
        }

    # ---- forms ---------------------------------------------------------------------------------------

    def packet(self) -> str:
        """All that the browser shows, as JSON."""
        events, waiting = self.so_far()
        made = self.schedule()
        end = max((float(event.end) for event in events), default=0.0)
        total = self.stages * self.microbatches
        passes = sum({"F": 2, "B": 2, "I": 1, "W": 1}[one.kind] for row in self.rows for one in row)
        rivals = {title: float(one.makespan) for title, one in self.rivals().items()}
        said = f"{passes} of {4 * total} parts placed."
        words = "Compare: " + ", ".join(f"{title} takes {time:g}" for title, time in rivals.items()) + "."
        if waiting and "never does" in waiting:  # somebody may still place it
            waiting = waiting.replace("deadlock in 'yours': ", "Waiting: ").replace("never does", "has not placed yet")
        if self.finished() and not waiting:
            validate(made)
            idle = max(simulate(made, self.costs.F, self.costs.B, self.costs.W).bubble)
            beaten = [title for title, time in rivals.items() if end <= time]
            said = f"Done: it takes {end:g}, idle at most {float(idle):g} a rank."
            words += f" Yours is as fast as, or faster than, {', '.join(beaten) or 'none of them'}."
        shown = Simulation(made, self.costs, events)
        return json.dumps(
            look()
            | {
                "stages": self.stages,
                "makespan": max(end, min(rivals.values())),
                "events": events_of(shown),
                "choices": [[str(one) for one in self.choices(rank)] for rank in range(self.stages)],
                "waiting": waiting,
                "score": said,
                "words": words,
            }
        )

    def figure(self) -> tuple[Figure, str, str]:
        """The rivals' schedules, for a page without a kernel."""
        title = f"To beat: {self.stages} ranks, {self.microbatches} micro-batches"
        return gantt_stack(self.rivals(), title)

    def widget(self) -> Any:
        """The game as a widget, the same one at every call."""
        if self._widget is None:
            self._widget = _widget_class()(data=self.packet())
            self._widget.observe(self._moved, names="moves")
        return self._widget

    def _moved(self, change: Any) -> None:
        try:
            self.play(change["new"])
        except ScheduleError:
            return  # a click that came twice
        self._widget.data = self.packet()

    def _repr_mimebundle_(self, **_options: Any) -> dict[str, Any]:
        """The rivals for a page without a kernel, the game where there is one."""
        return style.bundle(*self.figure()) | view_data(self.widget())


def _widget_class() -> type:
    """The widget's class; anywidget comes with the ``lab`` extra and is wanted only here."""
    import anywidget
    import traitlets

    class PipelineGameWidget(anywidget.AnyWidget):
        """Sends the moves made so far; shows what comes back."""

        _esm = script("pipeline_draw.js", "pipeline_game.js")
        data = traitlets.Unicode("{}").tag(sync=True)
        moves = traitlets.List().tag(sync=True)

    return PipelineGameWidget
