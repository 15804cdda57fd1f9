"""Rows that stand at different positions: a window of each, side by side. Counters are NumPy's, on the CPU."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int, Int64, Shaped
from torch import Tensor


def take(
    values: Shaped[Tensor, "B T *rest"], start: Int64[np.ndarray, " B"], width: int
) -> Shaped[Tensor, "B width *rest"]:
    """``width`` values of each row from its ``start`` on; past an end, the value there again.

    Of a single row that has them all it is a view: gathering would cost a small model's drafter as much as a product.
    """
    length = values.shape[1]
    if len(start) == 1 and 0 <= (first := int(start[0])) and first + width <= length:
        return values[:, first : first + width]
    places = torch.from_numpy((start[:, None] + np.arange(width)).clip(0, length - 1)).to(values.device)
    return values[torch.arange(len(start), device=values.device)[:, None], places]


def unless_full(lengths: Int[np.ndarray, " B"], width: int) -> Int[Tensor, " B"] | None:
    """Lengths as the model takes them: ``None`` where every row is full, which is faster."""
    return None if (lengths == width).all() else torch.from_numpy(lengths)
