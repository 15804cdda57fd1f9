"""Mixture-of-experts kernels: the gate, the permutation of rows to experts and back."""
