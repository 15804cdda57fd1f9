"""What all layers of one forward pass share: positions, mask, cache, and who computes."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Complex, Int
from torch import Tensor

from ..recompute import Recompute
from .cache import LatentCache
from .operations import PLAIN_OPERATIONS, Operations


@dataclass(frozen=True)
class Step:
    """The facts of one call.

    Args:
        rotations: RoPE's rotations e^{iφ} of this call's tokens, [T, R/2], or [B, T, R/2] where rows stand at other
            positions.
        mask: which of the S cached positions a query sees, [B or 1, 1, T, S]; ``None`` where plain causality
            (T = S) or a single query (T = 1) says it all.
        cache: where latents are kept, or ``None``.
        lengths: valid tokens per row, or ``None`` for all.
        recompute: remembers how norms and up-projections are made again in backward; ``None`` keeps them.
        totals: tokens of each row with the new ones, on the cache's device, where kernels read the cache.
        backend: who computes, chosen once (``backends.choose``); plain PyTorch by default.
    """

    rotations: Complex[Tensor, "*BT half"]
    mask: Bool[Tensor, "B 1 T S"] | None = None
    cache: LatentCache | None = None
    lengths: Int[Tensor, " B"] | None = None
    recompute: Recompute | None = None
    totals: Int[Tensor, " B"] | None = None
    backend: Operations = PLAIN_OPERATIONS
