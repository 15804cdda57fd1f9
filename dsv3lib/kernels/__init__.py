"""The operations that carry the model's time, each with a plain PyTorch reference (``*_ref``)."""

from .grouped_gemm import grouped_gemm, grouped_gemm_ref
from .permutation import permute, permute_ref, unpermute, unpermute_ref
from .quantize import dequantize, quantize_blocks, quantize_tiles
from .routing import gate, gate_ref

__all__ = [
    "dequantize",
    "gate",
    "gate_ref",
    "grouped_gemm",
    "grouped_gemm_ref",
    "permute",
    "permute_ref",
    "quantize_blocks",
    "quantize_tiles",
    "unpermute",
    "unpermute_ref",
]
