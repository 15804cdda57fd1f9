"""Outliers planted into the inputs of linear layers, as trained models have them: few tokens, one channel, very
large.

Models of billions of parameters grow *massive activations*: at a few tokens one channel is thousands of times larger
than the rest, in every batch. Small models trained for minutes do not, so a study that wants to see what one scale
for a whole tensor does with them has to plant them. The weight's column is divided by the same factor, so that what
those tokens send on is what they sent before; all other tokens lose their part through that one channel, with or
without FP8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..linear import PlainRecipe


def with_outliers(recipe: PlainRecipe, size: float, every: int, channel: int = 0) -> PlainRecipe:
    """The recipe, on inputs with outliers.

    Args:
        recipe: makes the products. size: factor of the outliers. every: one token in so many has one.
        channel: where; each input's channel of this number.
    """
    return _WithOutliers(recipe, size, every, channel)


class _WithOutliers(PlainRecipe):
    plain = False
    absorbs = False

    def __init__(self, recipe: PlainRecipe, size: float, every: int, channel: int) -> None:
        self.name = f"{recipe.name}, outliers x {size:g}"
        self._recipe, self._size, self._every, self._channel = recipe, size, every, channel

    def at(self, name: str) -> PlainRecipe:
        inner = self._recipe.at(name)
        if ".experts" in name or ".self_attn." not in name and ".mlp." not in name or name.endswith(".gate"):
            return inner
        return _WithOutliers(inner, self._size, self._every, self._channel)

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, counts: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        rows = self._rows(x)
        return self._recipe.forward(x * rows, weight * self._columns(weight), bias, counts)

    def gradient(self, grad: Tensor, counts: Tensor | None = None) -> object:
        return self._recipe.gradient(grad, counts)

    def input_gradient(
        self, grad: object, weight: Tensor, kept: tuple[Tensor, ...], counts: Tensor | None = None
    ) -> Tensor:
        made = self._recipe.input_gradient(grad, weight * self._columns(weight), kept, counts)
        return made * self._rows(made)

    def weight_gradient(
        self, grad: object, kept: tuple[Tensor, ...], weight: Tensor, counts: Tensor | None = None
    ) -> Tensor:
        return self._recipe.weight_gradient(grad, kept, weight, counts) * self._columns(weight)

    def _rows(self, x: Tensor) -> Tensor:
        """What each value of the input is multiplied by."""
        factor = torch.ones_like(x)
        factor[:: self._every, self._channel] = self._size
        return factor

    def _columns(self, weight: Tensor) -> Tensor:
        factor = torch.ones_like(weight)
        factor[..., self._channel] = 1 / self._size
        return factor
