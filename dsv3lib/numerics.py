"""Numbers that several floors share: the tile of 128, E4M3's largest value, log2 e.

A scale of FP8 quantisation is a tile's or block's largest absolute value times 1/448 (``kernels.quantize``); the cached
latent of the released FP8 format divides by 448 instead, which is its definition and differs in a last bit.
"""

from __future__ import annotations

import math

TILE = 128
"""Elements that share a scale along the inner dimension, and after which sums are promoted: N_C (§3.3.2)."""
E4M3_MAX = 448.0
"""The largest value of E4M3, 1.75 · 2^8."""
LOG2E = math.log2(math.e)
"""log2 e: exp(x) = exp2(x · log2 e), and the hardware has exp2."""
