"""The lessons of the course, in order: the one place that knows their names."""

from __future__ import annotations

from dataclasses import dataclass

from dsv3lib.errors import CourseError


@dataclass(frozen=True)
class Lesson:
    """One notebook: its file's stem, the short name that ids begin with, its idea, and its minutes."""

    stem: str
    short: str
    idea: str
    minutes: int


LESSONS = (
    Lesson("00_start_here", "start", "the map: 671B as a picture, and how to use the course", 30),
    Lesson("01_mla_latent_cache", "mla", "one small latent instead of all keys and values", 60),
    Lesson("02_decoupled_rope", "rope", "the position travels beside the latent, not through it", 50),
    Lesson("03_bias_based_routing", "routing", "a bias balances the experts, without a loss", 60),
    Lesson("04_mtp_chain", "mtp", "predicting further, one causal step at a time", 50),
    Lesson("05_fp8_tile_quantization", "fp8", "eight bits, one scale for each tile", 60),
    Lesson("06_dualpipe", "dualpipe", "two directions through one pipeline", 60),
    Lesson("07_speculative_decoding", "spec", "draft, verify, and keep the distribution", 45),
)


def lesson(name: str) -> Lesson:
    """Return a lesson by its file's stem or its short name.

    Raises:
        CourseError: there is none of that name.
    """
    for one in LESSONS:
        if name in (one.stem, one.short):
            return one
    raise CourseError(f"there is no lesson {name!r}; there are {', '.join(one.stem for one in LESSONS)}")
