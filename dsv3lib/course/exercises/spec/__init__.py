"""Exercises of 07_speculative_decoding: the acceptance rule, tokens per pass, the rollback."""

from __future__ import annotations

from dsv3lib.course.exercises.spec import expected, rollback, rule

EXERCISES = (*rule.EXERCISES, *expected.EXERCISES, *rollback.EXERCISES)
