"""Closed forms: what each schedule's bubble, activations and parameters are said to be (paper §3.2.1, Table 2).

These are formulas of the literature, not results of the simulation; tests hold both equal where the formulas hold,
and :func:`compare` shows where they do not. Bubbles are idle time of a rank in one step. A rank's share of one model,
1/PP of its layers, costs F, B, W and F&B, for every schedule: a schedule with two chunks a rank of half the size is
reckoned in the same units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..errors import ConfigError
from .schedules import schedule
from .simulation import Costs, Number, simulate


@dataclass(frozen=True)
class ClosedForm:
    """The formulas of one schedule.

    Args:
        bubble: (PP, costs) → idle time of a rank. formula: the same, to be read. source: who says so.
        activations: (PP, micro-batches) → peak of the fullest rank, in micro-batches on 1/PP of the layers.
        parameters: copies of 1/PP of a model on each rank.
    """

    bubble: Callable[[int, Costs], Number]
    formula: str
    activations: Callable[[int, int], Number]
    parameters: int
    source: str


CLOSED_FORMS: Mapping[str, ClosedForm] = MappingProxyType(
    {
        "gpipe": ClosedForm(
            lambda pp, c: (pp - 1) * (c.F + c.B), "(PP−1)(F+B)", lambda pp, m: m, 1, "GPipe, arXiv:1811.06965"
        ),
        "1f1b": ClosedForm(
            lambda pp, c: (pp - 1) * (c.F + c.B), "(PP−1)(F+B)", lambda pp, m: min(pp, m), 1, "Table 2"
        ),
        "interleaved": ClosedForm(
            lambda pp, c: (pp - 1) * (c.F + c.B) / 2, "(PP−1)(F+B)/2",
            # In groups of PP: a whole group through chunk 0, and the way to the last rank and back.
            lambda pp, m: pp + (pp - 1) / 2, 1, "Megatron-LM, arXiv:2104.04473",
        ),
        "zb1p": ClosedForm(
            lambda pp, c: (pp - 1) * (c.F + c.B - 2 * c.W), "(PP−1)(F+B−2W)", lambda pp, m: min(pp, m), 1,
            "Table 2",
        ),
        "zbv": ClosedForm(
            lambda pp, c: (pp - 1) * c.F / 2, "(PP−1)F/2", lambda pp, m: pp, 1,
            "derived: without gaps, each rank waits for the first activation alone",
        ),
        "dualpipe": ClosedForm(
            lambda pp, c: (pp // 2 - 1) * (c.FB + c.B - 3 * c.W), "(PP/2−1)(F&B+B−3W)", lambda pp, m: pp + 1, 2,
            "Table 2",
        ),
        "dualpipev": ClosedForm(
            lambda pp, c: (pp - 1) * (c.FB + c.B - 3 * c.W) / 2, "(PP−1)(F&B+B−3W)/2",
            lambda pp, m: pp + 0.5, 1, "DualPipe's at twice the ranks, with chunks of half the size",
        ),
    }
)  # fmt: skip


def closed_form(name: str) -> ClosedForm:
    """The formulas of a schedule by its name.

    Raises:
        ConfigError: there is no schedule of that name.
    """
    if name not in CLOSED_FORMS:
        raise ConfigError(f"there is no schedule {name!r}; there are {', '.join(CLOSED_FORMS)}")
    return CLOSED_FORMS[name]


@dataclass(frozen=True)
class Comparison:
    """A formula's bubble beside the simulated one.

    Attributes:
        formula: what the closed form gives. worst, least: simulated idle time of the rank that waits longest, and
            of the one that waits least.
    """

    name: str
    stages: int
    microbatches: int
    costs: Costs
    formula: Number
    worst: Number
    least: Number

    @property
    def agrees(self) -> str:
        """ "on every rank", "on the worst rank", or "no"."""
        same = [abs(one - self.formula) < 1e-9 for one in (self.worst, self.least)]
        return "on every rank" if all(same) else "on the worst rank" if same[0] else "no"


def compare(name: str, stages: int, microbatches: int, costs: Costs | None = None) -> Comparison:
    """One schedule at one point: formula and simulation side by side.

    Args:
        name: of the schedule. stages, microbatches: its sizes. costs: F = W = 1, B = 2, F&B = 3 by default.
    """
    costs = costs or Costs()
    simulated = simulate(
        schedule(name, stages, microbatches), costs.F, costs.B, costs.W, costs.FB, costs.communication, costs.overlap
    )
    formula = closed_form(name).bubble(stages, costs)
    return Comparison(
        name, stages, microbatches, costs, formula, max(simulated.bubble), min(simulated.bubble)
    )
