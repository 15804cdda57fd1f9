"""ZeRO stage 1: optimizer states sharded over the ranks that hold the same parameter (§3.2; arXiv:1910.02054).

Ranks that hold copies of a parameter all need its gradient and its new value, but its moments and master are read by
the update alone. So one of them keeps these, makes the update and broadcasts the result: over D copies a rank's states
shrink by a factor of D, and no update is computed twice.

torch's ``ZeroRedundancyOptimizer`` does that, one for each set of ranks with common parameters (dp's copies, ep's of
all that is no expert, DualPipe's two, the embedding beside the MTP chain). It deals out whole parameters, the largest
first, each to the rank that has least. Inside is our :class:`AdamW`: its update is made element by element, so that the
weights have the same bits as if every rank had kept everything. Its buckets are not used: they move the parameters to
other memory, past the masters, which share it.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...errors import TrainingError
from ...pipeline.runtime.links import Links
from .optimizer import AdamW

if TYPE_CHECKING:
    from torch.distributed.optim import ZeroRedundancyOptimizer

Ranks = tuple[int, ...]
MakeAdamW = Callable[[Iterable[tuple[str, nn.Parameter]]], AdamW]
"""An AdamW with the run's settings, over (name, parameter) pairs."""


class ShardedAdamW:
    """AdamW whose moments and masters lie on one rank for each parameter; used as an :class:`AdamW` is.

    Args:
        parameters: this rank's, by name; in the same order on all.
        holders: for each name the ranks that hold a copy of it.
        group_of: torch's process group of such a set; ``None`` between threads, which then all keep their own states.
        make: how an AdamW is made.

    Attributes:
        elsewhere: names of the parameters that another rank updates and sends here.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        holders: Mapping[str, Ranks],
        group_of: Callable[[Ranks], dist.ProcessGroup | None],
        make: MakeAdamW,
    ) -> None:
        self._trained, self._make = {name: p for name, p in parameters.items() if p.requires_grad}, make
        own: dict[str, nn.Parameter] = {}
        shared: dict[tuple[Ranks, str], dict[nn.Parameter, str]] = {}  # torch's class takes one dtype at a time
        for name, parameter in self._trained.items():
            if len(holders[name]) > 1 and group_of(holders[name]) is not None:
                shared.setdefault((holders[name], str(parameter.dtype)), {})[parameter] = name
            else:
                own[name] = parameter
        # In the same order everywhere, or ranks of two sets would wait for one another.
        in_order = sorted(shared.items(), key=itemgetter(0))
        self._zeros = [_zero(names, group_of(ranks), make) for (ranks, _), names in in_order]
        self._own = make(own.items())
        self._parts: Sequence[AdamW] = [self._own, *(zero.optim.adam for zero in self._zeros)]
        self.elsewhere = frozenset(self._trained).difference(*(part.parameters for part in self._parts))

    @property
    def count(self) -> int:
        """Steps so far."""
        return self._own.count

    @count.setter
    def count(self, steps: int) -> None:
        for part in self._parts:
            part.count = steps

    def step(self, learning_rate: float) -> None:
        """Update this rank's share and exchange what was updated; all ranks call it."""
        self._own.step(learning_rate)
        for zero in self._zeros:
            zero.step(learning_rate=learning_rate)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self._trained.values():
            parameter.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """The states that this rank keeps, named as in :meth:`AdamW.state_tensors`; each is on one rank alone."""
        return {name: tensor for part in self._parts for name, tensor in part.state_tensors().items()}

    def unsharded_bytes(self) -> int:
        """What the states would take if this rank kept those of all its parameters."""
        like = {name: nn.Parameter(torch.empty_like(p, device="meta")) for name, p in self._trained.items()}
        return sum(tensor.nbytes for tensor in self._make(like.items()).state_tensors().values())


class _Share(torch.optim.Optimizer):
    """What one rank updates, as an optimizer of torch's: ``ZeroRedundancyOptimizer`` makes it and calls it."""

    def __init__(self, groups: list[dict[str, Any]], names: Mapping[nn.Parameter, str], make: MakeAdamW) -> None:
        super().__init__(groups, {})
        self.adam = make((names[p], p) for group in self.param_groups for p in group["params"])

    def step(self, learning_rate: float) -> None:
        self.adam.step(learning_rate)


def _zero(names: Mapping[nn.Parameter, str], group: dist.ProcessGroup, make: MakeAdamW) -> ZeroRedundancyOptimizer:
    with warnings.catch_warnings():  # imported here: half a second, for functions that torch compiles beside it
        warnings.filterwarnings("ignore", ".*torch.jit", DeprecationWarning)
        from torch.distributed.optim import ZeroRedundancyOptimizer
    return ZeroRedundancyOptimizer(list(names), partial(_Share, names=names, make=make), process_group=group)


def refuse_unequal_copies(
    parameters: Mapping[str, nn.Parameter], holders: Mapping[str, Ranks], links: Links
) -> None:
    """Raise where ranks that hold the same parameter have other bits of it; all ranks call it, and all raise.

    Args:
        parameters: this rank's, by name. holders: as for :class:`ShardedAdamW`. links: to the others.

    Raises:
        TrainingError: an update did not reach every copy; it names parameter and ranks.
    """
    mine = {(name, holders[name]): _checksum(p) for name, p in parameters.items() if len(holders[name]) > 1}
    found: dict[tuple[str, Ranks], int] = {}
    for others in links.gather_objects(mine):
        for (name, ranks), checksum in others.items():
            if found.setdefault((name, ranks), checksum) != checksum:
                raise TrainingError(
                    f"{name}: its copies on ranks {', '.join(map(str, ranks))} differ: an update did not reach all of "
                    "them. Resume the run from its last save point, which was written before"
                )


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
