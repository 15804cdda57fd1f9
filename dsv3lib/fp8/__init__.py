"""FP8: the formats, the recipes that train in them, and the study of Hopper's accumulator (paper §3.3)."""

from .recipe import Recipe

__all__ = ["Recipe"]
