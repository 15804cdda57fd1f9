"""Which process does what: the layout pp x dp of a run, and which layers each pipeline stage holds."""

from __future__ import annotations

from dataclasses import dataclass

from ...checks import require, require_integer
from ...config import ModelConfig
from ...errors import ConfigError
from ..actions import Schedule
from ..stages import Layer, layers_of, partition


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

    @classmethod
    def parse(cls, text: str) -> Layout:
        """The layout that ``pp=4,dp=2`` stands for; what is left out is 1.

        Raises:
            ConfigError: the text is no layout, or asks for a dimension that the runtime does not have.
        """
        sizes: dict[str, int] = {}
        for part in text.split(","):
            name, _, number = part.strip().partition("=")
            if name == "ep" and number.strip() == "1":
                continue
            if name not in ("pp", "dp") or name in sizes or not number.strip().isdecimal():
                raise ConfigError(
                    f"--parallel: {part!r} in {text!r}, expected pp=N and dp=N once each, such as pp=4,dp=1 "
                    "(experts are not spread over ranks: ep is 1)"
                )
            sizes[name] = int(number)
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


def cut(config: ModelConfig, stages: int, sequence: int = 4096) -> tuple[Part, ...]:
    """Cut the model so that the slowest stage computes as little as can be.

    The embedding stays before the first block; head and MTP chain are one piece, the end of the last stage.

    Args:
        config: sizes.
        stages: how many (chunks of all ranks of one direction).
        sequence: tokens of a sequence, for the cost of attention.

    Raises:
        ConfigError: more stages than pieces that compute.
    """
    blocks, ends = [], []
    for layer in layers_of(config, sequence):
        (blocks if layer.name.startswith("block") or layer.name == "embedding" else ends).append(layer)
    end = Layer("end", flops=sum(layer.flops for layer in ends))
    pieces = partition((*blocks, end), stages)
    return tuple(
        Part(
            tuple(int(layer.name.split()[1]) for layer in piece if layer.name.startswith("block")),
            first=number == 0,
            last=number == len(pieces) - 1,
        )
        for number, piece in enumerate(pieces)
    )


def parts_of_ranks(config: ModelConfig, schedule: Schedule, sequence: int = 4096) -> list[dict[int, Part]]:
    """For each pipeline rank its chunks; for two directions both copies.

    Args:
        config: sizes. schedule: its routes say where the stages lie. sequence: as for ``cut``.

    Raises:
        ConfigError: the model has too few layers for the schedule's places.
    """
    found: list[dict[int, Part]] = [{} for _ in range(schedule.stages)]
    for route in schedule.routes:
        for (rank, chunk), part in zip(route.places, cut(config, len(route.places), sequence), strict=True):
            found[rank][chunk] = part
    return found
