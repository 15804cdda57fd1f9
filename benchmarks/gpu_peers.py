"""What our kernels are measured against: PyTorch always, and the field's libraries where they can be imported.

A peer is only timed after its result agreed with the reference. One that is missing, refuses the shape or
computes something else is reported by name with its reason: "not measured" is a result too.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

Call = Callable[[], Tensor]
AGREES = 1e-2  # 1 − 2Σxy/Σ(x²+y²): far above rounding, far below another layout of the scales


class NotMeasured(Exception):
    """A peer cannot be measured here; the message is the reason."""


def difference(x: Tensor, y: Tensor) -> float:
    """1 − 2Σxy / Σ(x² + y²) in FP64: 0 for equal tensors, 1 for unrelated ones; NaN where either holds one."""
    x, y = x.double().flatten(), y.double().flatten()
    whole = (x * x + y * y).sum()
    return float(1 - 2 * (x * y).sum() / whole) if float(whole) != 0 else 0.0


def first_that_agrees(calls: Iterable[tuple[str, Callable[[], Call]]], expected: Tensor) -> Call:
    """The first call that runs and gives what is expected.

    Args:
        calls: a name and a function that prepares the call. expected: the reference's result.

    Raises:
        NotMeasured: with what each said.
    """
    reasons = []
    for name, prepare in calls:
        try:
            call = prepare()
            error = difference(call(), expected)
        except Exception as refusal:  # a peer may raise anything; its words are what is reported
            reasons.append(f"{name}: {_short(refusal)}")
            continue
        if error <= AGREES:
            return call
        reasons.append(f"{name}: differs by {error:.1e}")
    raise NotMeasured("; ".join(reasons))


def torch_scaled_mm(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, expected: Tensor) -> Call:
    """``torch.nn.functional.scaled_mm`` with 1x128 and 128x128 recipes; scales in the layouts that it may want."""
    kinds = getattr(F, "ScalingType", None)
    if kinds is None:
        raise NotMeasured("this torch has no scaled_mm with recipes")
    recipes = kinds.BlockWise1x128, kinds.BlockWise128x128
    a_by_column = a_scales.t().contiguous().t()

    def padded(scales: Tensor) -> Tensor:
        """K's tiles side by side, their number padded to a multiple of four."""
        n, k = scales.shape
        held = scales.new_zeros(n, -(-k // 4) * 4)
        held[:, :k] = scales
        return held[:, :k].t()

    def call(scales: Tensor) -> Callable[[], Call]:
        return lambda: (
            lambda: F.scaled_mm(
                a, b.t(), a_by_column, recipes[0], scales, recipes[1], output_dtype=torch.bfloat16
            )
        )

    across = b_scales.t()
    layouts = {
        "K-major": across,
        "padded": padded(b_scales),
        "N-major": b_scales,
        "copied": across.contiguous(),
    }
    return first_that_agrees(((name, call(s)) for name, s in layouts.items()), expected)


def deep_gemm(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, expected: Tensor) -> Call:
    """DeepGEMM's dense FP8 product, by its newer or its older name."""
    module = _import("deep_gemm")
    out = torch.empty(a.shape[0], b.shape[0], dtype=torch.bfloat16, device=a.device)

    def call(name: str) -> Callable[[], Call]:
        def prepare() -> Call:
            function = getattr(module, name)

            def run() -> Tensor:
                function((a, a_scales), (b, b_scales), out)
                return out

            return run

        return prepare

    return first_that_agrees(((n, call(n)) for n in ("fp8_gemm_nt", "gemm_fp8_fp8_bf16_nt")), expected)


def flash_mla(
    q: Tensor, cache: Tensor, table: Tensor, lengths: Tensor, width: int, scale: float, expected: Tensor
) -> Call:
    """FlashMLA's decode on the same pages."""
    module = _import("flash_mla")

    def prepare() -> Call:
        plan = module.get_mla_metadata(lengths, q.shape[1] * q.shape[2], 1)
        pages = cache.unsqueeze(2)
        return lambda: module.flash_mla_with_kvcache(
            q, pages, table, lengths, width, *plan, softmax_scale=scale, causal=True
        )[0]

    return first_that_agrees([("flash_mla_with_kvcache", prepare)], expected)


def flash_infer(
    q: Tensor, cache: Tensor, table: Tensor, lengths: Tensor, width: int, scale: float, expected: Tensor
) -> Call:
    """FlashInfer's paged MLA, planned outside the timed call."""
    module = _import("flashinfer")

    def prepare() -> Call:
        batch, new, heads, both = q.shape
        page = cache.shape[1]
        wrapper = module.mla.BatchMLAPagedAttentionWrapper(
            torch.empty(128 * 2**20, dtype=torch.int8, device=q.device), backend="auto"
        )
        held = (lengths + page - 1) // page
        rows = torch.arange(table.shape[1], device=q.device)[None] < held[:, None]
        starts = F.pad(held.cumsum(0), (1, 0)).int()
        queries = torch.arange(batch + 1, device=q.device, dtype=torch.int32) * new
        wrapper.plan(
            queries, starts, table[rows], lengths, heads, width, both - width, page, True, scale, q.dtype, cache.dtype
        )  # fmt: skip
        flat = q.flatten(0, 1)
        parts = flat[..., :width], flat[..., width:], cache[..., :width], cache[..., width:]
        return lambda: wrapper.run(*parts).view(batch, new, heads, width)

    return first_that_agrees([("BatchMLAPagedAttentionWrapper", prepare)], expected)


def torchao_gemm(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, expected: Tensor) -> Call:
    """torchao's Triton product with block scales."""
    module = _import("torchao.prototype.blockwise_fp8_inference.blockwise_quantization")

    def prepare() -> Call:
        function = module.blockwise_fp8_gemm
        return lambda: function(a, a_scales, b, b_scales)

    return first_that_agrees([("blockwise_fp8_gemm", prepare)], expected)


def _import(name: str):
    """A library, or the reason why it is not measured."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a library built for another torch fails in its own ways
        raise NotMeasured(_short(error)) from error


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
