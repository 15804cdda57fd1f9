"""One case of the GPU benchmark: what is timed, what is checked, and the operands.

Data are random and drawn afresh; a reference computes in FP32 from the same operands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]
TILE = 128
PAGE = 64
FP8_MEAN_RELATIVE = 1e-3
BF16_DIFFERENCE = 1e-5
ATTENTION_DIFFERENCE = 5e-6
NORM_DIFFERENCE = 1e-5


@dataclass
class Work:
    """One case, ready to run.

    Args:
        ours: the call that is timed. error: the difference from the reference, in the measure that ``tolerance``
            bounds. flops, moved: operations, and the fewest bytes through the device's memory.
        matrix: which matrix rate bounds it, "bf16", "fp8" or "" for none.
        peers: calls that prepare a peer; each may raise :class:`gpu_peers.NotMeasured`.
        with_quantisation: the same with its operands quantised first.
        goals: what was set out to reach: "TFLOP/s", "of copy", or "times NAME" for a peer.
    """

    ours: Call
    error: Callable[[], float]
    tolerance: float
    flops: float
    moved: float
    matrix: str = ""
    peers: Mapping[str, Callable[[], Call]] = field(default_factory=dict)
    with_quantisation: Call | None = None
    goals: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A kernel at a shape; ``prepare(device, **shape)`` makes the operands."""

    operation: str
    shape: Mapping[str, int]
    prepare: Callable[..., Work]

    @property
    def name(self) -> str:
        """As tables call it."""
        return f"{self.operation} " + "×".join(f"{n}{v}" for n, v in self.shape.items())


def floating(device: torch.device) -> torch.dtype:
    """bf16; in the interpreter, whose bf16 products are garbage, fp32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def noise(device: torch.device, *shape: int) -> Tensor:
    """Random numbers, never zeros: those are easier to be right on, and faster."""
    return torch.randn(*shape, device=device).to(floating(device))


def uneven(device: torch.device, groups: int, rows: int) -> Tensor:
    """Rows per group, about as uneven as a router's load, with an empty group."""
    shares = torch.rand(groups) + 0.5
    shares[groups // 2] = 0
    counts = (shares / shares.sum() * rows).long()
    counts[0] += rows - counts.sum()
    return counts.to(device)


def mean_relative(x: Tensor, expected: Tensor) -> float:
    """Mean of |x − expected| over the mean of |expected|; NaN if either holds one."""
    return float((x.float() - expected.float()).abs().mean() / expected.float().abs().mean())


def unequal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The share of values whose bits differ."""
    pairs = zip(found, expected, strict=True)
    return max(float((a.float() != b.float()).float().mean()) for a, b in pairs)
