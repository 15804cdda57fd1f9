"""Activation recomputation: save what is expensive to make, make the rest again in backward.

V3 does not keep the outputs of its RMSNorms and of MLA's up-projections for the backward pass; it makes them
again from their small inputs (paper §3.2.3, "Recomputation of RMSNorm and MLA Up-Projection"). It is activation
checkpointing of single operations. Autograd saves a tensor where an operation needs it, which here is the linear
layer *behind* the norm and the attention *behind* the up-projection. So the saving is where we step in: a tensor
made by ``Recompute.run`` is saved as function and inputs, and made again when backward asks. Nothing else runs
twice, attention and routing least of all, and the same operations on the same inputs give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


@dataclass
class _Call:
    """How to make a tensor again; two outputs of one function share one call."""

    function: Callable[..., Any]
    inputs: tuple[Any, ...]  # an input that is made again itself stands here as one
    made: tuple[Tensor, ...] | None = None

    def output(self, index: int) -> Tensor:
        if self.made is None:
            with torch.no_grad():
                made = self.function(*map(_unpack, self.inputs))
            self.made = made if isinstance(made, tuple) else (made,)
        return self.made[index]


@dataclass
class _Saved:
    """Stands in the graph for a saved tensor: its call, which output, and how it was viewed."""

    call: _Call
    index: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Recompute:
    """What one forward pass makes again in its backward pass.

    Example:
        >>> recompute = Recompute()
        >>> with recompute.saving():
        ...     h = recompute.run(norm, x)   # h is usable at once, and not kept for backward
        ...     y = linear(h)
    """

    def __init__(self) -> None:
        # By memory, because autograd saves views and aliases of what was made. A weak reference keeps the memory's
        # identity from being given to another, also when the memory is gone.
        self._known: dict[int, tuple[StorageWeakRef, _Call, int, torch.dtype, int]] = {}

    def run(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Call ``function`` and remember how its output tensors were made.

        Args:
            function: a pure function of its inputs; it must return tensors that own their memory.
            inputs: tensors, and whatever else it takes.
        """
        made = function(*inputs)
        call = _Call(function, tuple(self._pack(x) if isinstance(x, Tensor) else x for x in inputs))
        for index, tensor in enumerate(made if isinstance(made, tuple) else (made,)):
            memory = StorageWeakRef(tensor.untyped_storage())
            self._known[memory.cdata] = memory, call, index, tensor.dtype, tensor.storage_offset()
        return made

    @contextmanager
    def saving(self, forget: bool = True) -> Iterator[None]:
        """While open, autograd saves known tensors as calls.

        Args:
            forget: at its end only the graph holds calls, and drops each when it is used; a pass in stages forgets
                after its last.
        """
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            yield
        if forget:
            self._known.clear()

    def _pack(self, tensor: Tensor) -> Tensor | _Saved:
        if tensor.layout != torch.strided:
            return tensor
        memory, call, index, dtype, offset = self._known.get(
            tensor.untyped_storage()._cdata, (None, None, 0, None, 0)
        )
        if memory is None or dtype != tensor.dtype:
            return tensor
        return _Saved(call, index, tensor.size(), tensor.stride(), tensor.storage_offset() - offset)


def _unpack(saved: Any) -> Any:
    if not isinstance(saved, _Saved):
        return saved
    made = saved.call.output(saved.index)
    return made.as_strided(saved.size, saved.stride, made.storage_offset() + saved.offset)


def run(recompute: Recompute | None, function: Callable[..., Any], *inputs: Any) -> Any:
    """``function(*inputs)``, to be made again in backward where something is recomputed."""
    return function(*inputs) if recompute is None else recompute.run(function, *inputs)
