"""FP8: the formats, the recipes that train in them, and the study of the accumulator (paper §3.3)."""
