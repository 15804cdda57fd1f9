"""Computation-communication overlap inside a pair F&B: two streams of one GPU, and the SMs that they share.

A layer is attention, all-to-all dispatch, MLP (the experts), all-to-all combine; backward in reverse, each product's
backward in a part for the inputs and one for the weights. In a pair, the forward pass of one micro-batch and the
backward pass of another take turns on the compute stream, and while one computes, the other's tokens travel on the
communication stream (paper §3.2.1, Figure 4). Communication kernels occupy some of the GPU's 132 streaming
multiprocessors (SMs), 20 in the paper: too few, and the links are not filled; too many, and computing slows down.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from ..checks import is_number, require, require_integer
from ..config import ModelConfig
from ..model.costs import forward_flops

Stream = Literal["compute", "communication"]
Pass = Literal["F", "B"]

SMS = 132
"""Streaming multiprocessors of an H800 (and H100)."""
COMMUNICATION_SMS = 20
"""Of them for communication in the paper (§3.2.2), enough to fill InfiniBand and NVLink."""


@dataclass(frozen=True)
class LayerTimes:
    """Times of one layer and one micro-batch, in any unit.

    Args:
        attention, mlp: forward, on all SMs; each part of the backward pass (inputs, weights) takes as long again.
        dispatch, combine: the all-to-all on full links, the same in both directions.

    Raises:
        ConfigError: a time is negative or not finite.
    """

    attention: float | int = 1.0
    dispatch: float | int = 1.0
    mlp: float | int = 1.0
    combine: float | int = 1.0

    def __post_init__(self) -> None:
        for name in ("attention", "dispatch", "mlp", "combine"):
            value = getattr(self, name)
            require(is_number(value) and value >= 0, name, value, "a finite number >= 0, a time")

    @classmethod
    def of_model(cls, config: ModelConfig, ratio: float = 1.0, context: int = 4096) -> LayerTimes:
        """A layer of a mixture, its forward compute as 1, divided as the model's own counts divide it.

        Args:
            config: sizes.
            ratio: communication beside computation over a whole pair; the paper says about 1 (§3.2.1).
            context: tokens of a sequence; on average a token attends to half of them.
        """
        per_layer = forward_flops(config, max(context // 2, 1))
        attention = (per_layer["attention"] + per_layer["attention_core"]) / config.num_hidden_layers
        mixtures = max(config.num_hidden_layers - config.first_k_dense_replace, 1)
        mlp = (per_layer["shared_experts"] + per_layer["routed_experts"]) / mixtures
        total = attention + mlp
        # A pair computes three times the forward pass, and communicates twice each way. Dispatch is in FP8 with
        # an FP32 scale for 128 values, combine in BF16.
        both = 3 * ratio / 2
        out = (1 + 4 / 128) / (1 + 4 / 128 + 2)
        return cls(attention / total, both * out, mlp / total, both * (1 - out))


@dataclass(frozen=True)
class Gpu:
    """How SMs are shared.

    Args:
        sms: of the GPU. communication_sms: for communication while a pair runs.
        filling_sms: as many fill the links; with fewer, communication slows down in proportion.

    Raises:
        ConfigError: a number is out of range.
    """

    communication_sms: int = COMMUNICATION_SMS
    filling_sms: int = COMMUNICATION_SMS
    sms: int = SMS

    def __post_init__(self) -> None:
        require_integer("sms", self.sms, 2)
        require_integer("filling_sms", self.filling_sms, 1)
        require_integer("communication_sms", self.communication_sms, 1)
        require(
            self.communication_sms < self.sms, "communication_sms", self.communication_sms,
            f"fewer than the {self.sms} SMs of the GPU: computing needs some",
        )  # fmt: skip

    def computing(self, time: float | int) -> float:
        """A compute kernel's time on the SMs that are left for it."""
        return time * self.sms / (self.sms - self.communication_sms)

    def communicating(self, time: float | int) -> float:
        """A communication kernel's time on its SMs."""
        return time * max(1.0, self.filling_sms / self.communication_sms)


