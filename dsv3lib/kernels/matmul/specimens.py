"""Compile fixtures for the ahead-of-time check: FP8 and grouped matrix products."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..toolchain import tuning
from ..toolchain.specimen import Specimen
from .gemm import gemm_fp8_kernel
from .gemm_few_rows import gemm_fp8_few_rows_kernel, sum_of_parts_kernel
from .group_plan import plan_kernel
from .grouped_gemm import grouped_rows_kernel, grouped_weight_kernel
from .grouped_gemm_fp8 import grouped_fp8_kernel, grouped_wgrad_fp8_kernel


def gemm() -> list[Specimen]:
    """Every way in which these kernels are called."""
    sizes = dict.fromkeys(("M", "N", "K", "stride_am", "stride_ak", "stride_bn", "stride_bk"), "i32")
    inputs = {"a": "tensordesc<fp8e4nv[BLOCK_M, 128]>", "b": "tensordesc<fp8e4nv[BLOCK_N, 128]>"}
    common = {**inputs, "a_scales": "*fp32", "b_scales": "*fp32", **sizes}
    fp8: dict[str, Any] = {"matrix": "fp8", "fp8": True}

    def large(variant: str, kind: str, tiled: bool, add: bool) -> Specimen:
        arguments = {**common, "c": f"tensordesc<{kind}[BLOCK_M, BLOCK_N]>", "programs": "i32"}
        takes = "TILED" if tiled else "OUT" if kind == "fp32" else ""
        return Specimen(
            "gemm_fp8", gemm_fp8_kernel, arguments, lambda row: {"TILED": tiled, "ADD": add}, variant,
            rows=lambda row: not row["FEW_ROWS"] and _bound(row) == takes, divisible=("N", "K"), **fp8,
        )  # fmt: skip

    return [
        large("bf16", "bf16", tiled=False, add=False),
        large("fp32", "fp32", tiled=False, add=False),
        large("tiles x tiles, added", "fp32", tiled=True, add=True),
        *_gemm_few_rows(common),
    ]


def _bound(row: tuning.Row) -> str:
    """Which of the outputs a row is for: "TILED", "OUT" (FP32), or "" (BF16)."""
    return next((name for name in ("TILED", "OUT") if name in row["when"]), "")


def _gemm_few_rows(common: Mapping[str, str]) -> list[Specimen]:
    """These kernels, given the types of the arguments that all FP8 products share."""

    def few_rows(variant: str, kind: str) -> Specimen:
        extra = {"out": kind, "stride_part": "i64", "stride_out": "i32", "part_slices": "i32"}
        return Specimen(
            "gemm_fp8", gemm_fp8_few_rows_kernel, common | extra, lambda row: {"TILED": False, "CUT": False}, variant,
            rows=lambda row: bool(row["FEW_ROWS"]),
            divisible=("N", "K", "stride_part", "stride_out"), matrix="fp8", fp8=True,
        )  # fmt: skip

    return [
        few_rows("few rows", "*bf16"),
        few_rows("few rows, split K", "*fp32"),
        Specimen(
            "sum_of_parts",
            sum_of_parts_kernel,
            {"parts": "*fp32", "c": "*bf16", "size": "i32", "count": "i32"},
            lambda row: {"ADD": False},
            divisible=("size",),
        ),
    ]


def grouped_gemm() -> list[Specimen]:
    """Every way in which these kernels are called."""
    strides = dict.fromkeys(("stride_xm", "stride_bg", "stride_bn", "stride_bk", "stride_om"), "i32")
    sizes = dict.fromkeys(("tiles_m", "groups", "N", "K", "programs"), "i32")
    fast = ("N", "K", *strides)

    def rows(variant: str, kind: str, tma: bool, along_n: bool = False, aligned: bool = True) -> Specimen:
        block = "1, BLOCK_K, BLOCK_N" if along_n else "1, BLOCK_N, BLOCK_K"
        inputs = {"x": f"*{kind}", "matrices": f"*{kind}"}
        if tma:
            inputs = {
                "x": f"tensordesc<{kind}[BLOCK_M, BLOCK_K]>",
                "matrices": f"tensordesc<{kind}[{block}]>",
            }
        side = {"stride_bn" if along_n else "stride_bk": 1} if aligned else {}
        return Specimen(
            "grouped_gemm", grouped_rows_kernel, {**inputs, "out": f"*{kind}", "plan": "*i32", **sizes, **strides},
            lambda row: {"ALONG_N": along_n, **side}, variant, matrix="bf16" if aligned else None,
            rows=lambda row: bool(row["TMA"]) == tma and ("ALIGNED" in row["when"]) != aligned,
            divisible=fast if aligned else (),
        )  # fmt: skip

    def weight(variant: str, kind: str, aligned: bool = True) -> Specimen:
        own = dict.fromkeys(("M", "capacity", "stride_ym", "stride_og", "stride_on"), "i32")
        arguments = dict.fromkeys(("dy", "x", "out"), f"*{kind}") | {"counts": "*i64"} | sizes | strides | own
        return Specimen(
            "grouped_gemm_weight", grouped_weight_kernel, arguments, lambda row: {"GROUPS": 512, "MASKED": False},
            variant, matrix="bf16" if aligned else None, rows=lambda row: ("ALIGNED" in row["when"]) != aligned,
            divisible=(*fast, *own) if aligned else (),
        )  # fmt: skip

    return [
        *(rows(f"{way}{' TMA' if tma else ''}", "bf16", tma, way == "dx")
          for way in ("forward", "dx") for tma in (True, False)),
        rows("any strides", "bf16", tma=False, aligned=False),
        rows("fp32", "fp32", tma=False, aligned=False),
        weight("dW", "bf16"),
        weight("dW, any strides", "bf16", aligned=False),
        weight("dW, fp32", "fp32", aligned=False),
        *_group_plan(),
    ]  # fmt: skip


def _group_plan() -> list[Specimen]:
    """The plan of 256 experts in both layouts."""
    arguments = {"counts": "*i64", "plan": "*i32", "groups": "i32", "rows": "i32", "capacity": "i32"}
    return [
        Specimen(
            "group_plan", plan_kernel, arguments,
            lambda row, masked=masked: {"BLOCK_M": 128, "GROUPS": 512, "MASKED": masked}, variant,
        )
        for variant, masked in (("contiguous", False), ("masked", True))
    ]  # fmt: skip


def grouped_gemm_fp8() -> list[Specimen]:
    """Every way in which these kernels are called."""
    inputs = {"a": "tensordesc<fp8e4nv[BLOCK_M, 128]>", "b": "tensordesc<fp8e4nv[BLOCK_N, 128]>"}
    inputs |= {"a_scales": "*fp32", "b_scales": "*fp32"}
    sizes = dict.fromkeys(("groups", "N", "K", "stride_am", "stride_ak", "stride_bn", "stride_bk"), "i32")
    rows = {"plan": "*i32", "tiles_m": "i32", "stride_bg": "i32", "stride_om": "i32", "programs": "i32"}
    weight = {"counts": "*i64", "tokens": "i32", "stride_og": "i32", "stride_on": "i32"}
    fp8: dict[str, Any] = {"matrix": "fp8", "fp8": True}
    return [
        Specimen(
            "grouped_gemm_fp8", grouped_fp8_kernel, {**inputs, **sizes, **rows, "out": "*bf16"},
            divisible=("N", "K", "stride_om"), **fp8,
        ),
        *(
            Specimen(
                "grouped_wgrad_fp8", grouped_wgrad_fp8_kernel, {**inputs, **sizes, **weight, "out": "*fp32"},
                lambda row, add=add: {"GROUPS": 512, "ADD": add}, "added" if add else "",
                divisible=("N", "K", "tokens", "stride_og", "stride_on"), **fp8,
            )
            for add in (False, True)
        ),
    ]  # fmt: skip
