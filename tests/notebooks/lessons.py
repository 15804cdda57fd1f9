"""The lessons that are there, and the bounds that each is held to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dsv3lib.course.notebooks import stems

ROOT = Path(__file__).resolve().parents[2]
PARAMETERS = frozenset({"STEPS", "SEED", "DEVICE", "FAST"})


@dataclass(frozen=True)
class Bounds:
    """Code cells of a lesson, least and most, and the seconds one run of it may take on two busy cores."""

    least: int = 25
    most: int = 40
    seconds: int = 300


BOUNDS = {"00_start_here": Bounds(least=10)}
"""Lessons that differ from the others."""

STEMS = stems(ROOT)

TO_BRING_TO_THE_PATTERN: set[str] = set()
"""Lessons older than the guards on captions, claims and minutes; who brings one to the pattern takes it out."""


def bounds(stem: str) -> Bounds:
    """Return the bounds of a lesson."""
    return BOUNDS.get(stem, Bounds())


def notebook(stem: str) -> Path:
    """Return the path of a lesson's notebook."""
    return ROOT / "notebooks" / f"{stem}.ipynb"
