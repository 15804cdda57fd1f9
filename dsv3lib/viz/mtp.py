"""Figures of multi-token prediction: the chain drawn, which token each depth sees, what moves, loss by depth, seeds.

Each function draws what it is given and returns the figure, its alt text and its caption. Alt texts and captions of
measured figures name shapes and order only, because they are compared when a notebook is tested.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from . import style
from .diagram import diagram

Drawn = tuple[Figure, str, str]

_NEXT = "bias"  # what is to be predicted
_NEW = "rope"  # the token that a depth is shown in addition


def chain(states: Sequence[Sequence[float]], embeddings: Sequence[Sequence[float]]) -> Drawn:
    """The main model and two modules at one position: what goes in, what is handed on, what is predicted.

    Args:
        states: of h^0, h^1, h^2, the first numbers at the worked position.
        embeddings: of the tokens one and two places on, likewise.

    Returns:
        The figure, its alt text and its caption.
    """
    d = diagram("One position i, three predictions", width=9.8, height=4.5)
    parts = ("main model", "module 1", "module 2")
    for k, part in enumerate(parts):
        left = 0.2 + 3.3 * k
        block = d.box(left, 1.35, part, "L blocks" if k == 0 else "join, 1 block", w=1.5, h=0.75)
        state = d.box(left, 2.65, f"h_i^{k}", "[d]", meaning="latent", w=1.5)
        guess = d.box(left, 3.75, f"t_{{i+{k + 1}}}", "predicted", meaning=_NEXT, w=1.5, h=0.6)
        name = "t_{\\leq i}" if k == 0 else f"t_{{i+{k}}}"
        meaning = "content" if k == 0 else _NEW
        seen = d.box(left, 0.45, name, "read" if k == 0 else "shown too", meaning=meaning, w=1.5, h=0.6)
        d.arrow(seen, block, "embedding", at=(left + 0.75, 1.2))
        d.arrow(block, state, "norm", at=(left + 0.75, 2.4))
        d.arrow(state, guess, "the same head", at=(left + 0.75, 3.53))
        d.numbers(left + 0.05, 0.08, embeddings[k - 1] if k else [], meaning=_NEW, more=bool(k))
        d.numbers(left + 1.6, 2.95, states[k][:2], meaning="latent", more=True)
        if k:
            d.arrow((left - 1.8, 2.75), (left, 1.72), meaning="latent")  # from the column before
    return d.done(
        alt=(
            "Three columns: main model, module 1, module 2. Each takes a token's embedding from below and gives a "
            "hidden state, from which one shared head predicts a token above. An arrow leads from the hidden state of "
            "each column into the next. The main model has read up to token i and predicts i + 1; module 1 is shown "
            "i + 1 and predicts i + 2; module 2 is shown i + 2 and predicts i + 3."
        ),
        caption=(
            "Follow the arrow between the columns: each module starts from the state of the one before. The strips "
            "hold the first numbers of one real position of an untrained tiny."
        ),
    )


def seen(tokens: Sequence[str], position: int, depth: int) -> Drawn:
    """The text, and what one depth at one position has read, is shown in addition and is to predict.

    Args:
        tokens: of the text. position: i. depth: k; 0 is the main model.

    Returns:
        The figure, its alt text and its caption.
    """
    d = diagram(f"Position {position}, depth {depth}", width=9.8, height=2.5)
    wide, target = 9.6 / len(tokens), position + depth + 1
    for at, token in enumerate(tokens):
        read, shown, asked = at <= position, position < at <= position + depth, at == target
        meaning = "content" if read else _NEW if shown else _NEXT if asked else None
        d.box(0.1 + at * wide, 0.9, token, str(at), meaning=meaning, lit=meaning is not None, w=0.86 * wide)
    who = "the main model" if depth == 0 else f"module {depth}"
    left = 0.1 + position * wide
    d.note(left, 1.95, f"h at i = {position}, of {who}", size=10)
    d.arrow((left + 0.4 * wide, 1.85), (left + 0.4 * wide, 1.55), meaning="latent")
    if target < len(tokens):
        d.arrow((left + 0.4 * wide, 0.85), (0.1 + (target + 0.4) * wide, 0.85), meaning=_NEXT, bend=0.35)
        said = f"predicts token {target}"
    else:
        said = "has no target: the text ends first"
    shown_too = f", is shown up to {position + depth} in addition" if depth else ""
    return d.done(
        alt=(
            f"{len(tokens)} tokens in a row. At position {position} depth {depth} has read the tokens up to "
            f"{position}{shown_too}, and {said}."
        ),
        caption=(
            "Blue: read by the main model. Orange: what the modules were shown, one token each. Pink: the target. "
            "Raise the depth and both move together, so a target is never among what was shown."
        ),
    )


def moved(rows: Sequence[Sequence[bool]], changed: int) -> Drawn:
    """A grid, depth by position: where logits moved when one token was changed.

    Args:
        rows: a row for each depth, from 0; True where the logits moved. changed: the position of that token.

    Returns:
        The figure, its alt text and its caption.
    """
    length = len(rows[0])
    fig, ax = style.figure(
        f"Token {changed} is changed: whose logits move",
        "position i",
        None,
        size=(8.2, 0.62 * len(rows) + 1.5),
    )
    for k, row in enumerate(rows):
        for i, one in enumerate(row):
            face = style.bar("content") if one else {"facecolor": style.PAPER, "edgecolor": style.INK}
            ax.add_patch(Rectangle((i - 0.45, k - 0.4), 0.9, 0.8, **face))
    ax.axvline(changed, color=style.colour(_NEXT), linewidth=2.5, zorder=0)
    ax.set(xlim=(-0.7, length - 0.3), ylim=(len(rows) - 0.4, -0.6), xticks=range(length))
    ax.set_yticks(range(len(rows)), ["main", *(f"depth {k}" for k in range(1, len(rows)))])
    ax.grid(False)
    firsts = [row.index(True) if True in row else None for row in rows]
    told = ", ".join(f"depth {k} from {'nowhere' if at is None else at}" for k, at in enumerate(firsts))
    return (
        fig,
        f"A grid, depths downwards, positions to the right; the logits that moved are filled: {told}.",
        "Filled: moved. Each depth begins one place earlier than the one above it, and nothing is filled further left.",
    )


def by_depth(losses: Mapping[str, Sequence[float]], title: str, ylabel: str) -> Drawn:
    """Something measured at each depth, a line for each way to build it.

    Args:
        losses: name → values at depth 0 or 1 and on; the shortest has what begins at 1. title, ylabel: said above
            and beside.

    Returns:
        The figure, its alt text and its caption.
    """
    fig, ax = style.figure(title, "depth (0: the main model)", ylabel)
    for meaning, (name, values) in zip(("latent", "rope", "bias", "neutral"), losses.items(), strict=False):
        ax.plot(range(len(values)), values, **style.line(meaning), label=name)
    ax.set_xticks(range(max(map(len, losses.values()))))
    ax.legend()
    last = sorted(losses, key=lambda name: losses[name][-1])
    return (
        fig,
        f"Lines over depth. At the deepest, from low to high: {', '.join(last)}.",
        "The chain's line stays where it begins; the line of the heads, which see no token between, climbs.",
    )


def paired(panels: Mapping[str, Mapping[str, Sequence[float]]], unit: str) -> Drawn:
    """Differences to the model without MTP, a dot for each seed, a panel for each question.

    Args:
        panels: question → (kind → a difference for each seed). unit: below each panel.

    Returns:
        The figure, its alt text and its caption.
    """
    fig, axes = style.figure(
        "Less is better: difference to the same seed without MTP",
        unit,
        None,
        columns=len(panels),
        size=(9.6, 3.2),
        sharey=True,
    )
    told = []
    for ax, (question, kinds) in zip(axes, panels.items(), strict=True):
        ax.axvline(0, color=style.INK, linewidth=1)
        for y, (kind, values) in enumerate(kinds.items()):
            ink = style.line(("latent", "rope", "bias")[y % 3])
            ax.plot(values, [y] * len(values), **(ink | {"linestyle": ""}), alpha=0.8)
            ax.plot([sum(values) / len(values)], [y], marker="|", markersize=22, color=style.INK)
            below = sum(v < 0 for v in values)
            told.append(f"{question}, {kind}: {below} of {len(values)} below zero")
        ax.set_title(question, fontsize=11)
        ax.locator_params(axis="x", nbins=3)
        ax.set_yticks(range(len(kinds)), kinds)
        ax.set_ylim(len(kinds) - 0.5, -0.5)
    return (
        fig,
        f"Panels with a row of dots for each way, one dot a seed, around a line at zero. {'; '.join(told)}.",
        "A way has helped for sure only where all its dots lie on the same side of the line. Bar: the mean.",
    )
