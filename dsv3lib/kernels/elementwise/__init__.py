"""What is left of a layer between its matrix products: norms, turns, activations, each a pass over memory.

None of them computes enough to matter; what counts is how often a value travels. Each of these operations reads
its inputs once and writes its results once, forward and backward, and is fused with its neighbour where that
saves a pass: see ``norms``, ``rotary``, ``gated`` and ``latent``.
"""

from __future__ import annotations

from .gated import swiglu, swiglu_ref
from .latent import norm_and_turn, norm_and_turn_ref
from .norms import add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_ref
from .rotary import rope, rope_ref

__all__ = [
    "add_rms_norm",
    "add_rms_norm_ref",
    "norm_and_turn",
    "norm_and_turn_ref",
    "rms_norm",
    "rms_norm_ref",
    "rope",
    "rope_ref",
    "swiglu",
    "swiglu_ref",
]
