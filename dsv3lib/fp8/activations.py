"""Activation memory: what autograd keeps for the backward pass, counted tensor by tensor, by part of the model.

Counted from the saved tensors themselves and not from a formula: each piece of memory once, however many operations
saved it; parameters are no activations. A part is where the operation stood, by the name of the module that ran. With
the hooks that ask for names, every module is called as it is written: plain layers are counted, not a CPU's fast forms.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Int
from torch import Tensor, nn

from .effect import part_of

WHERE = ("attention", "experts", "shared and dense", "norms", "router", "head", "other")


def activation_bytes(model: nn.Module, input_ids: Int[Tensor, "B T"]) -> dict[str, int]:
    """Bytes that are kept between the forward and the backward pass of one batch, by part.

    Args:
        model: its forward runs once, with labels; no backward does. input_ids: the batch.

    Returns:
        A number for each part of ``WHERE``.
    """
    counted = dict.fromkeys(WHERE, 0)
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    alive: list[Tensor] = []  # so that no address is given out twice
    seen: set[int] = set()
    with _names_of_modules(model) as stack:

        def pack(tensor: Tensor) -> Tensor:
            memory = tensor.untyped_storage()
            if memory.data_ptr() not in own and memory.data_ptr() not in seen:
                seen.add(memory.data_ptr())
                alive.append(tensor)
                counted[_part(stack[-1] if stack else "")] += memory.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(input_ids, labels=input_ids)
    return counted


@contextmanager
def _names_of_modules(model: nn.Module) -> Iterator[list[str]]:
    """A stack of the names of the modules that are running, the innermost last."""
    stack: list[str] = []
    handles = []
    for name, module in model.named_modules():
        if name.endswith(".down_proj"):  # a hook would have it called where its recipe keeps SwiGLU's inputs instead
            continue
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
        handles.append(module.register_forward_hook(lambda *_: stack.pop() and None, always_call=True))
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


def _part(name: str) -> str:
    found = part_of(name + ".")
    return found if found in WHERE else "other"
