"""Pipeline parallelism as data: schedules, validation, simulation, closed forms, a planner (paper §3.2.1)."""

from .actions import Action, Route, Schedule, pair
from .schedules import SCHEDULES, schedule
from .simulation import Costs, Event, Simulation, simulate
from .validation import validate

__all__ = [
    "SCHEDULES", "Action", "Costs", "Event", "Route", "Schedule", "Simulation",
    "pair", "schedule", "simulate", "validate",
]  # fmt: skip
