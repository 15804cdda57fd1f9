"""Custom autograd functions and second derivatives: refused at the first pass, never dropped in silence.

torch's own ``once_differentiable`` cuts the graph behind a backward and puts an error there, which only
``.backward()`` runs into: ``torch.autograd.grad(…, inputs)`` looks for a way to its inputs, does not find one through
the cut, and returns what comes by other ways as if it were all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.autograd.function import once_differentiable as cut

from .errors import GradientError


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a ``backward`` that has no derivative of its own: a pass with ``create_graph=True`` is refused.

    Args:
        backward: of a ``torch.autograd.Function``, under ``staticmethod``.

    Returns:
        The same, which raises :class:`GradientError` where a graph of the gradients is asked for (gradients are
        recorded in a backward pass only then).
    """
    once = cut(backward)

    @wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise GradientError(
                f"{backward.__qualname__.removesuffix('.backward')} has a first derivative only, and create_graph=True "
                "asks for its gradient's graph: leave create_graph out, or compute second derivatives in FP64 with "
                "plain modules (model.explain() names what is not plain)"
            )
        return once(ctx, *gradients)

    return checked
