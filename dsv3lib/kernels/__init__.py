"""The operations that carry the model's time, each with a plain PyTorch reference (``*_ref``)."""

from .grouped_gemm import grouped_gemm, grouped_gemm_ref
from .quantize import dequantize, quantize_blocks, quantize_tiles

__all__ = ["dequantize", "grouped_gemm", "grouped_gemm_ref", "quantize_blocks", "quantize_tiles"]
