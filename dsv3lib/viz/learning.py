"""How a model learns: its loss from step to step, and domain by domain before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from dsv3lib.viz import style


def loss_curve(
    losses: Sequence[float], rivals: Mapping[str, float], title: str = "The loss falls as the model learns"
) -> tuple[Figure, str, str]:
    """Draw a loss from step to step, and the losses of rivals that do not learn as level lines.

    Args:
        losses: cross-entropy of each step, in nats per token. rivals: name → its loss. title: above it.

    Returns:
        The figure, its alt text and its caption.
    """
    fig, ax = style.figure(title, "training step", "cross-entropy (nats per token)")
    ax.plot(range(1, len(losses) + 1), losses, **style.line("forward") | {"marker": "", "linestyle": "-"})
    last = len(losses)
    for dash, (name, value) in zip(((0, (1, 2)), (0, (6, 2)), "-."), rivals.items(), strict=False):
        ax.axhline(value, color=style.colour("neutral"), linestyle=dash)
        ax.text(last, value, name, ha="right", va="bottom", fontsize=10)
    names = " and ".join(rivals)
    return (
        fig,
        f"A falling curve over the training steps, with a level line for each rival: {names}.",
        "Where the curve goes below a line, the model does better than that rival.",
    )


def domain_bars(
    before: Mapping[str, float], after: Mapping[str, float], title: str = "Every domain is learnt"
) -> tuple[Figure, str, str]:
    """Draw a pair of bars for each domain: what a byte cost before training and what it costs after.

    Args:
        before, after: domain → loss in bits per byte. title: above it.

    Returns:
        The figure, its alt text and its caption.
    """
    fig, ax = style.figure(title, None, "validation loss (bits per byte)")
    pairs = ((-0.2, before, "neutral", "untrained"), (0.2, after, "forward", "trained"))
    for shift, values, meaning, label in pairs:
        places = [number + shift for number in range(len(before))]
        ax.bar(places, [values[name] for name in before], width=0.4, **style.bar(meaning), label=label)
    ax.set_xticks(range(len(before)), list(before))
    ax.set_ylim(0, 1.18 * max([*before.values(), *after.values()]))
    ax.legend(ncols=2, loc="upper right")
    return (
        fig,
        "Pairs of bars, one pair a domain, untrained beside trained.",
        "Compare within a pair. Pairs differ because a token stands for more bytes in one language than in another.",
    )
