"""Figures of speculative decoding: rounds, tokens per pass, speed-up, experts read.

Each function draws what it is given and returns the figure, its alt text and its caption.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..inference.acceptance import Round, expected_speedup, expected_tokens_per_pass
from . import style

_CELL = 2.3
_LONGEST = 13


def rounds_of_a_text(
    rounds: Sequence[Round], decode: Callable[[int], str], most: int = 12
) -> tuple[Figure, str, str]:
    """Round by round: drafts that stood, drafts that fell, and the model's own token after them.

    Args:
        rounds: of one row, without the prompt's. decode: a token as text. most: rounds that are drawn.
    """
    shown = [one for one in rounds if one.tokens[0]][:most]
    columns = 1 + max(len(one.drafts[0]) for one in shown)
    fig, ax = style.figure(
        "Drafted, checked, kept", None, None, size=(1.5 + _CELL * columns, 0.8 + 0.36 * len(shown))
    )
    ax.set_axis_off()
    ax.set(xlim=(-0.5, columns), ylim=(len(shown), -1))
    for column in range(columns - 1):
        ax.text(column + 0.46, -0.4, f"draft {column + 1}", ha="center", fontsize=10)
    ax.text(columns - 0.54, -0.4, "the model's own", ha="center", fontsize=10)
    for row, one in enumerate(shown):
        ax.text(-0.12, row + 0.5, str(row + 1), ha="right", va="center", fontsize=9)
        for column, token in enumerate(one.drafts[0]):
            _token(ax, column, row, decode(token), stood=column < one.accepted[0])
        _token(ax, columns - 1, row, decode(one.tokens[0][-1]), stood=None)
    alt = (
        "A table of rounds. Each row: the drafts, filled where they stood and struck out where they fell, then the "
        "model's own token in a frame."
    )
    told = "Read along the rows, leaving out what is struck out: that is the text. Behind a draft that fell, all fall."
    return fig, alt, told


def _token(ax: Axes, column: int, row: int, text: str, stood: bool | None) -> None:
    meaning = {True: "latent", False: None, None: "bias"}[stood]
    said = repr(text)[1:-1]
    said = said if len(said) <= _LONGEST else said[: _LONGEST - 1] + "…"
    look = {"facecolor": style.colour("latent"), "edgecolor": style.INK} if stood else {"facecolor": "none"}
    edge = style.colour(meaning) if meaning else style.INK
    box = Rectangle((column + 0.02, row + 0.08), 0.9, 0.84, **(look | {"edgecolor": edge, "linewidth": 1.4}))
    if stood is False:
        box.set(linewidth=0.6, linestyle=":")
    ax.add_patch(box)
    ink = style.ink_on("latent") if stood else style.INK
    ax.text(column + 0.47, row + 0.52, f"“{said}”", ha="center", va="center", fontsize=9, color=ink, parse_math=False)
    if stood is False:
        ax.plot([column + 0.12, column + 0.82], [row + 0.5, row + 0.5], color=style.INK, linewidth=1)


def tokens_per_pass(
    measured: Mapping[str, tuple[float, float]], drafts: Sequence[int], of: int
) -> tuple[Figure, str, str]:
    """Tokens that one pass of the model yields, against acceptance: theory's curves and counted runs.

    Args:
        measured: text → acceptance of a draft, and tokens per pass that were counted. drafts: a curve for each
            number. of: the number of drafts that the runs had.
    """
    fig, ax = style.figure(
        "Tokens per pass follow from acceptance", "acceptance of a draft", "tokens per pass", size=(7.6, 4.4)
    )
    share = [i / 50 for i in range(51)]
    looks = ("neutral", "latent", "rope", "bias")
    for m, meaning in zip(drafts, looks, strict=False):
        look = style.line(meaning) | {"marker": "", "linewidth": 3 if m == of else 1.5}
        curve = [expected_tokens_per_pass(a, m) for a in share]
        ax.plot(share, curve, **look, label=f"{m} drafts" if m > 1 else "1 draft")
    for (name, (acceptance, tokens)), marker in zip(measured.items(), cycle("osD^vP*X")):
        ax.plot([acceptance], [tokens], marker, color=style.INK, markersize=7, label=name)
    ax.set(xlim=(0, 1.02), ylim=(1, max(drafts) + 1.1))
    ax.legend(loc="upper left", frameon=False)
    return (
        fig,
        f"Rising curves for {', '.join(map(str, drafts))} drafts from one token per pass up, and marks of "
        f"{len(measured)} texts beside the curve of {of}.",
        "The marks were counted, the curves computed. They need not fall on the curve: it takes every draft as equally "
        "likely to stand, and depth 2 is harder than depth 1.",
    )


def speedup(acceptance: float, draft_cost: float, wider: float, most: int = 6) -> tuple[Figure, str, str]:
    """Speed-up against the number of drafts, for one acceptance and two costs.

    Args:
        acceptance: of a draft, 0 to 1. draft_cost: of one draft. wider: what each token more adds to a pass. Both over
            the cost of a pass over one token.
    """
    fig, ax = style.figure("Does it pay?", "drafts a round", "speed-up", size=(7.0, 3.8))
    numbers = range(most + 1)
    values = [expected_speedup(acceptance, m, 1 + wider * m, draft_cost) for m in numbers]
    ax.plot(numbers, values, **style.line("latent"))
    ax.axhline(1, color=style.INK, linewidth=1, linestyle=(0, (4, 2)))
    ax.set(ylim=(0, max(2.6, max(values) + 0.2)))
    best = max(numbers, key=lambda m: values[m])
    said = f"Best with {best} drafts: {values[best]:.2f} times." if best else "Best without any draft: it never pays."
    return fig, f"Speed-up against 0 to {most} drafts; a level line at 1. {said}", said


def experts_read(read: Mapping[int, float], chosen: int, experts: int) -> tuple[Figure, str, str]:
    """Routed experts that a pass touches in a layer, against the tokens in the pass.

    Args:
        read: tokens in the pass → mean number of different experts. chosen: of a token. experts: there are.
    """
    fig, ax = style.figure(
        "A second token brings its own experts", "tokens in the pass", "experts read", size=(7.0, 3.8)
    )
    tokens = list(read)
    ax.plot(tokens, list(read.values()), **style.line("latent"), label="counted")
    apart = [experts * (1 - (1 - chosen / experts) ** n) for n in tokens]
    ax.plot(tokens, apart, **style.line("neutral"), label="if every token chose by chance")
    ax.axhline(experts, color=style.INK, linewidth=1, linestyle=(0, (4, 2)), label="all there are")
    ax.set(ylim=(0, experts * 1.08), xticks=tokens)
    ax.legend(loc="lower right", frameon=False)
    return (
        fig,
        "Different experts read against tokens in the pass: a rising curve beside that of chance, under a level "
        "line of all experts.",
        "Free would be a level curve. The weights of each expert that is touched must be read.",
    )
