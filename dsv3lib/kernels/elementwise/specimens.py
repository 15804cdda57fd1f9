"""Compile fixtures for the ahead-of-time check: norms, RoPE, SwiGLU, the cached latent."""

from __future__ import annotations

from ..toolchain.language import triton
from ..toolchain.specimen import Specimen
from .gated import swiglu_backward_kernel, swiglu_kernel
from .latent import norm_and_turn_backward_kernel, norm_and_turn_kernel, widths
from .norms import meant_for, rms_norm_backward_kernel, rms_norm_kernel
from .rotary import rope_kernel


def elementwise() -> list[Specimen]:
    """All of them."""
    return _norms() + _rotary() + _gated() + _latent()


def _norms() -> list[Specimen]:
    """The norms of V3: the latents' widths 512 and 1536, and the model's 7168."""
    made = []
    for n in (512, 1536, 7168):
        for dtype, add in (("*bf16", False), ("*bf16", True), ("*fp32", False)):
            width = {"WIDTH": triton.next_power_of_2(n), "ADD": add}
            taken = width["WIDTH"] * (4 if dtype == "*fp32" else 2)
            sizes = {"M": "i32", "N": "i32", "stride_x": "i32"}
            pointers = dict.fromkeys(
                ("x", "weight", "residual", "y", "total", "grad", "extra", "grad_x"), dtype
            )
            pointers |= {"inverse_rms": "*fp32", "parts": "*fp32"} | sizes
            variant = f"{n} {dtype[1:]}{' with residual' if add else ''}"
            for operation, kernel, more in (
                ("rms_norm", rms_norm_kernel, {"stride_residual": "i32", "eps": "fp32"}),
                (
                    "rms_norm_backward",
                    rms_norm_backward_kernel,
                    {"stride_grad": "i32", "stride_extra": "i32"},
                ),
            ):
                made.append(Specimen(
                    operation, kernel, pointers | more, lambda row, w=width: w, variant,
                    rows=lambda row, n=n, taken=taken: meant_for(row, n, taken),
                    divisible=("M", "N", *(name for name in (*sizes, *more) if "stride" in name)),
                ))  # fmt: skip
    return made


def _rotary() -> list[Specimen]:
    """V3's 128 heads of 128 + 64 dimensions, in place and elsewhere, there and back."""
    made = []
    for dtype, copied, back in (
        ("*bf16", 0, False),
        ("*bf16", 128, False),
        ("*bf16", 128, True),
        ("*fp32", 128, False),
    ):
        strides = [f"stride_{name}" for name in ("qn", "qh", "kn", "out_qn", "out_qh", "out_kn")]
        pointers = dict.fromkeys(("q", "k", "out_q", "out_k"), dtype) | {"table": "*fp32"}
        sizes = dict.fromkeys(("tokens", "period", "q_programs", *strides), "i32")
        constants = {"HEADS": 128, "ROTARY": 64, "PAIRS": 32, "NOPE": 128, "COPIED": copied, "BACK": back}
        made.append(Specimen(
            "rope", rope_kernel, pointers | sizes, lambda row, c=constants: c,
            f"{dtype[1:]}{' elsewhere' if copied else ' in place'}{' back' if back else ''}",
            divisible=("tokens", "period", *strides),
        ))  # fmt: skip
    return made


def _gated() -> list[Specimen]:
    """Experts' hidden layers."""
    made = []
    for dtype in ("*bf16", "*fp32"):
        sizes = {"M": "i32", "I": "i32", "stride_x": "i32"}
        forward = {"gate_up": dtype, "out": dtype} | sizes
        backward = {"gate_up": dtype, "grad_both": dtype, "grad": dtype, "stride_grad": "i32"} | sizes
        even = ("M", "I", "stride_x")
        made.append(Specimen("swiglu", swiglu_kernel, forward, variant=dtype[1:], divisible=even))
        made.append(Specimen(
            "swiglu_backward", swiglu_backward_kernel, backward, variant=dtype[1:], divisible=(*even, "stride_grad")
        ))  # fmt: skip
    return made


def _latent() -> list[Specimen]:
    """V3's latent of 512 and 64."""
    made = []
    for dtype in ("*bf16", "*fp32"):
        pointers = dict.fromkeys(("x", "weight", "out", "grad", "grad_x"), dtype)
        pointers |= dict.fromkeys(("table", "inverse_rms", "parts"), "*fp32")
        sizes = dict.fromkeys(("M", "period", "stride_x", "stride_grad"), "i32") | {"eps": "fp32"}
        for operation, kernel in (
            ("norm_and_turn", norm_and_turn_kernel),
            ("norm_and_turn_backward", norm_and_turn_backward_kernel),
        ):
            made.append(Specimen(
                operation, kernel, pointers | sizes, lambda row: widths(512, 64), dtype[1:],
                divisible=("M", "period", "stride_x", "stride_grad"),
            ))  # fmt: skip
    return made
