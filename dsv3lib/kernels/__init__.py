"""The operations that carry the model's time: Triton kernels, each with a plain PyTorch reference (``*_ref``).

``toolchain.targets`` alone decides who computes; ``docs/kernels.md`` explains each as a lesson.
"""

from .attention.latent_format import (
    dequantize_latent,
    dequantize_latent_ref,
    quantize_latent,
    quantize_latent_ref,
)
from .attention.mla_decode import as_pages, mla_decode, mla_decode_ref
from .attention.mla_prefill import mla_prefill, mla_prefill_ref
from .elementwise import (
    add_rms_norm,
    add_rms_norm_ref,
    norm_and_turn,
    norm_and_turn_ref,
    rms_norm,
    rms_norm_ref,
    rope,
    rope_ref,
    swiglu,
    swiglu_ref,
)
from .matmul.gemm import dgrad, fprop, gemm_fp8, gemm_fp8_ref, wgrad
from .matmul.grouped_gemm import grouped_gemm, grouped_gemm_masked, grouped_gemm_masked_ref, grouped_gemm_ref
from .matmul.grouped_gemm_fp8 import (
    grouped_gemm_fp8,
    grouped_gemm_fp8_masked,
    grouped_gemm_fp8_masked_ref,
    grouped_gemm_fp8_ref,
    grouped_wgrad_fp8,
    grouped_wgrad_fp8_ref,
)
from .moe.gate_kernel import gate, gate_ref
from .moe.permutation import permute, permute_ref, unpermute, unpermute_ref
from .quantize.fused import (
    rms_norm_quantize,
    rms_norm_quantize_ref,
    swiglu_quantize,
    swiglu_quantize_ref,
)
from .quantize.tiles_and_blocks import (
    dequantize,
    dequantize_ref,
    quantize_blocks,
    quantize_blocks_both,
    quantize_blocks_ref,
    quantize_tiles,
    quantize_tiles_both,
    quantize_tiles_both_ref,
    quantize_tiles_ref,
)

__all__ = [
    "add_rms_norm",
    "add_rms_norm_ref",
    "as_pages",
    "dequantize",
    "dequantize_latent",
    "dequantize_latent_ref",
    "dequantize_ref",
    "dgrad",
    "fprop",
    "gate",
    "gate_ref",
    "gemm_fp8",
    "gemm_fp8_ref",
    "grouped_gemm",
    "grouped_gemm_fp8",
    "grouped_gemm_fp8_masked",
    "grouped_gemm_fp8_masked_ref",
    "grouped_gemm_fp8_ref",
    "grouped_gemm_masked",
    "grouped_gemm_masked_ref",
    "grouped_gemm_ref",
    "grouped_wgrad_fp8",
    "grouped_wgrad_fp8_ref",
    "mla_decode",
    "mla_decode_ref",
    "mla_prefill",
    "mla_prefill_ref",
    "norm_and_turn",
    "norm_and_turn_ref",
    "permute",
    "permute_ref",
    "quantize_blocks",
    "quantize_blocks_both",
    "quantize_blocks_ref",
    "quantize_latent",
    "quantize_latent_ref",
    "quantize_tiles",
    "quantize_tiles_both",
    "quantize_tiles_both_ref",
    "quantize_tiles_ref",
    "rms_norm",
    "rms_norm_quantize",
    "rms_norm_quantize_ref",
    "rms_norm_ref",
    "rope",
    "rope_ref",
    "swiglu",
    "swiglu_quantize",
    "swiglu_quantize_ref",
    "swiglu_ref",
    "unpermute",
    "unpermute_ref",
    "wgrad",
]
