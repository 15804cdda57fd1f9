"""FP8 quantisation: tiles and blocks, their references, fused forms, the rounding that they share."""
