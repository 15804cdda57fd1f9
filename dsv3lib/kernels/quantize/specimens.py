"""Compile fixtures for the ahead-of-time check: the quantisers, alone and fused."""

from __future__ import annotations

from ..elementwise.norms import meant_for
from ..toolchain.language import triton
from ..toolchain.specimen import Specimen
from .fused import rms_norm_quantize_kernel, swiglu_quantize_kernel
from .tiles_and_blocks import (
    TILE,
    dequantize_kernel,
    quantize_blocks_kernel,
    quantize_tiles_both_kernel,
    quantize_tiles_kernel,
)


def quantize() -> list[Specimen]:
    """The ways in which these kernels are called at V3's sizes."""
    made, fp8 = [], "*fp8e4nv"

    def add(operation, kernel, pointers, sizes, variant, even=None, **constants) -> None:
        arguments = pointers | {"scales": "*fp32", "scales_t": "*fp32"} | dict.fromkeys(sizes, "i32")
        needs_fp8 = fp8 in pointers.values()
        made.append(Specimen(
            operation, kernel, arguments, lambda row: constants, variant, fp8=needs_fp8, divisible=even or sizes
        ))  # fmt: skip

    for values, name in ((fp8, "e4m3"), ("*fp16", "e5m6")):
        for x, flat, power in (("*bf16", True, False), ("*bf16", False, True), ("*fp32", True, False)):
            add("quantize_tiles", quantize_tiles_kernel, {"x": x, "values": values},
                ("n_tiles", "per_row", "stride_x"),
                f"{name} {x[1:]}{'' if flat else ' rows apart'}{' power of two' if power else ''}",
                ("n_tiles", "stride_x"), FLAT=flat, POWER_OF_TWO=power, E5M6=values != fp8)  # fmt: skip
    for power in (False, True):
        add("quantize_tiles_both", quantize_tiles_both_kernel,
            {"x": "*bf16", "values": fp8, "words_t": "*i32"}, ("M", "K", "padded", "stride_x"),
            "power of two" if power else "", POWER_OF_TWO=power)  # fmt: skip
    for w, turned in (("*bf16", True), ("*fp32", False)):
        add("quantize_blocks", quantize_blocks_kernel, {"w": w, "values": fp8, "values_t": fp8},
            ("N", "K", "stride_w"), f"{w[1:]}{' both' if turned else ''}",
            POWER_OF_TWO=False, TRANSPOSED=turned, EDGE=TILE, SIDE=TILE)  # fmt: skip
    for height, even, values in ((1, True, fp8), (TILE, True, fp8), (TILE, False, fp8), (1, True, "*fp16")):
        add("dequantize", dequantize_kernel, {"values": values, "out": "*bf16"}, ("n_tiles", "per_row", "K"),
            f"{values[1:]} {'tiles' if height == 1 else 'blocks'}{'' if even else ' cut short'}",
            ("n_tiles", "K") if even else ("n_tiles",), HEIGHT=height, EVEN=even)  # fmt: skip
    return made


def fused_quantize() -> list[Specimen]:
    """Experts' hidden layer, and the norms before FP8 products: of the query's latent, of the model's width."""
    made = []
    for keep in (False, True):
        pointers = {"gate_up": "*bf16", "kept": "*bf16", "values": "*fp8e4nv", "scales": "*fp32"}
        made.append(Specimen(
            "swiglu_quantize", swiglu_quantize_kernel,
            pointers | {"n_tiles": "i32", "per_row": "i32", "stride_x": "i32"},
            lambda row, keep=keep: {"POWER_OF_TWO": False, "KEEP": keep},
            f"bf16{' kept' if keep else ''}", fp8=True, divisible=("n_tiles", "per_row", "stride_x"),
        ))  # fmt: skip
    for n in (512, 1536, 7168):
        for power, keep in ((False, False), (True, True)):
            pointers = dict.fromkeys(("x", "weight", "kept"), "*bf16")
            pointers |= {"values": "*fp8e4nv", "scales": "*fp32", "inverse_rms": "*fp32"}
            tiles = triton.next_power_of_2(n // TILE)
            made.append(Specimen(
                "rms_norm_quantize", rms_norm_quantize_kernel,
                pointers | {"M": "i32", "N": "i32", "stride_x": "i32", "eps": "fp32"},
                lambda row, p=power, k=keep, t=tiles: {"POWER_OF_TWO": p, "KEEP": k, "TILES": t},
                f"{n} bf16{' power of two, kept' if keep else ''}", fp8=True,
                rows=lambda row, n=n: meant_for(row, n), divisible=("M", "N", "stride_x"),
            ))  # fmt: skip
    return made
