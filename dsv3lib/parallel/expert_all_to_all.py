"""Node-limited all-to-all of expert parallelism: tokens to the ranks that hold their experts, and the answers home.

Dispatch goes in two hops (paper §3.2.2). First **across** nodes: one copy of a token to each node that holds an expert
of it, to the rank with the sender's own place in that node. Then **within** the node: from where it arrived to each
rank that holds one of its experts. Combine is dispatch turned round: the same hops backwards, and where a row was
copied on its way out, the answers are added up on their way home. So the gradients need no rule of their own: the
backward pass of dispatch is a combine, and that of combine a dispatch.

Sums are made in the order of nodes and ranks, whatever arrives first: the same run gives the same bits.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

DISPATCH, COMBINE, HEADER = "dispatch", "combine", "header"
BACKWARD = "↤"
"""Marks what belongs to the backward pass: "combine↤" carries ∂L/∂y to the experts."""
ACROSS, WITHIN = "across", "within"


@runtime_checkable
class Network(Protocol):
    """What carries rows between ranks.

    Attributes:
        rank: of this process in the world.
    """

    rank: int

    def all_to_all(self, tensor: Tensor, send: list[int], receive: list[int], ranks: tuple[int, ...]) -> Tensor:
        """So many rows to each of these ranks, in order, and so many from each; zero is allowed."""


@dataclass(frozen=True)
class ExpertGroup:
    """The ranks that share out a layer's experts, on their nodes.

    Args:
        ranks: in the order of the experts.
        nodes: how many machines they lie on, as many neighbouring ranks on each.
    """

    ranks: tuple[int, ...]
    nodes: int = 1

    @property
    def per_node(self) -> int:
        """Ranks on one node."""
        return len(self.ranks) // self.nodes

    def place(self, rank: int) -> tuple[int, int]:
        """A rank's node, and its place there."""
        return divmod(self.ranks.index(rank), self.per_node)

    def across(self, rank: int) -> tuple[int, ...]:
        """The ranks at this rank's place on every node."""
        return self.ranks[self.place(rank)[1] :: self.per_node]

    def within(self, rank: int) -> tuple[int, ...]:
        """The ranks of this rank's node."""
        return self.ranks[self.place(rank)[0] * self.per_node :][: self.per_node]


class Hop(NamedTuple):
    """One all-to-all: rows are copied on their way out and added up on their way home.

    Args:
        name: ``ACROSS`` or ``WITHIN``. ranks: that take part.
        rows: how many there are here. source: which of them each copy is of, sorted by receiver, Int64 [copies].
        send: copies to each rank. receive: from each.
    """

    name: str
    ranks: tuple[int, ...]
    rows: int
    source: Int[Tensor, " copies"]
    send: list[int]
    receive: list[int]


class Route(NamedTuple):
    """Where one micro-batch's tokens go from this rank, and what comes here.

    Args:
        across, within: the hops.
        row: of each visit here, sorted by expert, the arrived row that makes it, Int64 [visits].
        slot: which of that row's chosen experts it is. counts: visits of each expert that this rank holds.
    """

    across: Hop
    within: Hop
    row: Int[Tensor, " visits"]
    slot: Int[Tensor, " visits"]
    counts: Int[Tensor, " experts"]


