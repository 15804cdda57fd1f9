"""The schedules by name; one file each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ...checks import require, require_integer
from ...errors import ConfigError
from ..actions import Schedule
from .dualpipe import dualpipe
from .dualpipev import dualpipev
from .gpipe import gpipe
from .interleaved import interleaved
from .one_f_one_b import one_f_one_b
from .zb1p import zb1p
from .zbv import zbv


@dataclass(frozen=True)
class Kind:
    """A schedule's builder and what it asks of its arguments.

    Args:
        build: (stages, microbatches) → schedule. least: micro-batches for each rank that it needs.
        even: whether ranks and micro-batches must be even numbers.
        title: how it is written in text.
    """

    build: Callable[[int, int], Schedule]
    title: str
    least: int = 0
    even: bool = False


SCHEDULES: Mapping[str, Kind] = MappingProxyType(
    {
        "gpipe": Kind(gpipe, "GPipe"),
        "1f1b": Kind(one_f_one_b, "1F1B"),
        "interleaved": Kind(interleaved, "interleaved 1F1B", least=1),
        "zb1p": Kind(zb1p, "ZB1P"),
        "zbv": Kind(zbv, "ZBV", least=2),
        "dualpipe": Kind(dualpipe, "DualPipe", least=2, even=True),
        "dualpipev": Kind(dualpipev, "DualPipeV", least=2),
    }
)


def schedule(name: str, stages: int = 8, microbatches: int = 20) -> Schedule:
    """A pipeline schedule by its name: a list of actions for each rank.

    Args:
        name: "gpipe", "1f1b", "interleaved", "zb1p", "zbv", "dualpipe" or "dualpipev".
        stages: pipeline ranks, PP; each of "interleaved", "zbv", "dualpipe" and "dualpipev" holds two chunks.
        microbatches: of one step; for "dualpipe" the total of both directions.

    Raises:
        ConfigError: there is no schedule of that name, or the numbers do not suit it; it says what would.
    """
    if name not in SCHEDULES:
        raise ConfigError(f"there is no schedule {name!r}; there are {', '.join(SCHEDULES)}")
    check_sizes(name, stages, microbatches)
    return SCHEDULES[name].build(stages, microbatches)


def check_sizes(name: str, stages: int, microbatches: int) -> None:
    """Refuse numbers that a schedule cannot be built for.

    Raises:
        ConfigError: names the argument.
    """
    kind = SCHEDULES[name]
    require_integer("stages", stages, 1)
    require_integer("microbatches", microbatches, 1)
    if kind.even:
        require(
            stages % 2 == 0, "stages", stages,
            f"an even number: in {name!r} rank r shares its stages with rank {stages - 1} - r",
        )  # fmt: skip
        require(microbatches % 2 == 0, "microbatches", microbatches, "an even number, half for each direction")
    least = kind.least * stages
    require(
        microbatches >= least, "microbatches", microbatches,
        f"at least {least} ({kind.least} x {stages} stages): {name!r} has that many in flight before it turns",
    )  # fmt: skip
