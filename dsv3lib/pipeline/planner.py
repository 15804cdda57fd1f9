"""Planning a training cluster: schedules, PP, EP, DP and micro-batches compared by bubble, memory and traffic.

Everything is counted from the model's own sizes and simulated from the schedule's own actions. What is assumed stands
in :class:`Cluster` and :class:`Workload`; the times are estimates for comparing plans, not predictions.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from ..checks import is_number, require, require_integer
from ..config import ModelConfig
from ..errors import ConfigError
from ..parallel.traffic import INFINIBAND_GB_PER_S, NVLINK_GB_PER_S
from .actions import Schedule
from .dependencies import Dependencies
from .overlap import LayerTimes, simulate_pair
from .schedules import SCHEDULES, schedule
from .simulation import simulate
from .stages import Layer, all_to_all_bytes, layers_of, partition

GB = 1e9
WEIGHT_BYTES, GRADIENT_BYTES, OPTIMIZER_BYTES = 2, 4, 8
"""A parameter in BF16; its gradient, accumulated in FP32; its FP32 master copy with two BF16 moments (§3.3.3)."""


@dataclass(frozen=True)
class Cluster:
    """The machines.

    Args:
        gpus: in all. node: GPUs of a node. memory_gb: of each GPU.
        tflops: that a GPU reaches in the model's products; an assumption, half of an H800's dense BF16 peak.
        infiniband, nvlink: GB/s of one GPU (§3.2.2).

    Raises:
        ConfigError: a number is out of range.
    """

    gpus: int = 2048
    node: int = 8
    memory_gb: float = 80.0
    tflops: float = 495.0
    infiniband: float = INFINIBAND_GB_PER_S
    nvlink: float = NVLINK_GB_PER_S

    def __post_init__(self) -> None:
        require_integer("gpus", self.gpus, 1)
        require_integer("node", self.node, 1)
        for name in ("memory_gb", "tflops", "infiniband", "nvlink"):
            value = getattr(self, name)
            require(is_number(value) and value > 0, name, value, "a finite number > 0")


@dataclass(frozen=True)
class Workload:
    """What one optimiser step trains on.

    Args:
        batch: sequences (V3: 15,360 from 469B tokens on). sequence: tokens of each. microbatch: sequences that pass the
            pipeline together; the paper does not say how many.

    Raises:
        ConfigError: a number is below 1.
    """

    batch: int = 15360
    sequence: int = 4096
    microbatch: int = 1

    def __post_init__(self) -> None:
        for name in ("batch", "sequence", "microbatch"):
            require_integer(name, getattr(self, name), 1)


@dataclass(frozen=True)
class Plan:
    """One way to spread the model, judged. Bytes are of the fullest GPU, in GB; traffic is sent by one GPU in a step.

    Attributes:
        microbatches: of one pipeline in a step. bubble: idle share of all GPUs' time, 0 to 1.
        weights, gradients, optimizer: GB. activations, activations_kept: GB with the paper's recomputation and with
            everything kept in BF16.
        all_to_all, pipeline, data_parallel: GB sent in a step.
        hours: GPU hours for a trillion tokens, estimated.
        fits: whether the memory suffices with recomputation, and without.
    """

    schedule: str
    pp: int
    ep: int
    dp: int
    microbatches: int
    bubble: float
    weights: float
    gradients: float
    optimizer: float
    activations: float
    activations_kept: float
    all_to_all: float
    pipeline: float
    data_parallel: float
    hours: float
    fits: tuple[bool, bool]

    @property
    def memory(self) -> float:
        """GB of the fullest GPU with the paper's recomputation."""
        return self.weights + self.gradients + self.optimizer + self.activations

    @property
    def is_papers(self) -> bool:
        """Whether this is what V3 was trained with: DualPipe, PP16, EP64 (§3.2)."""
        return (self.schedule, self.pp, self.ep) == ("dualpipe", 16, 64)


