"""When the few-token engine may stand in for a model or an MTP module, and that it never reads an old weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..layers.cache import LatentCache
from ..layers.step import Step
from .few_blocks import FewBlocks
from .weight_copies import COPIED, MOST_COPIED, WeightReader, copies_nbytes

MOST_TOKENS = 128  # of one call; beyond, the layers are as quick, except in 16 bits, where the copies stay ahead
DTYPES = (torch.float32, torch.float64, *COPIED)


class Engine:
    """The engine of one part of a model: made when it is first wanted, and anew when a weight has changed.

    Args:
        modules: that it stands for and whose weights it reads, as they were found.
        why_not: what was done to one of them, so that it must not stand in; ``None`` if nothing was.
        make: makes it.
    """

    def __init__(
        self, modules: Iterable[nn.Module], why_not: str | None, make: Callable[[WeightReader], FewBlocks]
    ) -> None:
        modules = list(modules)
        # Held by the model too: whether one was replaced is the survey's to see.
        self._weights = _each(p for m in modules for p in m._parameters.values())
        self._tensors = self._weights + _each(b for m in modules for b in m._buffers.values())
        self._why_not, self._make = why_not, make
        self._made: FewBlocks | None = None
        self._addresses: list[int] | None = None  # when it was made, or refused

    def why_not(self, like: Tensor) -> str | None:
        """Why it cannot stand in for any call, in words; ``None`` if it can.

        Args:
            like: of the device and dtype of the call's hidden states.
        """
        if self._why_not is not None:
            return self._why_not
        if like.dtype not in DTYPES:
            return "it is made for FP32, FP64, BF16 and FP16"
        other = next((w.dtype for w in self._weights if w.dtype != like.dtype), None)
        if other is not None:
            return f"weights are in {_name(other)} beside {_name(like.dtype)}"
        if like.dtype in COPIED:
            stored = self.nbytes // 2
            if stored > MOST_COPIED:
                return f"{stored / 2**30:.1f} GiB of weights in 16 bits are too many to copy to FP32"
            if any(w.is_inference() for w in self._weights):
                return "weights made in inference mode do not tell when they change, which copies in FP32 must know"
        return None

    @property
    def nbytes(self) -> int:
        """Bytes that its copies of the weights take (16 bits alone need copies), whether they are made yet or not."""
        return copies_nbytes(self._weights)

    def take(self, like: Tensor) -> FewBlocks | None:
        """The engine with the weights as they are now, or ``None`` where it cannot stand in."""
        addresses = [t.data_ptr() for t in self._tensors]
        if addresses == self._addresses and (self._made is None or self._made.reader.fresh()):
            return self._made
        self._made, self._addresses = None, addresses  # old copies go before new ones are made
        if self.why_not(like) is None:
            self._made = self._make(WeightReader(self._weights))
        return self._made


def is_few_tokens(x: Float[Tensor, "B T D"], step: Step) -> bool:
    """Whether a call is what an engine takes: inference, one row, few tokens (in 16 bits: any), with a cache.

    A cache whose methods are somebody's own is written to as it asks to be, by the layers.
    """
    return (
        x.shape[0] == 1
        and (x.shape[1] <= MOST_TOKENS or x.dtype in COPIED)
        and type(step.cache) is LatentCache
        and not vars(step.cache).keys() & vars(LatentCache).keys()
        and step.cache.format == "model"
        and step.lengths is None
        and not torch.is_grad_enabled()
    )


def _each(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    return [t for t in dict.fromkeys(tensors) if t is not None]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
