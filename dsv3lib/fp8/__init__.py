"""FP8: formats, recipes, and the study of the accumulator."""