def plan(
    config: ModelConfig,
    name: str = "dualpipe",
    pp: int = 16,
    ep: int = 64,
    cluster: Cluster | None = None,
    work: Workload | None = None,
) -> Plan:
    """Judge one plan.

    Args:
        config: sizes. name: of the schedule. pp: pipeline ranks. ep: GPUs over which a layer's experts are spread.
        cluster, work: V3's own by default.

    Raises:
        ConfigError: the numbers do not divide one another, or do not suit the schedule; it names them.
    """
    cluster, work = cluster or Cluster(), work or Workload()
    for argument, value in (("pp", pp), ("ep", ep)):
        require_integer(argument, value, 1)
    require(cluster.gpus % pp == 0, "pp", pp, f"a divisor of the {cluster.gpus} GPUs")
    dp = cluster.gpus // pp
    require(dp % ep == 0, "ep", ep, f"a divisor of the {dp} GPUs that hold one stage")
    require(
        config.n_routed_experts % ep == 0, "ep", ep, f"a divisor of the {config.n_routed_experts} experts"
    )
    each = dp * work.microbatch
    require(
        work.batch % each == 0, "batch", work.batch,
        f"a multiple of {each}: {work.microbatch} a micro-batch in each of {dp} pipelines",
    )  # fmt: skip
    microbatches = work.batch // each
    layers = layers_of(config, work.sequence)
    partition(layers, pp)  # too many stages are refused before a long schedule is built
    made = schedule(name, pp, microbatches)
    places = max(len(route.places) for route in made.routes)
    stages = partition(layers, places)
    held = _held(made, stages)
    busy = _times(config, stages, pp, places, ep, cluster, work)
    simulated = simulate(made, **busy)
    tokens = work.microbatch * work.sequence
    memory = [_memory(rank, held, made, dp, ep) for rank in range(pp)]
    weights, gradients, optimizer = max(memory, key=sum)
    live = [
        [float(peak) * tokens * sum(getattr(layer, way) for layer in own) / _copies(made, rank) / GB
         for rank, (peak, own) in enumerate(zip(simulated.peak_activations, held, strict=True))]
        for way in ("recomputed", "kept")
    ]  # fmt: skip
    fixed = [sum(one) for one in memory]
    total = [max(f + a for f, a in zip(fixed, way, strict=True)) for way in live]
    sent = _traffic(config, made, held, dp, ep, tokens, cluster)
    seconds = float(simulated.makespan)
    per_second = work.batch * work.sequence / seconds
    return Plan(
        name, pp, ep, dp, microbatches, simulated.bubble_share, weights, gradients, optimizer,
        max(live[0]), max(live[1]), *sent,
        hours=1e12 / per_second * cluster.gpus / 3600,
        fits=(total[0] <= cluster.memory_gb, total[1] <= cluster.memory_gb),
    )  # fmt: skip


def compare_plans(
    config: ModelConfig,
    names: Sequence[str] = tuple(SCHEDULES),
    pps: Sequence[int] = (8, 16, 32),
    eps: Sequence[int] = (64,),
    cluster: Cluster | None = None,
    work: Workload | None = None,
) -> tuple[list[Plan], list[str]]:
    """Judge all combinations.

    Returns:
        (plans, those that fit first, the cheapest of them first; and a line for each combination that cannot be).

    Raises:
        ConfigError: a schedule's name is unknown, or no combination can be.
    """
    unknown = [name for name in names if name not in SCHEDULES]
    if unknown:
        raise ConfigError(f"there is no schedule {unknown[0]!r}; there are {', '.join(SCHEDULES)}")
    plans, refused = [], []
    for name in names:
        for pp in pps:
            for ep in eps:
                try:
                    plans.append(plan(config, name, pp, ep, cluster, work))
                except ConfigError as error:
                    refused.append(f"{name} PP{pp} EP{ep}: {error}")
    if not plans:
        raise ConfigError(f"no plan of those can be: {'; '.join(refused[:3])}")
    return sorted(plans, key=lambda one: (not one.fits[0], one.hours)), refused


def _held(made: Schedule, stages: list[tuple[Layer, ...]]) -> list[list[Layer]]:
    """The layers of each rank, those of both directions or chunks."""
    held: list[list[Layer]] = [[] for _ in range(made.stages)]
    for route in made.routes:
        for depth, (rank, _) in enumerate(route.places):
            held[rank] += stages[depth]
    return held


