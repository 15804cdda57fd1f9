"""A step's matrix products alone: what the work around them, however it is arranged, adds to.

They are recorded as the step makes them, shapes and strides, and run again by the library that it uses
(``dsv3lib.gemm``) with nothing in between: once on operands that stay in the caches, once on operands that come from
memory, as most do in a step. What the step takes beyond that is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from measure import interleave
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3lib import gemm

KINDS = {"aten::mm": lambda a, b, out: gemm.mm(a, b), "aten::bmm": lambda a, b, out: torch.bmm(a, b, out=out)}
FROM_MEMORY = 64 * 2**20  # values, 256 MiB in FP32: larger than any cache
Layout = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Product:
    """One matrix product, or a batch of them.

    Args:
        kind: a key of ``KINDS``. left, right: each operand's shape and strides.
    """

    kind: str
    left: Layout
    right: Layout

    @property
    def out(self) -> Layout:
        """The result's shape and strides."""
        shape = (*self.left[0][:-1], self.right[0][-1])
        return shape, torch.empty(shape, device="meta").stride()

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * math.prod(self.out[0]) * self.left[0][-1]


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.products: list[Product] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kind = func.name().split(".")[0]
        if kind in KINDS:
            self.products.append(Product(kind, *((tuple(x.shape), x.stride()) for x in args[:2])))
        elif kind in ("aten::addmm", "aten::baddbmm"):
            raise NotImplementedError(f"{kind} is not counted yet: add it to products.KINDS")
        return func(*args, **kwargs or {})


def products_of(step: Callable[[], Any]) -> list[Product]:
    """The matrix products of one call, in order, those of a backward pass in it included."""
    with _Recorder() as recorder:
        step()
    return recorder.products


def extent(layout: Layout) -> int:
    """Values from the first that a layout reaches to the last, those between its rows included."""
    return 1 + sum((n - 1) * step for n, step in zip(*layout, strict=True))


class _Ring:
    """Places for operands, one after the other through one buffer and round again."""

    def __init__(self, values: int) -> None:
        self.buffer, self.next = torch.rand(values), 0

    def place(self, layout: Layout) -> Tensor:
        size = extent(layout)
        if self.next + size > self.buffer.numel():
            self.next = 0
        self.next += size
        return self.buffer[self.next - size : self.next].as_strided(*layout)


def alone(products: list[Product], budget_s: float) -> dict[str, float]:
    """Seconds of all products, one after the other and nothing in between, the fastest of several rounds.

    Args:
        products: what ``products_of`` recorded. budget_s: about how long to measure.

    Returns:
        ``cached`` (every product on the same three buffers) and ``from_memory`` (each elsewhere in 256 MiB).
    """
    largest = max(extent(layout) for p in products for layout in (p.left, p.right, p.out))
    same, far = [_Ring(largest) for _ in range(3)], _Ring(max(FROM_MEMORY, largest))
    calls: dict[str, list[Callable[[], Any]]] = {"cached": [], "from_memory": []}
    for p in products:
        for ring in same:
            ring.next = 0
        for name, rings in (("cached", same), ("from_memory", [far] * 3)):
            layouts = (p.left, p.right, p.out)
            left, right, out = (ring.place(layout) for ring, layout in zip(rings, layouts, strict=True))
            calls[name].append(partial(KINDS[p.kind], left, right, out))

    def run(name: str) -> None:
        for call in calls[name]:
            call()

    with torch.no_grad():
        timings = interleave({name: partial(run, name) for name in calls}, budget_s, least=5)
    return {name: min(timing.seconds) for name, timing in timings.items()}
