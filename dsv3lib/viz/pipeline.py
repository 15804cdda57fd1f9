"""Gantt charts of pipeline schedules: who does what when, who waits, and how many micro-batches are alive.

A box is an action: forward, the inputs' and the weights' part of a backward pass, a whole backward pass (both parts
one above the other), an overlapped pair (forward above backward). Micro-batches of direction 1 (or of a rank's
second chunk) are striped. What is white between the boxes is idle time, the bubble.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..pipeline.actions import Action
from ..pipeline.schedules import SCHEDULES
from ..pipeline.simulation import Simulation
from . import style
from .diagram import diagram

BANDS: Mapping[str, tuple[tuple[str, float, float], ...]] = {
    "F": (("forward", 0.0, 1.0),),
    "I": (("backward-input", 0.0, 1.0),),
    "W": (("backward-weight", 0.0, 1.0),),
    "B": (("backward-input", 0.0, 0.5), ("backward-weight", 0.5, 1.0)),
    "FB": (("forward", 0.0, 0.5), ("backward-input", 0.5, 0.75), ("backward-weight", 0.75, 1.0)),
}
"""Kind → (meaning, from, to) of the bands of its box, from its upper edge down."""

NAMES = {
    "forward": "forward F", "backward-input": "backward, inputs I", "backward-weight": "backward, weights W",
}  # fmt: skip
_TALL = 0.86
_MOST_LABELS = 420
"""Labelled boxes beyond which matplotlib takes too long and nobody can read them."""


def title_of(simulated: Simulation) -> str:
    """A schedule's written name and its sizes."""
    made = simulated.schedule
    name = SCHEDULES[made.name].title if made.name in SCHEDULES else made.name
    return f"{name}, {made.stages} ranks, {made.microbatches} micro-batch{'es' * (made.microbatches > 1)}"


def gantt(simulated: Simulation, title: str | None = None) -> tuple[Figure, str, str]:
    """One schedule in time, with each rank's idle time and peak of live micro-batches beside it.

    Args:
        simulated: what :func:`dsv3lib.pipeline.simulate` returned. title: by default the schedule's name and sizes.

    Returns:
        the figure, its alt text and its caption.
    """
    made = simulated.schedule
    fig, axes = style.figure(
        title or title_of(simulated), None, None, columns=3, size=(11.0, 1.9 + 0.24 * made.stages),
        width_ratios=[8, 1.3, 1.3], sharey=True,
    )  # fmt: skip
    draw_gantt(axes[0], simulated)
    axes[0].set(xlabel="time (in units of the costs)", ylabel="rank")
    for ax, values, meaning, label in (
        (axes[1], simulated.bubble, "neutral", "idle time"),
        (axes[2], simulated.peak_activations, "content", "peak live\nmicro-batches"),
    ):
        ax.barh(range(made.stages), [float(v) for v in values], height=_TALL, **style.bar(meaning))
        ax.set(xlabel=label, xlim=(0, 1.45 * float(max([*values, 1]))))
        ax.grid(False)
        if made.stages <= 16:
            for rank, value in enumerate(values):
                ax.text(float(value), rank, f" {float(value):g}", va="center", fontsize=9)
    fig.legend(handles=legend(simulated), loc="outside lower center", ncols=4)
    return fig, _alt(simulated), _caption(simulated)