def _copies(made: Schedule, rank: int) -> int:
    """Routes that pass a rank: each is a copy of the model."""
    return sum(any(at == rank for at, _ in route.places) for route in made.routes)


def _memory(rank: int, held: list[list[Layer]], made: Schedule, dp: int, ep: int) -> tuple[float, float, float]:
    """GB of weights, gradients and optimiser states on a rank; the states shared among all copies (ZeRO-1)."""
    own = held[rank]
    others = {layer.name: layer.others for layer in own}
    if any(layer.name.startswith("MTP") for layer in own):  # the module reads the shared embedding and head
        vocabulary = [layer for rows in held for layer in rows if layer.name in ("embedding", "head")]
        others |= {layer.name: layer.others for layer in vocabulary}
    once, experts = sum(others.values()), sum(layer.experts for layer in own) / ep
    shards = dp * _copies(made, rank)
    states = OPTIMIZER_BYTES * (once / shards + experts / (shards / ep))
    total = once + experts
    return WEIGHT_BYTES * total / GB, GRADIENT_BYTES * total / GB, states / GB


@functools.lru_cache(maxsize=256)
def _pair_time(times: LayerTimes, layers: int) -> float:
    return simulate_pair(times, layers=layers).makespan


def _times(
    config: ModelConfig,
    stages: list[tuple[Layer, ...]],
    pp: int,
    places: int,
    ep: int,
    cluster: Cluster,
    work: Workload,
) -> dict[str, float]:
    """F, B, W and F&B in seconds of 1/PP of the model: the slowest stage sets the pace.

    Without a pair, a pass waits for its all-to-all; in one, the other pass computes meanwhile.
    """
    tokens = work.microbatch * work.sequence
    chunks = places / pp
    compute = chunks * tokens * max(sum(layer.flops for layer in stage) for stage in stages) / (cluster.tflops * 1e12)
    mixtures = chunks * max(sum(layer.mixture for layer in stage) for stage in stages)
    between, inside = all_to_all_bytes(config, ep, cluster.node)
    per_layer = tokens * max(between / cluster.infiniband, inside / cluster.nvlink) / GB
    travel = per_layer * mixtures
    layers = max(1, round(mixtures / chunks))
    shape = LayerTimes.of_model(config, 1.0, work.sequence)
    scale = compute / (layers * chunks)
    out = shape.dispatch / (shape.dispatch + shape.combine)
    one = LayerTimes(shape.attention * scale, per_layer * out, shape.mlp * scale, per_layer * (1 - out))
    together = chunks * _pair_time(one, layers)
    return {"F": compute + travel, "B": 2 * compute + travel, "W": compute, "FB": together}


def _traffic(
    config: ModelConfig, made: Schedule, held: list[list[Layer]], dp: int, ep: int, tokens: int, cluster: Cluster
) -> tuple[float, float, float]:
    """GB that the busiest GPU sends in a step: all-to-all, to pipeline neighbours, between data-parallel copies."""
    between, inside = all_to_all_bytes(config, ep, cluster.node)
    graph = Dependencies.of(made)
    through, neighbours, copies = [], [], []
    for rank, own in enumerate(held):
        passes = sum(route.microbatches * sum(at == rank for at, _ in route.places) for route in made.routes)
        chunks = sum(at == rank for route in made.routes for at, _ in route.places)
        # Forward and backward; each micro-batch passes each chunk of its own route.
        through.append(2 * tokens * passes / chunks * sum(layer.mixture for layer in own) * (between or inside))
        sends = sum(
            graph.sends(rank, single) is not None
            for action in made.actions[rank]
            for single in action.parts or (action,)
        )
        neighbours.append(sends * tokens * config.hidden_size * WEIGHT_BYTES)
        shards = dp * _copies(made, rank)
        both = GRADIENT_BYTES + WEIGHT_BYTES  # gradients summed to their shard, new weights sent from it
        once = {layer.name: layer.others for layer in own}
        experts = sum(layer.experts for layer in own) / ep
        copies.append(both * (sum(once.values()) * (1 - 1 / shards) + experts * (1 - ep / shards)))
    return max(through) / GB, max(neighbours) / GB, max(copies) / GB
