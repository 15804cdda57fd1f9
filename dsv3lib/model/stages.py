"""A block's forward and backward pass, cut at the borders of its stages, so that a pipeline can interleave them.

``Block.forward`` is attention, dispatch, experts and combine in a row, in one graph. Here each stage has a graph of its
own: between two of them every tensor is cut off, and backward hands the gradient across the cut. Two micro-batches can
then take turns, one computing while the other's tokens are on the wires (paper §3.2.1), and the order of the stages is
the caller's. The numbers are those of ``forward`` and ``backward``, to the bit.

A backward pass can be split further, into its part for inputs and its part for weights ("zero bubble"): with
``DeferredWeightGradients`` as the model's recipe, ``backward`` leaves the weights' products in its queue, to be run
when the pipeline would otherwise wait.

    deferred = DeferredWeightGradients(model.recipe)
    set_recipe(model, deferred)
    run = StagedBlock(block, x, step)
    for _ in STAGES:
        run.forward()                 # attention, dispatch, experts, combine
    y, routing = run.output           # cut off: the next block, or a loss, begins a graph of its own
    …
    for _ in STAGES:
        run.backward(grad_y)          # combine first; gradients for inputs alone
    run.grad_input                    # goes to the rank before
    weights = deferred.take()
    weights.run()                     # gradients for weights, whenever there is time
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import InputError
from ..layers.block import Block
from ..layers.experts import Routing
from ..layers.step import Step
from ..recompute import run

STAGES = ("attention", "dispatch", "experts", "combine")


class StagedBlock:
    """One block's pass over one micro-batch.

    Args:
        block: of the main model or the MTP chain.
        x: its input.
        step: the facts of the call; with ``recompute``, norms and up-projections are made again in backward.
    """

    def __init__(self, block: Block, x: Float[Tensor, "B T D"], step: Step) -> None:
        self._block, self._step = block, step
        self._value: Any = x.detach().requires_grad_(torch.is_grad_enabled())  # wanted from another rank, too
        self._taken: list[list[Tensor]] = []  # of each stage what went in, cut off from the stage before
        self._given: list[list[Tensor]] = []  # and what came out of it, in its graph
        self._left = len(STAGES)  # stages whose backward is still to come

    def forward(self) -> str:
        """Run the next stage.

        Returns:
            Its name.

        Raises:
            InputError: all have run.
        """
        n = len(self._given)
        if n == len(STAGES):
            raise InputError("forward: all four stages have run, expected one to be left; call backward")
        taken: list[Tensor] = []
        value = _each(self._value, lambda t: _cut(t, taken))
        recompute = self._step.recompute
        with nullcontext() if recompute is None else recompute.saving(forget=n == len(STAGES) - 1):
            value = getattr(self._block, STAGES[n])(value, self._step)
        given: list[Tensor] = []
        _each(value, lambda t: given.append(t) if t.requires_grad else None)
        self._taken.append(taken)
        self._given.append(given)
        self._value = _each(value, lambda t: _cut(t, [])) if n == len(STAGES) - 1 else value
        return STAGES[n]

    @property
    def output(self) -> tuple[Float[Tensor, "B T D"], Routing | None]:
        """The block's output and how its tokens were routed, cut off: what hangs on them is a graph of its own.

        Raises:
            InputError: a stage has not run yet.
        """
        if len(self._given) < len(STAGES):
            raise InputError(f"output: the stage {STAGES[len(self._given)]} has not run yet; call forward")
        return self._value

    def backward(self, grad: Float[Tensor, "B T D"] | None = None) -> str:
        """Run the backward pass of the last stage that has not had its own.

        Args:
            grad: ∂L/∂y, looked at for the first of the four; by default what a loss left in ``output``. The balance
                loss leaves its gradient in ``output``'s affinities, which are taken from there.

        Returns:
            The stage's name.

        Raises:
            InputError: forward is not finished, all have run, or there is no gradient.
        """
        if len(self._given) < len(STAGES) or not self._left:
            raise InputError("backward: comes four times, after four times forward")
        if self._left == len(STAGES):
            y, routing = self._value
            grads = [y.grad if grad is None else grad]
            grads += [routing.scores.grad] if routing is not None and routing.scores.requires_grad else []
            if grads[0] is None:
                raise InputError("grad: None, expected the output's gradient, or one that a loss left in output[0]")
        else:
            grads = [t.grad for t in self._taken[self._left]]
            self._taken[self._left] = []
        self._left -= 1
        pairs = [(t, g) for t, g in zip(self._given[self._left], grads, strict=True) if g is not None]
        self._given[self._left] = []
        torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])
        return STAGES[self._left]

    @property
    def grad_input(self) -> Float[Tensor, "B T D"]:
        """∂L/∂x.

        Raises:
            InputError: a stage's backward has not run yet.
        """
        if self._left:
            raise InputError(f"grad_input: the backward of {STAGES[self._left - 1]} has not run yet; call backward")
        return self._taken[0][0].grad


def embed(model: nn.Module, input_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
    """The stage before the first block.

    Args:
        model: a ``DeepSeekV3``.
        input_ids: token ids.
    """
    return model.model.embed_tokens(input_ids)


def head(
    model: nn.Module, x: Float[Tensor, "B T D"], step: Step
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B T vocab"]]:
    """The stage behind the last block: the final norm and the output head.

    Args:
        model: a ``DeepSeekV3``.
        x: the last block's output.
        step: the facts of the call.

    Returns:
        The head's input, where the MTP chain starts, and the logits. The loss is ``loss.add_losses``.
    """
    hidden = run(step.recompute, step.backend.norm, model.model.norm, x)
    return hidden, model.lm_head(hidden)


def _each(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """A value of nested tuples with each of its tensors changed, always in the same order."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        made = [_each(v, change) for v in value]
        return type(value)(*made) if hasattr(value, "_fields") else tuple(made)
    return value


def _cut(tensor: Tensor, taken: list[Tensor]) -> Tensor:
    """The same values as a leaf of a new graph, where the tensor has a gradient at all."""
    if not tensor.requires_grad:
        return tensor
    leaf = tensor.detach().requires_grad_()
    taken.append(leaf)
    return leaf
