"""Exercises of 05_fp8_tile_quantization: a tile, the scale that loses least, promotion, what stays high."""

from __future__ import annotations

from dsv3lib.course.exercises.fp8 import precision, promotion, scale, tile

EXERCISES = (*tile.EXERCISES, *scale.EXERCISES, *promotion.EXERCISES, *precision.EXERCISES)
