"""What a recipe does to loss and gradients, on one set of weights and one batch: no run against run.

Two trainings that differ by one rounding drift apart, because routing amplifies it, and after a few hundred steps
their losses differ by as much as those of two seeds. So the question is first asked where nothing can drift: same
weights, same batch, the recipe alone differs. The answer is a relative error of the loss, and for each part of the
model the angle and the ratio of lengths between the two gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ..linear import PLAIN, PlainRecipe, set_recipe

PARTS = {
    "embedding": ("embed_tokens",), "head": ("lm_head",), "norms": ("norm",), "router": (".gate.",),
    "attention": ("self_attn.",), "experts": ("mlp.experts.",), "shared and dense": ("mlp.",), "mtp": ("eh_proj",),
}  # fmt: skip


@dataclass(frozen=True)
class Effect:
    """What a recipe changed.

    Attributes:
        loss_error: (loss of the recipe - loss without) / loss without.
        cosine, ratio: of each part's gradient to that without the recipe; ``"all"`` is the whole model's.
        by_layer: cosine of each layer's gradient, in order.
    """

    loss_error: float
    cosine: dict[str, float]
    ratio: dict[str, float]
    by_layer: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it."""
        return {
            "loss_error": self.loss_error, "cosine": self.cosine, "ratio": self.ratio, "by_layer": self.by_layer,
        }  # fmt: skip


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to."""
    return next((part for part, marks in PARTS.items() if any(m in name for m in marks)), "other")


def layer_of(name: str) -> str | None:
    """ "layer 3" of "model.layers.3.self_attn…"; ``None`` outside the layers."""
    pieces = name.split(".")
    return f"layer {pieces[2]}" if pieces[:2] == ["model", "layers"] else None


@contextmanager
def using(model: nn.Module, recipe: PlainRecipe, after: PlainRecipe = PLAIN) -> Iterator[None]:
    """A model whose products are made by a recipe for a while."""
    set_recipe(model, recipe)
    try:
        yield
    finally:
        set_recipe(model, after)


def effects(
    model: nn.Module,
    input_ids: Int[Tensor, "B T"],
    recipes: dict[str, PlainRecipe],
    plain: PlainRecipe = PLAIN,
) -> dict[str, Effect]:
    """Loss and gradients by each recipe, beside those without, on the same weights and batch.

    Args:
        model: its weights and gradients are left as they were. input_ids: the batch, its own labels.
        recipes: by name. plain: what they are compared with.
    """
    kept = [p.grad for p in model.parameters()]
    loss, reference = _gradients(model, input_ids, plain)
    found = {}
    for name, recipe in recipes.items():
        with_it, gradients = _gradients(model, input_ids, recipe)
        by_part = {"all": list(reference)}
        by_layer: dict[str, list[str]] = {}
        for parameter in reference:
            by_part.setdefault(part_of(parameter), []).append(parameter)
            if layer_of(parameter) is not None:
                by_layer.setdefault(layer_of(parameter), []).append(parameter)
        compared = {part: _compare(gradients, reference, names) for part, names in by_part.items()}
        found[name] = Effect(
            (with_it - loss) / loss,
            {part: c for part, (c, _) in compared.items()},
            {part: r for part, (_, r) in compared.items()},
            {layer: _compare(gradients, reference, names)[0] for layer, names in by_layer.items()},
        )
    for parameter, grad in zip(model.parameters(), kept, strict=True):
        parameter.grad = grad
    return found


def _gradients(model: nn.Module, ids: Tensor, recipe: PlainRecipe) -> tuple[float, dict[str, Tensor]]:
    with using(model, recipe):
        for parameter in model.parameters():
            parameter.grad = None
        out = model(ids, labels=ids)
        out.loss.backward()
    made = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return out.losses["main"].item(), made


def _compare(ours: dict[str, Tensor], theirs: dict[str, Tensor], names: list[str]) -> tuple[float, float]:
    """Cosine and ratio of lengths of two gradients, each many tensors put end to end, in FP64."""
    a = torch.cat([ours[name].flatten().double() for name in names])
    b = torch.cat([theirs[name].flatten().double() for name in names])
    length = float(a.norm()), float(b.norm())
    if not length[0] or not length[1]:
        return (1.0 if length[0] == length[1] else 0.0), 1.0
    return float(a @ b) / (length[0] * length[1]), length[0] / length[1]


def relative_error(losses: Sequence[float], reference: Sequence[float]) -> float:
    """(mean loss - mean reference loss) / mean reference loss over the last half of two runs' steps.

    Args:
        losses: of each step of a run. reference: of its twin without the recipe.
    """
    half = len(reference) // 2
    ours, theirs = sum(losses[half:]), sum(reference[half:])
    return (ours - theirs) / theirs
