"""A rank's share of the experts in a pipelined run, and what one step counts of their traffic and load."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ...fp8 import Recipe
from ...layers.experts import Experts
from ...layers.operations import PLAIN_OPERATIONS, Operations
from ...linear import PlainRecipe
from ...model import DeepSeekV3
from ...parallel.expert_all_to_all import ExpertAllToAll
from ...parallel.expert_parallel import ExpertParallel
from ...parallel.wires import Flight, Wires
from .layout import Layout
from .links import Links

Edge = tuple[str, str, int, int]
"""(purpose, hop, sender, receiver), as ``ExpertAllToAll.rows`` has them."""


@dataclass
class ExpertStep:
    """What one step counted where experts are spread over ranks.

    Attributes:
        visits: of each expert that this rank holds, by layer, from the tokens of its whole group.
        flights: this rank's exchanges in time.
        rows: that ranks handed one another in this step, of the whole world. bytes: the same.
    """

    visits: dict[int, Tensor]
    flights: list[Flight]
    rows: dict[Edge, int]
    bytes: dict[Edge, int]


class SpreadExperts:
    """Expert parallelism of one rank: its share of the weights, and the backend that reaches the others.

    Args:
        model: whole; of the routed experts this rank's alone stay. layout: with ep > 1. links: to the others.
        recipe: of the model's products. at_once: wait for each exchange where it is launched.

    Attributes:
        exchange: dispatch and combine over the group.

    Raises:
        ConfigError: the layout does not fit the experts or their groups.
    """

    def __init__(
        self, model: DeepSeekV3, layout: Layout, links: Links, recipe: PlainRecipe, at_once: bool = False
    ) -> None:
        cluster, held = layout.cluster(model.config), layout.experts(links.rank, model.config)
        self._layers: dict[nn.Module, int] = {}
        for name, module in model.named_modules():
            if isinstance(module, Experts):
                self._layers[module], module.first = int(name.split(".")[2]), held.start
                for of_all, weight in list(module.named_parameters(recurse=False)):
                    own = weight.detach()[held.start : held.stop].clone()
                    setattr(module, of_all, nn.Parameter(own, weight.requires_grad))
        self._links = links
        self.exchange = ExpertAllToAll(links, layout.expert_group(links.rank), cluster.experts)
        fp8 = isinstance(recipe, Recipe) and recipe.inputs == "tile"
        self._parallel = ExpertParallel(self.exchange, Wires(at_once), fp8)

    def backend(self, label: str) -> ExpertParallel:
        """Who computes a micro-batch."""
        return self._parallel.of(label)

    def begin(self) -> None:
        """Count anew."""
        exchange = self.exchange
        for counted in (self._parallel.received, exchange.rows, exchange.bytes, self._parallel.wires.flights):
            counted.clear()

    def step(self) -> ExpertStep:
        """What has been counted; all ranks call it."""
        exchange = self.exchange
        rows: dict[Edge, int] = {}
        octets: dict[Edge, int] = {}
        for sender, counted in enumerate(self._links.gather_objects((dict(exchange.rows), dict(exchange.bytes)))):
            for found, own in zip((rows, octets), counted, strict=True):
                found |= {(purpose, hop, sender, to): n for (purpose, hop, to), n in own.items()}
        visits = {self._layers[module]: counts for module, counts in self._parallel.received.items()}
        return ExpertStep(dict(sorted(visits.items())), list(self._parallel.wires.flights), rows, octets)


def backend_of(experts: SpreadExperts | None, label: str = "") -> Operations:
    """Who computes a micro-batch, for ``Pass``: plain operations where no experts are spread."""
    return PLAIN_OPERATIONS if experts is None else experts.backend(label)
