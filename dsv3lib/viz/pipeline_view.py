"""A pipeline schedule stepped by a slider: schedule, sizes and costs as controls, bubble and memory beside it.

    PipelineView("dualpipe", stages=8, microbatches=20)      # last in a cell: the widget; without a kernel, the picture

Python simulates when a control changes (some ten milliseconds); the browser draws, so that a step of the slider needs
no kernel at all.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from matplotlib.figure import Figure

from ..errors import ConfigError
from ..pipeline.schedules import SCHEDULES, schedule
from ..pipeline.simulation import Simulation, simulate
from . import style
from .pipeline import NAMES, gantt, title_of

COSTS = ("F", "B", "W", "FB", "communication")


class PipelineView:
    """A view of one schedule in time.

    Args:
        name: of the schedule. stages, microbatches: its sizes.
        costs: any of F, B, W, FB and communication; see :class:`dsv3lib.pipeline.Costs`.

    Raises:
        ConfigError: the sizes or costs make no sense.
    """

    def __init__(self, name: str = "dualpipe", stages: int = 8, microbatches: int = 20, **costs: float) -> None:
        self.simulated = simulate(schedule(name, stages, microbatches), **costs)
        self._widget: Any = None

    def figure(self) -> tuple[Figure, str, str]:
        """The view as a still picture, its alt text and its caption."""
        return gantt(self.simulated)

    def widget(self) -> Any:
        """The view as a widget, the same one at every call."""
        if self._widget is None:
            self._widget = _widget_class()(data=packet(self.simulated))
        return self._widget

    def _repr_mimebundle_(self, **_options: Any) -> dict[str, Any]:
        """The still picture for a page without a kernel, the widget where there is one."""
        return style.bundle(*self.figure()) | view_data(self.widget())


def view_data(widget: Any) -> dict[str, Any]:
    """A widget's entry in a notebook's output, without the text that stands for it."""
    view = widget._repr_mimebundle_()
    view = view[0] if isinstance(view, tuple) else view
    return {name: value for name, value in (view or {}).items() if name.startswith("application/vnd.jupyter")}


def events_of(simulated: Simulation) -> list[list[Any]]:
    """The timeline as the browser takes it: rank, start, end, kind, then direction and micro-batch of each part."""
    return [
        [event.rank, float(event.start), float(event.end), event.action.kind]
        + [number for single in event.action.singles() for number in (single.direction, single.microbatch)]
        for event in simulated.timeline
    ]


def look() -> dict[str, Any]:
    """Colours and words that the browser draws with."""
    return {"palette": {**style.PALETTE, "ink": style.INK, "paper": style.PAPER}, "names": NAMES}


def packet(simulated: Simulation) -> str:
    """All that the view shows, as JSON."""
    made, costs = simulated.schedule, simulated.costs
    settings = {"name": made.name, "stages": made.stages, "microbatches": made.microbatches}
    return json.dumps(
        look()
        | {
            "title": title_of(simulated),
            "stages": made.stages,
            "schedules": [[name, kind.title] for name, kind in SCHEDULES.items()],
            "settings": settings | {name: float(getattr(costs, name)) for name in COSTS},
            "makespan": float(simulated.makespan),
            "events": events_of(simulated),
            "bubble": [float(idle) for idle in simulated.bubble],
            "peak": [float(peak) for peak in simulated.peak_activations],
            "live": [[[float(t), float(n)] for t, n in curve] for curve in simulated.live()],
            "share": simulated.bubble_share,
            "copies": float(simulated.parameter_copies),
        }
    )


def answer(settings: dict[str, Any]) -> str:
    """What the view shows for the settings of its controls: a packet, or why there is none, as JSON."""
    try:
        sizes = (int(settings["stages"]), int(settings["microbatches"]))
        costs = {name: float(settings[name]) for name in COSTS}
        if max(sizes) > 512:
            raise ConfigError(f"{max(sizes)} is more than this view draws; at most 512")
        return packet(simulate(schedule(str(settings["name"]), *sizes), **costs))
    except ConfigError as error:
        return json.dumps({"error": str(error)})
    except (KeyError, TypeError, ValueError):
        return json.dumps({"error": "a control is empty or holds no number"})


def script(*names: str) -> str:
    """JavaScript files of this folder, one after the other: a module for the browser."""
    return "\n".join((files("dsv3lib.viz") / name).read_text(encoding="utf-8") for name in names)


def _widget_class() -> type:
    """The widget's class; anywidget comes with the ``lab`` extra and is wanted only here."""
    import anywidget
    import traitlets

    class PipelineWidget(anywidget.AnyWidget):
        """Draws a packet; asks for another when a control changes."""

        _esm = script("pipeline_draw.js", "pipeline_view.js")
        data = traitlets.Unicode("{}").tag(sync=True)
        settings = traitlets.Dict().tag(sync=True)

        @traitlets.observe("settings")
        def _simulate(self, change: Any) -> None:
            self.data = answer(change["new"])

    return PipelineWidget
