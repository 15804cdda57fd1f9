"""Which process does what: the device mesh dp x pp x ep of a run, and which layers each pipeline stage holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.distributed.device_mesh import DeviceMesh

from ...checks import require, require_integer
from ...config import ModelConfig
from ...errors import ConfigError
from ...parallel.expert_all_to_all import ExpertGroup
from ...parallel.traffic import Cluster
from ..actions import Schedule
from ..cut import borders
from ..stages import layers_of


@dataclass(frozen=True)
class Layout:
    """The device mesh [dp, pp, ep]: rank = (d · pp + stage) · ep + e.

    Data parallelism has two dimensions: every one of the ep · dp replicas has micro-batches of its own and a whole
    copy of all weights that are no experts'. The ep replicas of one group share the routed experts out among them: rank
    e holds experts [e · E/ep, (e + 1) · E/ep) of its stage's layers. Replicas are numbered d · ep + e.

    Example:
        >>> layout = Layout.parse("pp=4,ep=2,dp=1")
        >>> layout.world, layout.replicas
        (8, 2)
        >>> layout.stage(5), layout.replica(5), layout.rank(stage=2, replica=1)
        (2, 1, 5)

    Args:
        pp: ranks of the pipeline.
        dp: copies of everything.
        ep: ranks over which the experts of a layer are spread.
        nodes: machines that an ep group lies on, ep / nodes neighbouring ranks on each.

    Raises:
        ConfigError: a number below 1, or nodes that do not divide ep.
    """

    pp: int = 1
    dp: int = 1
    ep: int = 1
    nodes: int = 1

    def __post_init__(self) -> None:
        for name in ("pp", "dp", "ep", "nodes"):
            require_integer(name, getattr(self, name), 1)
        require(self.ep % self.nodes == 0, "nodes", self.nodes, f"a divisor of ep ({self.ep})")

    def __str__(self) -> str:
        sizes = {"pp": self.pp, "ep": self.ep, "dp": self.dp, "nodes": self.nodes}
        return ",".join(f"{name}={n}" for name, n in sizes.items() if n > 1 or name in ("pp", "dp"))

    @property
    def world(self) -> int:
        """Processes."""
        return self.pp * self.ep * self.dp

    @property
    def replicas(self) -> int:
        """Pipelines that have micro-batches of their own, ep · dp."""
        return self.ep * self.dp

    @cached_property
    def ranks(self) -> torch.Tensor:
        """Every rank at its place in the mesh, Int64 [dp, pp, ep]."""
        return torch.arange(self.world).view(self.dp, self.pp, self.ep)

    def mesh(self, device_type: str = "cpu") -> DeviceMesh:
        """torch's mesh with the dimensions "dp", "pp" and "ep"; all ranks call it, in their process group."""
        return DeviceMesh(device_type, self.ranks, mesh_dim_names=("dp", "pp", "ep"))

    def rank(self, stage: int, replica: int) -> int:
        """Who runs a stage of a replica's pipeline."""
        return int(self.ranks[replica // self.ep, stage, replica % self.ep])

    def stage(self, rank: int) -> int:
        """A rank's place in its pipeline."""
        return rank // self.ep % self.pp

    def replica(self, rank: int) -> int:
        """Which replica's micro-batches a rank works on."""
        return rank // (self.ep * self.pp) * self.ep + rank % self.ep

    def expert_group(self, rank: int) -> ExpertGroup:
        """The ranks that share out the experts of this rank's layers, in the order of the experts."""
        return ExpertGroup(tuple(self.ranks[rank // (self.ep * self.pp), self.stage(rank)].tolist()), self.nodes)

    def experts(self, rank: int, config: ModelConfig) -> range:
        """Which of a layer's experts a rank holds."""
        each = config.n_routed_experts // self.ep
        return range(rank % self.ep * each, (rank % self.ep + 1) * each)

    def cluster(self, config: ModelConfig) -> Cluster:
        """Where the experts of one layer lie.

        Raises:
            ConfigError: ep does not divide the experts, or a routing group would lie on several nodes, so that the
                limit of groups would not limit a token's nodes.
        """
        experts, groups = config.n_routed_experts, config.n_group
        require(experts % self.ep == 0, "ep", self.ep, f"a divisor of n_routed_experts ({experts})")
        require(
            groups == 1 or groups % self.nodes == 0, "nodes", self.nodes,
            f"a divisor of n_group ({groups}): a routing group lies on one node, or topk_group="
            f"{config.topk_group} would not be the most nodes that a token visits",
        )  # fmt: skip
        return Cluster(experts, self.nodes, self.ep // self.nodes)

    @classmethod
    def parse(cls, text: str) -> Layout:
        """The layout that ``pp=4,ep=2,dp=2`` stands for; what is left out is 1 (``nodes`` may stand there too).

        Raises:
            ConfigError: the text is no layout, or asks for a dimension that the runtime does not have.
        """
        sizes: dict[str, int] = {}
        for part in text.split(","):
            name, _, number = (word.strip() for word in part.partition("="))
            if name not in ("pp", "ep", "dp", "nodes") or name in sizes or not number.isdecimal():
                raise ConfigError(
                    f"--parallel: {part.strip()!r} in {text!r}, expected pp=N, ep=N and dp=N at most once each, such "
                    "as pp=4,ep=2,dp=1 (and nodes=N, if an ep group lies on several machines)"
                )
            sizes[name] = int(number)
        return cls(**sizes)

    def refuse_world(self, world: int) -> None:
        """Raise where so many processes do not fill the mesh.

        Raises:
            ConfigError: names both numbers.
        """
        expected = f"{self.world}, which is pp={self.pp} x ep={self.ep} x dp={self.dp}"
        require(world == self.world, "world size", world, expected)


def is_expert(name: str) -> bool:
    """Whether a parameter belongs to the routed experts, which ep spreads."""
    return ".mlp.experts." in name


@dataclass(frozen=True)
class Part:
    """What one stage of the model holds.

    Args:
        blocks: indices of its main blocks. first: whether it begins with the embedding. last: whether it ends with
            the head and the MTP chain.
    """

    blocks: tuple[int, ...]
    first: bool
    last: bool

    def holds(self, name: str, config: ModelConfig) -> bool:
        """Whether a parameter or buffer of the whole model is needed here; the MTP chain needs the embedding too."""
        if name.startswith("model.layers."):
            layer = int(name.split(".")[2])
            return layer in self.blocks or (self.last and layer >= config.num_hidden_layers)
        if name.startswith("model.embed_tokens."):
            tied = config.tie_word_embeddings or config.num_nextn_predict_layers
            return self.first or (self.last and bool(tied))
        return self.last


def piece_flops(config: ModelConfig, sequence: int = 4096) -> list[float]:
    """Forward operations of the pieces between which a model can be cut.

    The first piece is the embedding with block 0, the last one head, loss and MTP chain.

    Args:
        config: sizes. sequence: tokens of a sequence, for the cost of attention.
    """
    layers = layers_of(config, sequence)
    blocks = [layer.flops for layer in layers if layer.name.startswith("block")]
    ends = (layer.flops for layer in layers if not layer.name.startswith(("block", "embedding")))
    return [*blocks, sum(ends)]


def parts_of_ranks(
    config: ModelConfig, schedule: Schedule, sequence: int = 4096, costs: Sequence[float | int] | None = None
) -> list[dict[int, Part]]:
    """For each pipeline rank its chunks, cut so that the slowest rank computes as little as can be.

    Where a rank holds two stages that mirror one another (both directions of DualPipe, the two arms of a V), embedding
    and head lie on one rank and count together; for two directions both copies are cut alike.

    Args:
        config: sizes.
        schedule: its routes say where the stages lie.
        sequence: tokens of a sequence, for the cost of attention.
        costs: of each piece, in any unit, such as ``measure.piece_seconds`` finds; by default ``piece_flops``.

    Raises:
        ConfigError: the model has too few layers for the schedule's places, or there is no cost for each piece.
    """
    pieces = config.num_hidden_layers + 1
    costs = piece_flops(config, sequence) if costs is None else costs
    require(len(costs) == pieces, "costs", len(costs), f"{pieces}: one a block, and one for head and MTP chain")
    found: list[dict[int, Part]] = [{} for _ in range(schedule.stages)]
    held = {place: depth for route in schedule.routes for depth, place in enumerate(route.places)}
    for route in schedule.routes:
        stages = len(route.places)
        mirrored = stages > 1 and all(
            held.get((rank, 1 - chunk)) == stages - 1 - depth for depth, (rank, chunk) in enumerate(route.places)
        )
        cut = borders(costs, stages, mirrored)
        for depth, (rank, chunk) in enumerate(route.places):
            blocks = tuple(range(cut[depth], min(cut[depth + 1], config.num_hidden_layers)))
            found[rank][chunk] = Part(blocks, first=depth == 0, last=depth == stages - 1)
    return found
