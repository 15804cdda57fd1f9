"""How a kernel is timed on a GPU: events around it, a cold L2 before it, the median, and everything twice.

A kernel that was called a moment ago finds its operands in the L2 cache and looks faster than memory allows.
So before each call a buffer of several times the L2 is overwritten; that also keeps the GPU busy while the host
prepares the launch, so that launch time does not count. Without a GPU (a rehearsal under Triton's interpreter)
the host's clock stands in, and nothing of it is ever written down as a measurement.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]
FLUSH_BYTES = 256 * 2**20  # five times an H200's L2
LEAST, MOST = 5, 100  # calls of one round


@dataclass(frozen=True)
class Twice:
    """Two medians of the same call, in seconds: what differs by less than they do is noise.

    Args:
        first, second: medians of two rounds. calls: of each round.
    """

    first: float
    second: float
    calls: int

    @property
    def seconds(self) -> float:
        """The better of the two."""
        return min(self.first, self.second)

    @property
    def spread(self) -> float:
        """By which share the two differ."""
        return abs(self.first - self.second) / self.seconds


class Stopwatch:
    """Times calls on one device.

    Args:
        device: a CUDA device, or the CPU for a rehearsal. budget_s: seconds of measuring a round, about.
    """

    def __init__(self, device: torch.device, budget_s: float = 0.15) -> None:
        self.device, self.budget_s = device, budget_s
        self.flush = torch.empty(
            FLUSH_BYTES if device.type == "cuda" else 1, dtype=torch.uint8, device=device
        )

    def twice(self, call: Call) -> Twice:
        """Two rounds of a call, after it was compiled and warmed up."""
        for _ in range(2):
            call()
        one = self._round(call, 2)
        calls = max(LEAST, min(MOST, int(self.budget_s / max(one, 1e-9))))
        if self.device.type != "cuda":
            calls = 1
        return Twice(self._round(call, calls), self._round(call, calls), calls)

    def _round(self, call: Call, calls: int) -> float:
        """The median of several calls, in seconds."""
        if self.device.type != "cuda":
            return statistics.median(_by_clock(call) for _ in range(calls))
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for before, after in pairs:
            self.flush.zero_()
            before.record()
            call()
            after.record()
        torch.cuda.synchronize(self.device)
        return statistics.median(1e-3 * before.elapsed_time(after) for before, after in pairs)


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do at all, measured in the same run.

    Args:
        copy: bytes a second, read and written, of a device-to-device copy. bf16, fp8: FLOP/s of an 8192³ matrix
            product of random numbers through PyTorch; ``fp8`` is 0 where there is none.
    """

    copy: float
    bf16: float
    fp8: float

    def seconds(self, flops: float, moved: float, matrix: str) -> float:
        """The least time for so many operations and bytes: the larger of the two."""
        rate = {"bf16": self.bf16, "fp8": self.fp8 or 2 * self.bf16, "": float("inf")}[matrix]
        return max(flops / rate, moved / self.copy)


def ceilings(watch: Stopwatch, size: int = 8192, megabytes: int = 2048) -> Ceilings:
    """Measure copy bandwidth and matrix rates."""
    device = watch.device
    source = torch.randint(0, 255, (megabytes * 2**20,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / watch.twice(lambda: target.copy_(source)).seconds  # noqa: F821  deleted below
    del source, target
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    bf16 = 2 * size**3 / watch.twice(lambda: a @ b).seconds
    fp8 = 0.0
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        one = torch.ones((), device=device)
        a8, b8 = a.to(torch.float8_e4m3fn), b.t().contiguous().to(torch.float8_e4m3fn)

        def product() -> torch.Tensor:
            return torch._scaled_mm(a8, b8.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

        fp8 = 2 * size**3 / watch.twice(product).seconds
    return Ceilings(copy, bf16, fp8)


def _by_clock(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
