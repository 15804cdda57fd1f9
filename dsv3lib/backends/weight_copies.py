"""Weights as NumPy reads them: where they lie if in FP32 or FP64, copied to FP32 if in BF16 or FP16.

The model keeps its 16 bits; the copies are beside it, twice its size, in one block of huge pages. A copy must never
outlive the weight that it was made from. torch counts the writes to a tensor (``_version``): a training step, an
assignment in place and ``load_state_dict`` are seen by that, a weight that moved by its address (``survey.Snapshot``).
Writing past torch's count, through ``parameter.data`` or NumPy, is seen where it changes the weight's largest value,
which is compared; so a weight that is scaled or filled so is seen, a single value that is poked in elsewhere is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from ..memory import ALIGNMENT, block

Array = np.ndarray
COPIED = (torch.bfloat16, torch.float16)
MOST_COPIED = 2 * 2**30  # bytes of a model's 16-bit weights; larger ones are not copied


def copies_nbytes(weights: Iterable[Tensor]) -> int:
    """Bytes that the copies of these weights take, 0 where they need none.

    Args:
        weights: a model's or a module's.
    """
    return sum(_room(w) for w in weights if w.dtype in COPIED)


def _room(weight: Tensor) -> int:
    return -(-weight.numel() * torch.float32.itemsize // ALIGNMENT) * ALIGNMENT


def as_array(x: Tensor) -> Array:
    """As an array: the same memory, or of 16 bits a copy in FP32."""
    return (x.float() if x.dtype in COPIED else x).numpy()


class WeightReader:
    """Gives weights as arrays, and knows whether those that it copied are still the weights.

    Args:
        weights: all that will be read.

    Attributes:
        nbytes: bytes of the copies.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self.nbytes = copies_nbytes(weights)
        self._block, self._used = (block(self.nbytes) if self.nbytes else None), 0
        self._given: dict[Tensor, Array] = {}
        self._copied: list[Tensor] = []
        self._versions: list[int] = []
        self._compared: list[Callable[[int], int]] = []
        self._places: list[int] = []
        self._values: list[int] = []

    def __call__(self, weight: Tensor) -> Array:
        """A weight, as an array; one that several modules share is copied once."""
        if weight not in self._given:
            shared = weight.detach()  # memory and count of writes are the weight's own
            self._given[weight] = self._copy(shared) if weight.dtype in COPIED else shared.numpy()
        return self._given[weight]

    def _copy(self, weight: Tensor) -> Array:
        start, self._used = self._used, self._used + _room(weight)
        room = self._block[start : start + weight.numel() * torch.float32.itemsize]
        self._copied.append(weight)
        self._versions.append(weight._version)
        if weight.numel():
            self._compared.append(weight.view(torch.int16).numpy().item)
            self._places.append(int(weight.abs().argmax()))
            self._values.append(self._compared[-1](self._places[-1]))
        return room.view(torch.float32).view(weight.shape).copy_(weight).numpy()

    def rows(self, x: Tensor) -> Array:
        """Tokens [1, T, D] as an array [T, D], in the dtype of the arrays that it gives."""
        return as_array(x[0])

    def fresh(self) -> bool:
        """Whether every copy is still the weight's."""
        if [w._version for w in self._copied] != self._versions:
            return False
        return [item(i) for item, i in zip(self._compared, self._places, strict=True)] == self._values
