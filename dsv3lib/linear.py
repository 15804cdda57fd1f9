"""The linear layer: every matrix product with a weight, forward and backward, goes through this file.

A *recipe* says how the three products of a linear layer are made (forward, for the input's gradient, for the
weight's gradient). The plain one multiplies in the operands' own dtype; an FP8 recipe quantises first; deferral
puts the weight's product off, so that a pipeline can run it when it would otherwise wait. The experts' stacked
matrices [E, O, I] go through the same recipes as one grouped product.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import gemm
from .autograd import once_differentiable
from .errors import InputError

Kept = tuple[Tensor, ...]


class PlainRecipe:
    """The plain recipe, and the protocol of all others: subclass it and change what differs.

    Shapes: x [N, I], weight [O, I], bias [O], y [N, O]; with ``counts`` [E] the weight is a stack [E, O, I] and x
    holds the rows of one expert after the other. Without ``counts`` but with a stack, x is one as well: [E, N, I].

    Attributes:
        name: as ``model.explain()`` shows it.
        plain: whether products are x Wᵀ in the operands' dtype, so that a faster form of them may stand in.
        absorbs: whether attention may take W_UK and W_UV apart and multiply in another order.
        keeps_gate: whether it keeps SwiGLU's two inputs for backward instead of its output (paper §3.3.3): it then has
            ``forward_gated`` and ``gate_gradients`` as well.
        later: where weight gradients wait, or ``None`` where they are made at once.
    """

    name = "none"
    plain = True
    absorbs = True
    keeps_gate = False
    later: WeightGradients | None = None

    def at(self, name: str) -> PlainRecipe:
        """The recipe for one place in the model.

        Args:
            name: of the module ("model.layers.3.self_attn.o_proj", "lm_head", "model.layers.3.mlp.gate"), or of a
                stack of experts ("model.layers.3.mlp.experts.down_proj").
        """
        return self

    def refuse(self, device: torch.device) -> None:
        """Raise where this recipe cannot run on a device; a plain one runs everywhere."""

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, counts: Tensor | None = None
    ) -> tuple[Tensor, Kept]:
        """y = x Wᵀ + b, and what backward needs of x."""
        if counts is None:
            return (gemm.linear(x, weight, bias) if weight.ndim == 2 else x @ weight.mT), (x,)
        y = x.new_empty(x.shape[0], weight.shape[1])
        sizes = _sizes(x, counts)
        for a, out, w in zip(x.split(sizes), y.split(sizes), weight, strict=True):
            torch.mm(a, w.t(), out=out)
        return y, (x,)

    def gradient(self, grad: Tensor, counts: Tensor | None = None) -> Any:
        """∂L/∂y, made ready once for both products of the backward pass."""
        return grad

    def input_gradient(self, grad: Any, weight: Tensor, kept: Kept, counts: Tensor | None = None) -> Tensor:
        """∂L/∂x = ∂L/∂y W ("Dgrad").

        Args:
            grad: what ``gradient`` returned.
            weight: W.
            kept: what ``forward`` kept.
            counts: rows of each expert, of a stack.
        """
        if counts is None:
            return gemm.linear(grad, weight.t()) if weight.ndim == 2 else grad @ weight
        grad_x = grad.new_empty(grad.shape[0], weight.shape[2])
        sizes = _sizes(grad, counts)
        for g, out, w in zip(grad.split(sizes), grad_x.split(sizes), weight, strict=True):
            torch.mm(g, w, out=out)
        return grad_x

    def weight_gradient(self, grad: Any, kept: Kept, weight: Tensor, counts: Tensor | None = None) -> Tensor:
        """∂L/∂W = ∂L/∂yᵀ x ("Wgrad"); arguments as for ``input_gradient``."""
        (x,) = kept
        if counts is None:
            return gemm.weight_gradient(grad, x) if grad.ndim == 2 else grad.mT @ x
        grad_w = torch.empty_like(weight)
        sizes = _sizes(grad, counts)
        for g, a, out in zip(grad.split(sizes), x.split(sizes), grad_w, strict=True):
            torch.mm(g.t(), a, out=out)
        return grad_w


PLAIN = PlainRecipe()


def linear(
    x: Float[Tensor, "*N I"],
    weight: Float[Tensor, "O I"],
    bias: Float[Tensor, " O"] | None = None,
    recipe: PlainRecipe = PLAIN,
) -> Float[Tensor, "*N O"]:
    """y = x Wᵀ + b by a recipe; differentiable once in x, W and b (any number of times if the recipe is plain).

    Args:
        x: any leading dimensions.
        weight: W.
        bias: b, or ``None``.
        recipe: how the products are made.

    Returns:
        In the dtype of x.
    """
    if type(recipe) is PlainRecipe:
        return gemm.linear(x, weight, bias)
    x, weight, bias = (_as_autocast(t) for t in (x, weight, bias))
    return _Product.apply(x.reshape(-1, x.shape[-1]), weight, bias, None, recipe).unflatten(0, x.shape[:-1])


def stacked_linear(
    x: Float[Tensor, "*rows I"],
    weight: Float[Tensor, "E O I"],
    counts: Int[Tensor, " E"] | None,
    recipe: PlainRecipe = PLAIN,
) -> Float[Tensor, "*rows O"]:
    """Many linear layers at once: the grouped product of the experts, or one product a head.

    Args:
        x: [rows, I], one group after the other, where ``counts`` says how many rows each has; else [E, N, I].
        weight: one matrix a group.
        counts: rows of each group, zeros included, or ``None``.
        recipe: how the products are made.

    Raises:
        InputError: ``counts`` does not sum to the rows of x.
    """
    if counts is None and type(recipe) is PlainRecipe:
        return x @ weight.mT
    return _Product.apply(_as_autocast(x), _as_autocast(weight), None, counts, recipe)


def gated_linear(
    gate: Float[Tensor, "*N I"],
    up: Float[Tensor, "*N I"],
    weight: Float[Tensor, "*E O I"],
    counts: Int[Tensor, " E"] | None = None,
    recipe: PlainRecipe = PLAIN,
) -> Float[Tensor, "*N O"]:
    """(silu(gate) ⊙ up) Wᵀ: SwiGLU and the product behind it, the last half of an MLP or of all experts.

    Args:
        gate: what opens; any leading dimensions, without ``counts``.
        up: what passes.
        weight: W, or a stack of one for each expert.
        counts: rows of each expert, of a stack.
        recipe: how the product is made, and what is kept of its input.
    """
    if recipe.keeps_gate:
        gate, up, weight = (_as_autocast(t) for t in (gate, up, weight))
        rows = (t.reshape(-1, t.shape[-1]) for t in (gate, up))
        return _GatedProduct.apply(*rows, weight, counts, recipe).unflatten(0, gate.shape[:-1])
    hidden = F.silu(gate) * up
    return (
        linear(hidden, weight, None, recipe)
        if counts is None
        else stacked_linear(hidden, weight, counts, recipe)
    )


class Linear(nn.Linear):
    """``nn.Linear`` whose products are made by a recipe.

    Attributes:
        recipe: ``PLAIN`` unless ``set_recipe`` chose another.
    """

    recipe: PlainRecipe = PLAIN

    def forward(self, x: Float[Tensor, "*N I"]) -> Float[Tensor, "*N O"]:
        """x Wᵀ + b."""
        return linear(x, self.weight, self.bias, self.recipe)


def set_recipe(model: nn.Module, recipe: PlainRecipe) -> None:
    """Put ``recipe.at(name)`` at every product of a model.

    A module says in ``recipes`` which of its attributes hold a recipe, and for which of its weights; a ``Linear`` has
    one alone.

    Args:
        model: its linear layers, gates and experts are changed.
        recipe: asked once for each place.
    """
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            module.recipe = recipe.at(name)
        for attribute, weight in getattr(module, "recipes", {}).items():
            setattr(module, attribute, recipe.at(f"{name}.{weight}" if weight else name))


class WeightGradients:
    """Weight gradients that wait, first in, first out: the part W of a backward pass that was split."""

    def __init__(self) -> None:
        self._waiting: list[tuple[nn.Parameter, Callable[[], Tensor]]] = []

    def __len__(self) -> int:
        """Products that wait."""
        return len(self._waiting)

    def put(self, weight: nn.Parameter, product: Callable[[], Tensor]) -> None:
        """Let a product wait.

        Args:
            weight: whose gradient it is.
            product: makes it.
        """
        self._waiting.append((weight, product))

    def take(self) -> WeightGradients:
        """All that waits, as a queue of its own; this one is empty then."""
        taken = WeightGradients()
        taken._waiting, self._waiting = self._waiting, []
        return taken

    @torch.no_grad()
    def run(self) -> None:
        """Make all products and add them to ``weight.grad``, each weight's summed first, as autograd does."""
        waiting, self._waiting = self._waiting, []
        sums: dict[nn.Parameter, Tensor] = {}
        for weight, product in waiting:
            made = product()
            sums[weight] = made if weight not in sums else sums[weight] + made
        for weight, total in sums.items():
            weight.grad = total if weight.grad is None else weight.grad.add_(total)


