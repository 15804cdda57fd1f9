"""NoPE, a model without positions: the control of every study of positions, trained and never saved."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Complex
from torch import Tensor

from ..config import ModelConfig
from ..errors import CheckpointError
from ..layers.rope import RotaryEmbedding
from ..model import DeepSeekV3


class NoPositions(RotaryEmbedding):
    """Turns of length zero: the rotary part of every query and key becomes 0 and adds nothing to a score."""

    def table(self, length: int, like: Tensor) -> Complex[Tensor, "length half"]:
        """Zeros for positions 0 to ``length`` - 1."""
        dtype = torch.complex128 if like.dtype == torch.float64 else torch.complex64
        half = self.config.qk_rope_head_dim // 2
        return torch.zeros(length, half, dtype=dtype, device=like.device)


class PositionFreeModel(DeepSeekV3):
    """DeepSeekV3 with no rotary dimension in use (d_h^R = 0): attention sees a set of tokens, not a sequence.

    The configuration keeps the smallest rotary part that there is, a pair, which is multiplied by zero; it only
    widens the root under the scores from √d_h to √(d_h + 2).

    Args:
        config: sizes; its ``qk_rope_head_dim`` is replaced by 2. generator: source of the weights.
    """

    def __init__(self, config: ModelConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(config.replace(qk_rope_head_dim=2), generator)
        self.rope = NoPositions(self.config)

    def save_pretrained(self, folder: str | Path, **settings: object) -> None:
        """Refuse: no field of a configuration says "without positions", so whoever loaded it would get some.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError(
            f"{folder}: a model without positions is not saved: no config.json can say qk_rope_head_dim = 0, and "
            "whoever loaded the file would get a model with positions; train it again where it is needed"
        )
