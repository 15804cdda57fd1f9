"""Inside an overlapped pair: a compute and a communication stream, and how many SMs the second should have."""

from __future__ import annotations

from matplotlib.figure import Figure

from ..pipeline.overlap import Gpu, LayerTimes, Pair, simulate_pair, tune
from . import style

SHORT = {
    "attention": "ATT F", "mlp": "MLP F", "attention inputs": "ATT I", "attention weights": "ATT W",
    "mlp inputs": "MLP I", "mlp weights": "MLP W", "dispatch": "dispatch", "combine": "combine",
}  # fmt: skip


def _meaning(name: str, of: str) -> str:
    if name in ("dispatch", "combine"):
        return "communication"
    if of == "F":
        return "forward"
    return "backward-weight" if name.endswith("weights") else "backward-input"


def streams(
    pair: Pair, title: str = "Inside a pair: one micro-batch computes, the other travels"
) -> tuple[Figure, str, str]:
    """The two streams of one pair.

    Args:
        pair: from :func:`dsv3lib.pipeline.overlap.simulate_pair`. title: of the picture.

    Returns:
        the figure, its alt text and its caption.
    """
    fig, ax = style.figure(title, "time (forward compute of one layer = 1)", None, size=(10.5, 2.6))
    rows = {"compute": 0, "communication": 1}
    for kernel in pair.kernels:
        row, width = rows[kernel.stream], kernel.end - kernel.start
        meaning = _meaning(kernel.name, kernel.of)
        look = style.bar(meaning) | {"hatch": "////" if kernel.of == "B" and kernel.stream != "compute" else ""}
        ax.barh(row, width, left=kernel.start, height=0.8, **look)
        if width > pair.makespan / 40:
            words = SHORT[kernel.name] + (f" {kernel.of}" if kernel.stream != "compute" else "")
            ax.text(
                kernel.start + width / 2, row, words, ha="center", va="center", rotation=90, fontsize=8,
                color=style.ink_on(meaning), bbox={"facecolor": style.colour(meaning), "edgecolor": "none", "pad": 1.0},
            )  # fmt: skip
    ax.set_yticks([0, 1], ["compute\nstream", "communication\nstream"])
    ax.set(xlim=(0, pair.makespan), ylim=(1.5, -0.5))
    ax.grid(False)
    alt = (
        "Two rows of boxes in time. Above, the compute stream takes the two micro-batches in turn: the experts' "
        "backward, the experts' forward, attention's backward, attention's forward. Below, the all-to-alls of the "
        "one that is not computing; gaps in the upper row are communication that nothing hides."
    )
    caption = (
        f"{100 * pair.hidden:.0f} % of the communication is hidden; the pair takes {pair.makespan:.2f}, one thing "
        f"after the other {pair.serial:.2f}. Striped: of the micro-batch that goes backward."
    )
    return fig, alt, caption


def share_of_sms(times: LayerTimes, chosen: int = 20, layers: int = 4) -> tuple[Figure, str, str]:
    """The pair's time against the number of SMs that communicate.

    Args:
        times: of one layer. chosen: a number of SMs to mark. layers: in the chunk.

    Returns:
        the figure, its alt text and its caption.
    """
    best, found = tune(times, layers=layers)
    pair = simulate_pair(times, Gpu(communication_sms=chosen), layers)
    title = "Too few SMs, and tokens crawl; too many, and the experts do"
    fig, ax = style.figure(title, "SMs for communication (of 132)", "time of the pair", size=(7.2, 3.4))
    shown = {count: time for count, time in found.items() if count <= 80}
    ax.plot([*shown], [*shown.values()], **style.line("communication") | {"marker": "", "color": style.INK})
    ax.plot([chosen], [pair.makespan], "o", color=style.colour("rope"), markersize=9, label=f"chosen: {chosen}")
    ax.plot([best], [found[best]], "v", color=style.colour("forward"), markersize=9, label=f"best: {best}")
    ax.axhline(pair.serial, **style.line("neutral") | {"marker": ""}, label="not overlapped")
    ax.set(ylim=(0, 1.6 * pair.serial), xlim=(0, 80))
    ax.legend()
    alt = (
        "A curve that falls steeply from few SMs to its lowest point and then climbs slowly; the time without "
        "overlap is a level line above that point."
    )
    return fig, alt, f"The best number is {best}, where the pair takes {found[best]:.2f} instead of {pair.serial:.2f}."
