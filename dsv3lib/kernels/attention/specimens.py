"""Compile fixtures for the ahead-of-time check: absorbed decoding, causal prefill, FP8 latents."""

from __future__ import annotations

from typing import Any

from ..toolchain import tuning
from ..toolchain.specimen import Specimen
from .latent_format import dequantize_latent_kernel, quantize_latent_kernel
from .mla_decode_kernels import MOST_SPLITS, PAGE, mla_decode_join_kernel, mla_decode_kernel
from .mla_prefill import mla_prefill_kernel
from .mla_prefill_backward import (
    KEYS,
    QUERIES,
    mla_prefill_delta_kernel,
    mla_prefill_dkv_kernel,
    mla_prefill_dq_kernel,
)
from .tiles import operand_constants, operand_types


def latent_format() -> list[Specimen]:
    """Both directions at V3's sizes."""
    sizes = {"C": 512, "R": 64, "BLOCK_T": 4, "BLOCK_R": 64}
    parts = {"values_ptr": "*fp8e4nv", "scales_ptr": "*fp32", "rope_ptr": "*bf16", "n_rows": "i32"}
    return [
        *(
            Specimen(
                "quantize_latent", quantize_latent_kernel, {"x_ptr": "*bf16", "stride_x": "i32", **parts},
                lambda row, power=power: {"POWER_OF_TWO": power, **sizes}, "power of two" if power else "",
                fp8=True, divisible=("stride_x",),
            )
            for power in (False, True)
        ),
        Specimen(
            "dequantize_latent",
            dequantize_latent_kernel,
            {"out_ptr": "*bf16", **parts},
            lambda row: sizes,
            fp8=True,
        ),
    ]  # fmt: skip


def mla_decode() -> list[Specimen]:
    """V3's sizes in BF16 and with the FP8 cache, the smallest model's in FP32, and the joining of splits."""
    common = {
        "table_ptr": "*i32", "lengths_ptr": "*i32", "lse_ptr": "*fp32", "scale": "fp32",
        **{name: "i32" for name in ("batch", "new", "heads", "stride_q_batch", "stride_q_row", "stride_table")},
    }  # fmt: skip
    sizes = {"C": 512, "R": 64, "BLOCK_C": 512, "BLOCK_R": 64, "PAGE_TOKENS": PAGE}
    missing = {"scales_ptr": None, "FP8": False}
    no_copies = {"latent_desc": None, "rope_desc": None}
    descriptors = {
        "latent_desc": "tensordesc<bf16[BLOCK_N, BLOCK_C]>", "rope_desc": "tensordesc<bf16[BLOCK_N, BLOCK_R]>",
    }  # fmt: skip
    half = {"q_ptr": "*bf16", "latent_ptr": "*bf16", "rope_ptr": "*bf16", **common}
    single = {"q_ptr": "*fp32", "latent_ptr": "*fp32", "rope_ptr": "*fp32", "out_ptr": "*fp32", **common}
    stored = {
        "q_ptr": "*bf16",
        "latent_ptr": "*fp8e4nv",
        "rope_ptr": "*bf16",
        "scales_ptr": "*fp32",
        **common,
    }
    stored_descriptors = {**descriptors, "latent_desc": "tensordesc<fp8e4nv[BLOCK_N, BLOCK_C]>"}

    def two_bytes(row: tuning.Row) -> bool:
        return row["when"].get("bytes") == [2, 2]

    def constants(row: tuning.Row) -> dict[str, Any]:
        return sizes | missing | ({} if row["TMA"] else no_copies)

    divisible = ("stride_q_batch", "stride_q_row")
    found = []
    for variant, kind in (("", "*bf16"), ("split", "*fp32")):
        found += [
            Specimen(
                "mla_decode", mla_decode_kernel, {**half, **descriptors, "out_ptr": kind}, constants, variant,
                matrix="bf16", rows=two_bytes, divisible=divisible,
            ),
            Specimen(
                "mla_decode_fp8", mla_decode_kernel, {**stored, **stored_descriptors, "out_ptr": kind},
                lambda row: {**sizes, "FP8": True, **({} if row["TMA"] else no_copies)}, variant,
                matrix="bf16", fp8=True, rows=two_bytes, divisible=divisible,
            ),
        ]  # fmt: skip
    small = {"C": 32, "R": 8, "BLOCK_C": 32, "BLOCK_R": 16, "PAGE_TOKENS": PAGE}
    found.append(
        Specimen(
            "mla_decode", mla_decode_kernel, single, lambda row: {**small, **missing, **no_copies}, "fp32 small",
            rows=lambda row: not two_bytes(row),
        )
    )  # fmt: skip
    join = {"parts_ptr": "*fp32", "parts_lse_ptr": "*fp32", "out_ptr": "*bf16", "lse_ptr": "*fp32"}
    found.append(
        Specimen(
            "mla_decode_join", mla_decode_join_kernel, {**join, "rows": "i32", "splits": "i32"},
            lambda row: {"C": 512, "BLOCK_C": 512, "BLOCK_S": MOST_SPLITS},
        )
    )  # fmt: skip
    return found


