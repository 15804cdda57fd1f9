"""Exercises of 01_mla_latent_cache: what is cached, attention on it expanded and absorbed, FP8 bytes, break-even."""

from __future__ import annotations

from dsv3lib.course.exercises.mla import attention, compress, costs

EXERCISES = (*compress.EXERCISES, *attention.EXERCISES, *costs.EXERCISES)