class DeferredWeightGradients(PlainRecipe):
    """Another recipe, whose weight gradients wait until they are run (the backward pass split into B and W).

    Norms, biases and the embedding, which are no products, get their gradients at once; so does a weight that is no
    leaf (one that was cast on its way).

    Args:
        recipe: makes the products.
        queue: where they wait; the deferred recipes of one model share it.
    """

    def __init__(self, recipe: PlainRecipe = PLAIN, queue: WeightGradients | None = None) -> None:
        self.recipe = recipe
        self.later = WeightGradients() if queue is None else queue
        self.name, self.plain, self.absorbs = recipe.name, recipe.plain, recipe.absorbs
        self.keeps_gate = recipe.keeps_gate
        if recipe.keeps_gate:
            self.forward_gated, self.gate_gradients = recipe.forward_gated, recipe.gate_gradients
        self.forward, self.gradient = recipe.forward, recipe.gradient
        self.input_gradient, self.weight_gradient = recipe.input_gradient, recipe.weight_gradient

    def at(self, name: str) -> PlainRecipe:
        """The inner recipe of that place, deferred."""
        return DeferredWeightGradients(self.recipe.at(name), self.later)

    def take(self) -> WeightGradients:
        """What has been put off since the last call."""
        return self.later.take()


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, counts, recipe):
        y, kept = recipe.forward(x, weight, bias, counts)
        ctx.save_for_backward(weight, counts, *kept)
        ctx.recipe = recipe
        # The parameter itself, to whose gradient a deferred product is added: what is saved may be handed back as
        # another tensor over the same memory.
        ctx.leaf = weight if recipe.later is not None and weight.is_leaf and weight.requires_grad else None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weight, counts, *kept = ctx.saved_tensors
        recipe, kept = ctx.recipe, tuple(kept)
        wants_x, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        grad_x = grad_weight = None
        grad_bias = grad.sum(0) if wants_bias else None
        ready = recipe.gradient(grad.contiguous(), counts)
        if wants_x:
            grad_x = recipe.input_gradient(ready, weight, kept, counts)
        if wants_weight:
            product = partial(recipe.weight_gradient, ready, kept, weight, counts)
            if ctx.leaf is None:
                grad_weight = product()
            else:
                recipe.later.put(ctx.leaf, product)
        return grad_x, grad_weight, grad_bias, None, None


