"""A pipeline's real trace and the same schedule simulated, in one picture."""

from __future__ import annotations

from matplotlib.figure import Figure

from ..pipeline.simulation import Simulation
from . import style
from .pipeline import draw_gantt, legend, title_of


def traces(real: Simulation, simulated: Simulation, title: str | None = None) -> tuple[Figure, str, str]:
    """What the ranks did by the wall clock, above what the simulation makes of the costs that they measured.

    Args:
        real: the run's timeline. simulated: the same schedule at measured costs; both in seconds.
        title: by default the schedule's name and sizes.

    Returns:
        the figure, its alt text and its caption; the two hold no measured value.
    """
    stages = real.schedule.stages
    fig, axes = style.figure(
        title or f"{title_of(real)}: as it ran, and as simulated", None, None, rows=2, columns=2,
        size=(11.0, 2.4 + 0.5 * stages), width_ratios=[8, 1.3], sharey=True,
    )  # fmt: skip
    words = ("as it ran, by the wall clock", "simulated at the measured costs, a core for each rank")
    for (left, right), run, heading in zip(axes, (real, simulated), words, strict=True):
        draw_gantt(left, run)
        left.set_title(f"{heading}: {1000 * float(run.makespan):.0f} ms", fontsize=10.5, fontweight="normal", pad=3)
        left.set(ylabel="rank")
        shares = [100 * float(idle) / float(run.makespan) for idle in run.bubble]
        right.barh(range(stages), shares, height=0.86, **style.bar("neutral"))
        right.set(xlim=(0, 135))
        right.grid(False)
        for rank, share in enumerate(shares):
            right.text(share, rank, f" {share:.0f}", va="center", fontsize=9)
    axes[1, 0].set_xlabel("time (s)")
    axes[1, 1].set_xlabel("idle (% of the time)")
    fig.legend(handles=legend(real), loc="outside lower center", ncols=4)
    alt = (
        f"Two charts of time, one above the other, with a row for each of {stages} ranks: {title_of(real)}. Each row "
        "has the same boxes in the same order in both; above they are of uneven length, and bars beside them show "
        "how long each rank was idle."
    )
    caption = (
        "Each row does the same actions in the same order. Above, processes that share this machine's cores also "
        "wait for one another's computing; below, each has a core to itself, and what is white is the schedule's own."
    )
    return fig, alt, caption