def gantt_stack(runs: Mapping[str, Simulation], title: str) -> tuple[Figure, str, str]:
    """Several schedules one above the other, on one axis of time.

    Args:
        runs: heading → simulation; the heading gets the idle time behind it. title: of the whole.

    Returns:
        the figure, its alt text and its caption.
    """
    ranks = [one.schedule.stages for one in runs.values()]
    fig, axes = style.figure(
        title, None, None, rows=len(runs), size=(10.5, 1.1 + sum(0.62 + 0.155 * n for n in ranks)), sharex=True,
        height_ratios=[n + 1 for n in ranks], squeeze=False,
    )  # fmt: skip
    longest = max(float(one.makespan) for one in runs.values())
    for ax, (heading, one) in zip(axes[:, 0], runs.items(), strict=True):
        draw_gantt(ax, one, labels=False)
        words = f"{heading}: takes {float(one.makespan):g}, idle {float(max(one.bubble)):g} a rank"
        ax.set_title(words, fontsize=10.5, fontweight="normal", pad=3)
        ax.set(ylabel="rank", xlim=(0, longest))
    axes[-1, 0].set_xlabel("time (in units of the costs)")
    fig.legend(handles=legend(*runs.values()), loc="outside lower center", ncols=4)
    alt = "Charts of time, one above the other, a row for each rank: " + "; ".join(
        f"{heading} ends at {float(one.makespan):g} and leaves {float(max(one.bubble)):g} idle"
        for heading, one in runs.items()
    )
    return fig, alt + ".", "White is idle time. All charts have the same axis: what ends further left is faster."


def live_curve(simulated: Simulation, ranks: tuple[int, ...] = (0,)) -> tuple[Figure, str, str]:
    """How many micro-batches are alive on some ranks, above what the rank is doing.

    Args:
        simulated: a schedule in time. ranks: one panel each.

    Returns:
        the figure, its alt text and its caption.
    """
    fig, axes = style.figure(
        f"Live micro-batches: {title_of(simulated)}", None, None, rows=2 * len(ranks), sharex=True,
        size=(10.5, 0.9 + 2.1 * len(ranks)), height_ratios=[5, 1] * len(ranks),
    )  # fmt: skip
    curves, peak = simulated.live(), float(max(simulated.peak_activations))
    for number, rank in enumerate(ranks):
        ax, below = axes[2 * number], axes[2 * number + 1]
        times = [0.0, *(float(t) for t, _ in curves[rank])]
        live = [0.0, *(float(n) for _, n in curves[rank])]
        ax.step(times, live, where="post", **style.line("content") | {"marker": "", "linestyle": "-"})
        ax.axhline(simulated.schedule.stages, **style.line("neutral") | {"marker": "", "linewidth": 1.2})
        ax.set(ylabel=f"live on rank {rank}", ylim=(0, peak + 1.5))
        ax.text(0.3, simulated.schedule.stages, "PP ", va="bottom", fontsize=9)
        draw_gantt(below, simulated, only=rank, labels=False)
    axes[-1].set_xlabel("time (in units of the costs)")
    fig.legend(handles=legend(simulated), loc="outside lower center", ncols=4)
    alt = (
        f"A step curve for each of rank {', '.join(map(str, ranks))}: it climbs while the pipeline fills, touches "
        f"its highest value {peak:g} during overlapped pairs and falls to zero; the actions run below it."
    )
    caption = "One above PP, and only while a forward pass has begun and the backward pass with it has not ended."
    return fig, alt, caption


def journey(simulated: Simulation, microbatch: int = 0) -> tuple[Figure, str, str]:
    """One micro-batch on its way down all ranks and back, with the times at which it passes.

    Args:
        simulated: a schedule with one chunk a rank and whole backward passes. microbatch: which.

    Returns:
        the figure, its alt text and its caption.
    """
    ranks = simulated.schedule.stages
    times = {(e.rank, str(e.action)): f"time {e.start:g} to {e.end:g}" for e in simulated.timeline}
    drawn = diagram(f"Micro-batch {microbatch}: down with activations, back with gradients", 2.3 * ranks + 0.2, 2.2)
    for y, kind, meaning in ((1.25, "F", "forward"), (0.25, "B", "backward-input")):
        name = f"{kind}0.{microbatch}"
        lane = [
            drawn.box(0.2 + 2.3 * r, y, f"rank {r}: {name}", times[r, name], meaning=meaning, w=1.75)
            for r in range(ranks)
        ]
        way = lane if kind == "F" else lane[::-1]
        for one, other in zip(way, way[1:], strict=False):
            drawn.arrow(one, other)
    return drawn.done(
        alt=f"Two rows of {ranks} boxes. Forward: from rank 0 to rank {ranks - 1}. Backward: back again, later.",
        caption="A rank cannot start before the arrow into it has come: that is all a simulator needs.",
    )