class _GatedProduct(torch.autograd.Function):
    """As ``_Product``, from SwiGLU's inputs on."""

    @staticmethod
    def forward(ctx, gate, up, weight, counts, recipe):
        y, kept = recipe.forward_gated(gate, up, weight, counts)
        ctx.save_for_backward(weight, counts, *kept)
        ctx.recipe = recipe
        ctx.leaf = weight if recipe.later is not None and weight.is_leaf and weight.requires_grad else None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weight, counts, *kept = ctx.saved_tensors
        recipe, kept = ctx.recipe, tuple(kept)
        grad_gate = grad_up = grad_weight = None
        ready = recipe.gradient(grad.contiguous(), counts)
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            hidden = recipe.input_gradient(ready, weight, kept, counts)
            grad_gate, grad_up = recipe.gate_gradients(hidden, kept)
        if ctx.needs_input_grad[2]:
            product = partial(recipe.weight_gradient, ready, kept, weight, counts)
            if ctx.leaf is None:
                grad_weight = product()
            else:
                recipe.later.put(ctx.leaf, product)
        return grad_gate, grad_up, grad_weight, None, None


def _as_autocast(x: Tensor | None) -> Tensor | None:
    """Cast as autocast casts a product's operands, which it cannot see inside a function of our own."""
    if x is None or not autocast_on(x) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def autocast_on(x: Tensor) -> bool:
    """Whether autocast is on where a tensor lies; the meta device has none."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def _sizes(x: Tensor, counts: Tensor) -> list[int]:
    """Rows of each group, on the host."""
    sizes = counts.tolist()
    if sum(sizes) != x.shape[0]:
        raise InputError(f"counts: they sum to {sum(sizes)}, expected {x.shape[0]}, the rows of x")
    return sizes
