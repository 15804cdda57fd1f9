"""Rows that stand at different positions: a window of each, side by side."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor


def take(values: Int[Tensor, "B T"], start: Int[Tensor, " B"], width: int) -> Int[Tensor, "B width"]:
    """``width`` values of each row from its ``start`` on; past the end, the last one again."""
    places = (start[:, None] + torch.arange(width)).clamp(max=values.shape[1] - 1)
    return values.gather(1, places)


def unless_full(lengths: Int[Tensor, " B"], width: int) -> Int[Tensor, " B"] | None:
    """Lengths as the model takes them: ``None`` where every row is full, which is faster."""
    return None if (lengths.numpy() == width).all() else lengths
