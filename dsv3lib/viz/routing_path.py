"""A drawing of one token's way through the router: affinity, bias, groups, choice, gate values, with real numbers."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from ..config import ModelConfig
from ..layers.router import route
from .diagram import Diagram, diagram

_CELL, _GAP, _LEFT = 0.46, 0.24, 3.35


class _Entry(float):
    """A number that writes minus infinity as its sign."""

    def __format__(self, form: str) -> str:
        return "−∞" if math.isinf(self) else super().__format__(form)


def routing_path(
    scores: Float[Tensor, " E"], bias: Float[Tensor, " E"], config: ModelConfig
) -> tuple[Figure, str, str]:
    """Every step of a token's routing as a row of numbers, expert under expert.

    Args:
        scores: affinities of one token. bias: of the layer. config: sizes; meant for a few experts.

    Returns:
        The figure, its alt text and its caption.
    """
    per_group = config.n_routed_experts // config.n_group
    chosen, gates = route(scores[None], bias, config)
    steered = (scores + bias).unflatten(0, (config.n_group, per_group))
    quality = steered.topk(2, dim=-1).values.sum(-1)
    kept = set(quality.topk(config.topk_group).indices.tolist())
    gate = torch.zeros_like(scores).scatter(0, chosen[0], gates[0])
    taken = [i in chosen[0].tolist() for i in range(len(scores))]
    open_ = [i // per_group in kept for i in range(len(scores))]
    width = _LEFT + config.n_routed_experts * _CELL + config.n_group * _GAP + 0.3
    d = diagram("One token chooses its experts", width, 4.75)

    def row(
        y: float, words: str, small: str, values: Tensor, meaning: str | None, lit: list[bool] | None = None
    ):
        d.note(0.05, y + 0.24, words, size=10)
        d.note(0.05, y + 0.02, small, size=8.5)
        for g in range(config.n_group):
            part = slice(g * per_group, (g + 1) * per_group)
            d.numbers(_x(g, per_group), y, values[part].tolist(), meaning=meaning, lit=lit and lit[part])

    for i in range(config.n_routed_experts):
        d.note(
            _x(i // per_group, per_group) + (i % per_group + 0.5) * _CELL, 4.55, str(i), size=9, centred=True
        )
    d.note(0.05, 4.55, "expert", size=10)
    row(4.0, "affinity $s_i$", "what the token makes of each expert", scores, "content")
    row(3.4, "bias $b_i$", "the same for every token", bias, "bias")
    row(2.8, "$s_i + b_i$", "decides who is chosen, and nothing else", scores + bias, None)
    d.note(0.05, 2.2, "group: sum of its two best", size=10)
    d.note(0.05, 1.98, f"the best {config.topk_group} of {config.n_group} groups stay open", size=8.5)
    for g, value in enumerate(quality.tolist()):
        _group(d, g, per_group, 1.95, f"{value:.2f}", g in kept)
    words = [
        _Entry(x if is_open else -math.inf)
        for x, is_open in zip((scores + bias).tolist(), open_, strict=True)
    ]
    _masked(d, per_group, config.n_group, 1.3, words, taken, config.num_experts_per_tok)
    row(
        0.6,
        "gate value $g_i$",
        f"{config.routed_scaling_factor:g} × $s_i$ / sum of the chosen $s$",
        gate,
        "content",
        taken,
    )
    names = " and ".join(str(i) for i in sorted(chosen[0].tolist()))
    d.note(
        0.05,
        0.2,
        f"Experts {names} work for this token. The bias has a part in who, none in how much.",
        size=9.5,
    )
    plain = set(scores.topk(config.num_experts_per_tok).indices.tolist())
    changed = "other experts than" if plain != set(chosen[0].tolist()) else "the same experts as"
    return d.done(
        alt=(
            f"Rows of numbers under {config.n_routed_experts} experts in {config.n_group} groups: affinities; biases; "
            f"their sums; each group's sum of its two best, {config.topk_group} groups kept; the sums with the other "
            f"groups at minus infinity, the {config.num_experts_per_tok} best marked; and the gate values of these."
        ),
        caption=(
            f"Read from top to bottom. With the bias the token gets {changed} the {config.num_experts_per_tok} highest "
            "affinities alone would have given it; the gate values come from the top row."
        ),
    )


def _x(group: int, per_group: int) -> float:
    return _LEFT + group * (per_group * _CELL + _GAP)


def _group(d: Diagram, group: int, per_group: int, y: float, text: str, is_kept: bool) -> None:
    d.box(
        _x(group, per_group), y, text, meaning="communication" if is_kept else None, lit=is_kept,
        w=per_group * _CELL, h=0.34,
    )  # fmt: skip


def _masked(
    d: Diagram, per_group: int, groups: int, y: float, values: list[_Entry], taken: list[bool], k: int
) -> None:
    d.note(0.05, y + 0.24, f"the {k} best of what is open", size=10)
    d.note(0.05, y + 0.02, "closed groups get −∞", size=8.5)
    for g in range(groups):
        part = slice(g * per_group, (g + 1) * per_group)
        d.numbers(_x(g, per_group), y, values[part], meaning="bias", lit=taken[part], form="{:.2f}")
