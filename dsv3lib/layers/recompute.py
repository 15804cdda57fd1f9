"""Recomputation: save what is expensive to make, make the rest again in backward.

V3 does not keep the outputs of its RMSNorms and of MLA's up-projections for the backward pass; it makes them
again from their small inputs (paper §3.2.3, "Recomputation of RMSNorm and MLA Up-Projection"). Autograd
saves a tensor where an operation needs it, which here is the linear layer *behind* the norm and the attention
*behind* the up-projection. So the saving is where we step in: a tensor made by ``Recipes.run`` is saved as
its recipe, function and inputs, and cooked again when backward asks. Nothing else runs twice, attention and
routing least of all, and the same operations on the same inputs give the same bits.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class _Recipe:
    """How to make a tensor again; two outputs of one function share one cooking."""

    function: Callable[..., Any]
    inputs: tuple[Any, ...]  # an input that has a recipe itself stands here as one
    cooked: tuple[Tensor, ...] | None = None

    def cook(self, index: int) -> Tensor:
        if self.cooked is None:
            with torch.no_grad():
                made = self.function(*map(_unpack, self.inputs))
            self.cooked = made if isinstance(made, tuple) else (made,)
        return self.cooked[index]


@dataclass
class _Saved:
    """Stands in the graph for a saved tensor: its recipe, which output, and how it was viewed."""

    recipe: _Recipe
    index: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Recipes:
    """The recipes of one forward pass.

    Example:
        >>> recipes = Recipes()
        >>> with recipes.saving():
        ...     h = recipes.run(norm, x)   # h is usable at once, and not kept for backward
        ...     y = linear(h)
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], _Recipe, int]] = {}

    def run(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Call ``function`` and remember how its output tensors were made.

        Args:
            function: a pure function of its inputs; it must return tensors that own their memory.
        """
        made = function(*inputs)
        recipe = _Recipe(function, tuple(self._pack(x) if isinstance(x, Tensor) else x for x in inputs))
        for index, tensor in enumerate(made if isinstance(made, tuple) else (made,)):
            self._known[tensor.data_ptr()] = (weakref.ref(tensor), recipe, index)
        return made

    @contextmanager
    def saving(self) -> Iterator[None]:
        """While open, autograd saves known tensors as recipes."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            yield
        self._known.clear()  # from here on only the graph holds recipes, and drops each when it is used

    def _pack(self, tensor: Tensor) -> Tensor | _Saved:
        known = self._known.get(tensor.data_ptr())
        if known is None:
            return tensor
        reference, recipe, index = known
        made = reference()
        # A live tensor owns its address; where it has died, the address may be somebody else's by now.
        if (
            made is None
            or made.numel() < tensor.numel()
            or made.dtype != tensor.dtype
            or made.device != tensor.device
        ):
            return tensor
        return _Saved(
            recipe, index, tensor.size(), tensor.stride(), tensor.storage_offset() - made.storage_offset()
        )


def _unpack(saved: Any) -> Any:
    if not isinstance(saved, _Saved):
        return saved
    made = saved.recipe.cook(saved.index)
    return made.as_strided(saved.size, saved.stride, made.storage_offset() + saved.offset)


def run(recipes: Recipes | None, function: Callable[..., Any], *inputs: Any) -> Any:
    """``function(*inputs)``, by recipe where there are recipes."""
    return function(*inputs) if recipes is None else recipes.run(function, *inputs)