class ExpertAllToAll:
    """Dispatch and combine over one group of ranks.

    Args:
        network: between them. group: who they are. experts: of a layer, divisible by the ranks.

    Attributes:
        rows, bytes: what this rank handed to each rank so far, by (purpose, hop, receiver); itself counted, as
            ``traffic.Traffic.nvlink`` does. Purposes: "dispatch" and "combine" carry the hidden vectors, with "↤"
            their gradients; "header" carries indices, gate values and the gradients of those.
    """

    def __init__(self, network: Network, group: ExpertGroup, experts: int) -> None:
        self.network, self.group = network, group
        self.each = experts // len(group.ranks)
        self.node, self.local = group.place(network.rank)
        self.first = group.ranks.index(network.rank) * self.each
        self.rows: Counter[tuple[str, str, int]] = Counter()
        self.bytes: Counter[tuple[str, str, int]] = Counter()

    def route(self, indices: Int[Tensor, "N A"]) -> Route:
        """Find the way of each token, and tell the receivers.

        Args:
            indices: chosen experts.
        """
        rank, group = self.network.rank, self.group
        across = self._hop(ACROSS, group.across(rank), indices // (self.each * group.per_node))
        arrived = self._out(indices, across, HEADER)
        within = self._hop(WITHIN, group.within(rank), arrived // self.each - self.node * group.per_node)
        arrived = self._out(arrived, within, HEADER) - self.first
        row, slot = ((arrived >= 0) & (arrived < self.each)).nonzero().unbind(1)
        expert = arrived[row, slot]
        order = expert.argsort(stable=True)
        return Route(across, within, row[order], slot[order], torch.bincount(expert, minlength=self.each))

    def outward(self, rows: Shaped[Tensor, "N D"], route: Route, purpose: str = HEADER) -> Shaped[Tensor, "R D"]:
        """A copy of each token's row to each rank that holds an expert of it (dispatch).

        Args:
            rows: of this rank's tokens, any dtype that the network takes.
            route: of the micro-batch. purpose: under which it is counted.

        Returns:
            What came here, by the order of ranks within the node, then of nodes, then of tokens.
        """
        return self._out(self._out(rows, route.across, purpose), route.within, purpose)

    def homeward(self, rows: Shaped[Tensor, "R D"], route: Route, purpose: str = HEADER) -> Shaped[Tensor, "N D"]:
        """The sum of all answers to each token: first on its way out of each node, then at home (combine).

        Args:
            rows: one for each that came here. route, purpose: as for ``outward``.
        """
        return self._home(self._home(rows, route.within, purpose), route.across, purpose)

    # ---- one hop ---------------------------------------------------------------------------------------

    def _hop(self, name: str, ranks: tuple[int, ...], where: Int[Tensor, "N A"]) -> Hop:
        """One copy to each of the ``ranks`` that a row wants; places beyond them are wanted by other nodes' tokens."""
        n = len(ranks)
        wanted = torch.zeros(len(where), n + 1, dtype=torch.bool, device=where.device)
        wanted.scatter_(1, where.masked_fill((where < 0) | (where >= n), n), True)
        source = wanted[:, :n].t().nonzero()[:, 1]
        send = wanted[:, :n].sum(0).cpu()
        receive = self.network.all_to_all(send, [1] * n, [1] * n, ranks)
        return Hop(name, ranks, len(where), source, send.tolist(), receive.tolist())

    def _out(self, rows: Tensor, hop: Hop, purpose: str) -> Tensor:
        copies = rows.index_select(0, hop.source)
        self._count(copies, hop.send, hop, purpose)
        return self.network.all_to_all(copies, hop.send, hop.receive, hop.ranks)

    def _home(self, rows: Tensor, hop: Hop, purpose: str) -> Tensor:
        self._count(rows, hop.receive, hop, purpose)
        back = self.network.all_to_all(rows.contiguous(), hop.receive, hop.send, hop.ranks)
        total = rows.new_zeros(hop.rows, *rows.shape[1:])
        for place, part in zip(hop.source.split(hop.send), back.split(hop.send), strict=True):
            total.index_add_(0, place, part)  # no row twice in one part: the order of the sum is that of the ranks
        return total

    def _count(self, rows: Tensor, sizes: list[int], hop: Hop, purpose: str) -> None:
        width = rows[:1].nbytes if len(rows) else 0
        for receiver, n in zip(hop.ranks, sizes, strict=True):
            self.rows[purpose, hop.name, receiver] += n
            self.bytes[purpose, hop.name, receiver] += n * width
