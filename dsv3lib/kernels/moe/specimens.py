"""Compile fixtures for the ahead-of-time check: the gate and the permutation."""

from __future__ import annotations

from ..toolchain.specimen import Specimen
from .gate_kernel import gate_backward_kernel, gate_kernel
from .permutation import permute_kernel, unpermute_backward_kernel, unpermute_kernel
from .placement import count_visits_kernel, place_visits_kernel


def routing() -> list[Specimen]:
    """V3's gate, in training and in inference, and an odd one; with them what moves the tokens it has chosen for."""
    v3 = {"N_GROUP": 8, "GROUP": 32, "TOPK_GROUP": 4, "TOP_K": 8, "G_PAD": 8, "S_PAD": 32, "K_PAD": 8}
    odd = {"N_GROUP": 1, "GROUP": 72, "TOPK_GROUP": 1, "TOP_K": 6, "G_PAD": 1, "S_PAD": 128, "K_PAD": 8}
    forward = {
        "logits_ptr": "*fp32", "bias_ptr": "*fp32", "indices_ptr": "*i64", "weights_ptr": "*fp32",
        "scores_ptr": "*fp32", "stride_logits": "i32", "n_tokens": "i32", "scale": "fp32",
    }  # fmt: skip
    backward = {
        "kept_ptr": "*fp32", "indices_ptr": "*i64", "grad_weights_ptr": "*fp32", "grad_scores_ptr": "*fp32",
        "grad_logits_ptr": "*fp32", "stride_kept": "i32", "n_tokens": "i32", "n_experts": "i32", "scale": "fp32",
    }  # fmt: skip
    found = [
        Specimen(
            "gate", gate_kernel, forward,
            lambda row, sizes=sizes, scores=scores: {**sizes, "NORMALIZE": True, "WITH_SCORES": scores},
            variant, divisible=("stride_logits",) if sizes is v3 else (),
        )
        for variant, sizes, scores in (("training", v3, True), ("inference", v3, False), ("72 experts", odd, True))
    ]  # fmt: skip
    for variant, scores in (("", False), ("with the balance loss", True)):
        constants = {
            "TOP_K": 8, "NORMALIZE": True, "FROM_SCORES": True, "WITH_SCORES": scores, "E_PAD": 256,
        }  # fmt: skip
        found.append(
            Specimen(
                "gate_backward", gate_backward_kernel, backward, lambda row, c=constants: c, variant,
                divisible=("stride_kept", "n_experts"),
            )
        )  # fmt: skip
    return found + _permutation()


def _permutation() -> list[Specimen]:
    """V3's 256 experts of width 7168: BF16 rows, and E4M3 where they are only carried."""
    found = _placement()
    for kind in ("bf16", "u8"):
        arguments = {
            "x_ptr": f"*{kind}", "positions_ptr": "*i64", "rows_ptr": f"*{kind}", "stride_x": "i32", "width": "i32",
        }  # fmt: skip
        found.append(
            Specimen(
                "permute", permute_kernel, arguments, lambda row: {"VISITS": 8}, kind,
                divisible=("stride_x", "width"),
            )
        )  # fmt: skip
    gather = {
        "y_ptr": "*bf16", "weights_ptr": "*fp32", "positions_ptr": "*i64", "out_ptr": "*bf16", "stride_y": "i32",
        "width": "i32",
    }  # fmt: skip
    for variant, weighted in (("weighted", True), ("sum", False)):
        constants = {"VISITS": 8, "WEIGHTED": weighted}
        found.append(
            Specimen(
                "unpermute", unpermute_kernel, gather, lambda row, c=constants: c, variant,
                divisible=("stride_y", "width"),
            )
        )  # fmt: skip
    backward = {
        "grad_ptr": "*bf16", "y_ptr": "*bf16", "weights_ptr": "*fp32", "positions_ptr": "*i64",
        "grad_y_ptr": "*bf16", "grad_weights_ptr": "*fp32", "stride_grad": "i32", "stride_y": "i32", "width": "i32",
    }  # fmt: skip
    found.append(
        Specimen(
            "unpermute_backward", unpermute_backward_kernel, backward, lambda row: {"VISITS": 8},
            divisible=("stride_grad", "stride_y", "width"),
        )
    )  # fmt: skip
    return found


def _placement() -> list[Specimen]:
    """V3's 256 experts, over many blocks and in one."""
    sizes = {"n_visits": "i32", "n_experts": "i32"}
    count = {"indices_ptr": "*i64", "block_counts_ptr": "*i32", **sizes}
    place = {**count, "positions_ptr": "*i64", "counts_ptr": "*i64", "n_blocks": "i32"}
    found = [
        Specimen(
            "place_visits", count_visits_kernel, count,
            lambda row: {"E_PAD": 256}, "count", divisible=("n_experts",),
        )
    ]  # fmt: skip
    for variant, alone in (("place", False), ("alone", True)):
        constants = {"E_PAD": 256, "ALONE": alone}
        found.append(
            Specimen(
                "place_visits", place_visits_kernel, place,
                lambda row, c=constants: c, variant, divisible=("n_experts",),
            )
        )  # fmt: skip
    return found