def mla_prefill() -> list[Specimen]:
    """V3's sizes in BF16, the rotary key shared or not, and the smallest model's in FP32; then backward's."""
    found = []
    for variant, single in (("", False), ("fp32 small", True)):
        kind = "*fp32" if single else "*bf16"
        types = {"q1_ptr": kind, "out_ptr": kind, "lse_ptr": "*fp32", "from_ptr": "*i32", "to_ptr": "*i32"}
        names = ("k1", "k2", "v")
        found.append(
            Specimen(
                "mla_prefill", mla_prefill_kernel,
                {**types, **operand_types(names, "BLOCK_N", single), "n_queries": "i32", "n_keys": "i32",
                 "scale": "fp32", "stride_q1t": "i32", "stride_q1h": "i32"},
                operand_constants(names, single), variant, matrix=None if single else "bf16",
                rows=lambda row, single=single: (row["when"].get("bytes") == [2, 2]) != single,
                divisible=() if single else tuple(f"stride_{n}{x}" for n in ("q1", *names) for x in "th"),
            )
        )  # fmt: skip
    return found + _mla_prefill_backward()


def _mla_prefill_backward() -> list[Specimen]:
    """V3's sizes in BF16 and the smallest model's in FP32."""
    found = []
    for variant, single in (("", False), ("fp32 small", True)):
        kind, matrix = ("*fp32", None) if single else ("*bf16", "bf16")
        scalars = {"scale": "fp32", "scale_log2": "fp32", "n_queries": "i32", "n_keys": "i32"}
        types = {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "from_ptr": "*i32", "to_ptr": "*i32", **scalars}

        def rows(row: tuning.Row, single: bool = single) -> bool:
            return (row["when"].get("bytes") == [2, 2]) != single

        def strides(names: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(f"stride_{name}{x}" for name in names for x in "th")

        held = {f"{n}_ptr": kind for n in (*KEYS, "dk1", "dk2", "dv")}
        held_strides = dict.fromkeys(strides((*KEYS, "dk1", "dk2")), "i32")
        found += [
            Specimen(
                "mla_prefill_dq", mla_prefill_dq_kernel,
                {**types, **operand_types(KEYS, "BLOCK_N", single), "q1_ptr": kind, "grad_ptr": kind, "dq_ptr": kind,
                 **dict.fromkeys(strides(("q1",)), "i32")},
                operand_constants(KEYS, single), variant, matrix, rows=rows,
                divisible=() if single else strides(("q1", *KEYS)),
            ),
            Specimen(
                "mla_prefill_dkv", mla_prefill_dkv_kernel,
                {**types, **held, **held_strides, **operand_types(QUERIES, "BLOCK_M", single)},
                operand_constants(QUERIES, single), variant, matrix, rows=rows,
                divisible=() if single else strides((*KEYS, *QUERIES, "dk1", "dk2")),
            ),
        ]  # fmt: skip
    found.append(
        Specimen(
            "mla_prefill_delta", mla_prefill_delta_kernel,
            {"out_ptr": "*bf16", "grad_ptr": "*bf16", "delta_ptr": "*fp32", "n_queries": "i32"},
            lambda row: {"DV": 128, "BLOCK_V": 128},
        )
    )  # fmt: skip
    return found