def draw_gantt(ax: Axes, simulated: Simulation, labels: bool = True, only: int | None = None) -> None:
    """Draw the boxes of a schedule into axes, rank 0 on top.

    Args:
        ax: where. simulated: what. labels: numbers of micro-batches, where there are few enough. only: one rank.
    """
    boxes: dict[tuple[str, bool], list] = defaultdict(list)
    events = [event for event in simulated.timeline if only in (None, event.rank)]
    for event in events:
        for meaning, striped, top, bottom in _bands(event.action):
            y = event.rank - _TALL / 2
            begin, end, high, low = float(event.start), float(event.end), y + top * _TALL, y + bottom * _TALL
            boxes[meaning, striped].append([(begin, high), (end, high), (end, low), (begin, low)])
    for (meaning, striped), corners in boxes.items():
        ax.add_collection(
            PolyCollection(
                corners, facecolor=style.colour(meaning), edgecolor=style.PAPER, linewidth=0.4,
                hatch="////" if striped else None,
            )
        )  # fmt: skip
    frames = [
        [(float(e.start), e.rank - _TALL / 2), (float(e.end), e.rank - _TALL / 2),
         (float(e.end), e.rank + _TALL / 2), (float(e.start), e.rank + _TALL / 2)]
        for e in events
    ]  # fmt: skip
    ax.add_collection(PolyCollection(frames, facecolor="none", edgecolor=style.INK, linewidth=0.5))
    if labels and len(events) <= _MOST_LABELS:
        for event in events:
            words = "\n".join(str(single.microbatch) for single in event.action.singles())
            ax.text(
                float(event.start + event.end) / 2, event.rank, words, ha="center", va="center", fontsize=6.5,
                color="white", linespacing=1.0,
                bbox={"facecolor": style.INK, "edgecolor": "none", "pad": 0.6, "alpha": 0.55},
            )  # fmt: skip
    stages = simulated.schedule.stages
    rows = (only - 0.5, only + 0.5) if only is not None else (-0.6, stages - 0.4)
    ax.set_yticks([] if only is not None else range(0, stages, 1 if stages <= 8 else 2 if stages <= 16 else 8))
    ax.set(xlim=(0, float(simulated.makespan)), ylim=(rows[1], rows[0]))
    ax.grid(False)


def _bands(action: Action) -> Iterator[tuple[str, bool, float, float]]:
    """(meaning, striped, from, to) of an action's box; a pair's halves are of two directions."""
    for meaning, top, bottom in BANDS[action.kind]:
        single = action.singles()[0 if meaning == "forward" or not action.parts else 1]
        yield meaning, single.direction % 2 == 1, top, bottom


def legend(*runs: Simulation) -> list[Any]:
    """The meanings that there are."""
    actions = {(a.kind, a.direction) for one in runs for row in one.schedule.actions for a in row}
    found = {meaning for kind, _ in actions for meaning, _, _ in BANDS[kind]}
    handles = [Patch(facecolor=style.colour(m), edgecolor=style.INK, label=NAMES[m]) for m in NAMES if m in found]
    if any(direction for _, direction in actions):
        striped = Patch(facecolor="none", edgecolor=style.INK, hatch="////", label="direction (or chunk) 1")
        handles.append(striped)
    return handles


def _alt(simulated: Simulation) -> str:
    made = simulated.schedule
    return (
        f"A chart of time with a row for each of {made.stages} ranks and a box for each action: {title_of(simulated)}. "
        f"It ends at {float(simulated.makespan):g}; beside it, bars of each rank's idle time, "
        f"at most {float(max(simulated.bubble)):g}, and of its peak of live micro-batches, "
        f"at most {float(max(simulated.peak_activations)):g}."
    )


def _caption(simulated: Simulation) -> str:
    return (
        f"White is idle time: {100 * simulated.bubble_share:.1f} % of all ranks' time. A box in two or three bands is "
        "a whole backward pass or an overlapped pair; the numbers are micro-batches."
    )
