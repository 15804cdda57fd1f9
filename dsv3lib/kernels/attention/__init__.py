"""Attention kernels: absorbed decoding over paged latents, causal prefill with its backward, FP8 latents."""