@dataclass(frozen=True, slots=True)
class Kernel:
    """One thing on one stream: ``layer`` counts from 0 in the order in which its own pass takes the layers."""

    stream: Stream
    of: Pass
    name: str
    layer: int
    start: float
    end: float


@dataclass(frozen=True)
class Pair:
    """An overlapped pair in time.

    Attributes:
        kernels: in order on each stream. serial: the same work, one thing after the other, with all SMs for each.
    """

    kernels: tuple[Kernel, ...]
    serial: float

    @cached_property
    def makespan(self) -> float:
        """Time of the pair: what FB is in a schedule."""
        return max(kernel.end for kernel in self.kernels)

    def busy(self, stream: Stream) -> float:
        """Time that a stream works."""
        return sum(kernel.end - kernel.start for kernel in self.kernels if kernel.stream == stream)

    @property
    def hidden(self) -> float:
        """Share of the communication, 0 to 1, during which computing goes on."""
        travelling = self.busy("communication")
        exposed = self.makespan - self.busy("compute")
        return 1.0 if not travelling else max(0.0, 1 - exposed / travelling)


def simulate_pair(times: LayerTimes, gpu: Gpu | None = None, layers: int = 4) -> Pair:
    """Run an overlapped pair on two streams.

    Each stream takes its kernels in the order of Figure 4, each as early as what it needs is there.

    Args:
        times: of one layer. gpu: how the SMs are shared; 20 of 132 by default. layers: in the chunk.

    Raises:
        ConfigError: fewer than one layer.
    """
    require_integer("layers", layers, 1)
    gpu = gpu or Gpu()
    free: dict[Stream, float] = {"compute": 0.0, "communication": 0.0}
    done: dict[tuple[Pass, str, int], float] = {}
    kernels, serial = [], 0.0
    for of, name, layer, needs in _order(layers):
        stream: Stream = "communication" if name in ("dispatch", "combine") else "compute"
        time = getattr(times, name.split()[0])
        serial += time
        took = gpu.computing(time) if stream == "compute" else gpu.communicating(time)
        start = max([free[stream], *(done[need] for need in needs)])
        free[stream] = done[of, name, layer] = start + took
        kernels.append(Kernel(stream, of, name, layer, start, start + took))
    return Pair(tuple(kernels), serial)


def _order(layers: int) -> Iterator[tuple[Pass, str, int, tuple[tuple[Pass, str, int], ...]]]:
    """(pass, kernel, layer, what it needs), in the order in which the two streams start them (Figure 4)."""
    yield "B", "combine", 0, ()
    yield "F", "attention", 0, ()
    for i in range(layers):
        # The forward pass's tokens go out while the backward pass works at its experts …
        yield "F", "dispatch", i, (("F", "attention", i),)
        yield "B", "mlp inputs", i, (("B", "combine", i),)
        yield "B", "mlp weights", i, (("B", "mlp inputs", i),)
        # … whose gradients travel home while the forward pass's experts compute …
        yield "B", "dispatch", i, (("B", "mlp inputs", i),)
        yield "F", "mlp", i, (("F", "dispatch", i),)
        # … and so on with combine and attention.
        yield "F", "combine", i, (("F", "mlp", i),)
        yield "B", "attention inputs", i, (("B", "dispatch", i),)
        yield "B", "attention weights", i, (("B", "attention inputs", i),)
        if i + 1 < layers:
            yield "B", "combine", i + 1, (("B", "attention inputs", i),)
            yield "F", "attention", i + 1, (("F", "combine", i),)


def tune(times: LayerTimes, gpu: Gpu | None = None, layers: int = 4) -> tuple[int, dict[int, float]]:
    """Which number of SMs for communication makes the pair shortest.

    Returns:
        (the best number, number → time of the pair) for every number that the GPU allows.
    """
    gpu = gpu or Gpu()
    found = {
        count: simulate_pair(times, replace(gpu, communication_sms=count), layers).makespan
        for count in range(1, gpu.sms)
    }
    return min(found, key=lambda count: (found[count], count)), found
