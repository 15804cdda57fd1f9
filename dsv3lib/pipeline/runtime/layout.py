"""Which process does what: the layout pp x dp of a run, and which layers each pipeline stage holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...checks import require, require_integer
from ...config import ModelConfig
from ...errors import ConfigError
from ..actions import Schedule
from ..cut import borders
from ..stages import layers_of


@dataclass(frozen=True)
class Layout:
    """The device mesh: rank = replica · pp + stage.

    Args:
        pp: ranks of the pipeline. dp: copies of it, each with micro-batches of its own.

    Raises:
        ConfigError: a number below 1.
    """

    pp: int = 1
    dp: int = 1

    def __post_init__(self) -> None:
        for name in ("pp", "dp"):
            require_integer(name, getattr(self, name), 1)

    @property
    def world(self) -> int:
        """Processes."""
        return self.pp * self.dp

    def __str__(self) -> str:
        return f"pp={self.pp},dp={self.dp}"

    @classmethod
    def parse(cls, text: str) -> Layout:
        """The layout that ``pp=4,dp=2`` stands for; what is left out is 1.

        Raises:
            ConfigError: the text is no layout, or asks for a dimension that the runtime does not have.
        """
        sizes: dict[str, int] = {}
        for part in text.split(","):
            name, _, number = part.strip().partition("=")
            if name not in ("pp", "ep", "dp") or name in sizes or not number.strip().isdecimal():
                raise ConfigError(
                    f"--parallel: {part!r} in {text!r}, expected pp=N, ep=N and dp=N at most once each, such as "
                    "pp=4,ep=1,dp=2"
                )
            sizes[name] = int(number)
        if (experts := sizes.pop("ep", 1)) != 1:
            raise ConfigError(f"ep: {experts} in {text!r}, expected 1: ep is not available with a pipeline yet")
        return cls(**sizes)

    def refuse_world(self, world: int) -> None:
        """Raise where so many processes do not fill the mesh.

        Raises:
            ConfigError: names both numbers.
        """
        expected = f"{self.world}, which is pp={self.pp} x dp={self.dp}"
        require(world == self.world, "world size", world, expected)


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
        costs: of each piece, in any unit, such as ``measure.layer_seconds`` finds; by default ``piece_flops``.

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
