"""The lessons of the course, in order: the one place that knows them. A lesson more is a row more."""

from __future__ import annotations

from dataclasses import dataclass

from dsv3lib.errors import CourseError


@dataclass(frozen=True)
class Lesson:
    """One notebook.

    Attributes:
        stem: its file's name, without the ending.
        short: what ids of its exercises and predictions begin with; also the name of its file of exercises.
        idea: what it shows, in a few words.
        minutes: what it takes, as ``dsv3lib.course.minutes`` computes it.
        lit: the parts of the model that it is about, by the names of ``dsv3lib.viz.layer_map.PARTS``.
    """

    stem: str
    short: str
    idea: str
    minutes: int
    lit: tuple[str, ...] = ()

    @property
    def number(self) -> str:
        """The two digits that its name begins with."""
        return self.stem[:2]


_ROWS = (
    ("00_start_here", "start", 55, "", "the map: 671B as a picture, and how to use the course"),
    ("01_mla_latent_cache", "mla", 75, "attention latent cache", "one small latent instead of all keys and values"),
    ("02_decoupled_rope", "rope", 70, "attention rope", "the position travels beside the latent, not through it"),
    ("03_bias_based_routing", "routing", 75, "router experts", "a bias balances the experts, without a loss"),
    ("04_mtp_chain", "mtp", 60, "mtp head loss", "predicting further, one causal step at a time"),
    ("05_fp8_tile_quantization", "fp8", 75, "precision", "eight bits, one scale for each tile"),
    ("06_dualpipe", "dualpipe", 70, "pipeline", "two directions through one pipeline"),
    ("07_speculative_decoding", "spec", 50, "mtp head", "draft, verify, and keep the distribution"),
    ("08_long_context", "long", 60, "rope cache", "a longer context without starting again"),
)  # fmt: skip
"""Stem, short name, minutes, parts of the map, idea: a lesson more is a row more."""

LESSONS = tuple(
    Lesson(stem, short, idea, minutes, tuple(lit.split())) for stem, short, minutes, lit, idea in _ROWS
)
"""All lessons, written or in preparation."""


def lesson(name: str) -> Lesson:
    """Return a lesson by its file's stem, its short name or its number.

    Raises:
        CourseError: there is none of that name.
    """
    for one in LESSONS:
        if name in (one.stem, one.short, one.number):
            return one
    raise CourseError(f"there is no lesson {name!r}; there are {', '.join(one.stem for one in LESSONS)}")
