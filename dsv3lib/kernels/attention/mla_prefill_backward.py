"""Backward of prefill attention: every score is made again from the saved lse (FlashAttention-2's scheme).

With P = exp(scale · q kᵀ - lse) and D = rowsum(dO ⊙ O): dV = Pᵀ dO, dS = P ⊙ (dO Vᵀ - D), dq = scale · dS k,
dk = scale · dSᵀ q. A sum over keys and a sum over queries want different tiles, and adding into memory from
many programs would make the result depend on their order. So there are two kernels, each writing its own rows
once: one holds a tile of queries and walks over keys (dq), the other a tile of keys and walks over queries (dk,
dv). Scores and dO Vᵀ are made twice for it: 7 products of forward's size instead of 5, and the same bits every run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...numerics import LOG2E
from ..toolchain import tuning
from ..toolchain.language import jit, row_offset, tl, triton
from ..toolchain.targets import on_device
from .spans import Spans
from .tiles import (
    Operands,
    block,
    bounds,
    load_rows,
    load_tile,
    store_rows,
    tile_number,
    unknown,
)

KEYS = ("k1", "k2", "v")
QUERIES = ("q1", "q2", "grad")


def backward(
    q: Tensor, k: Tensor, v: Tensor, k_rope: Tensor | None, out: Tensor, lse: Tensor, grad: Tensor,
    spans: Spans, scale: float, settings: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v and the shared rotary key.

    Args:
        out: forward's result.
        lse: forward's log-sum-exp of each row, FP32.
        grad: of out, contiguous.
        spans: who sees whom.
        settings: by operation.
    """
    heads = q.shape[1]

    def row(operation: str) -> dict[str, Any]:
        return settings.get(operation) or tuning.pick(operation, q.device, bytes=q.element_size())

    operands = Operands.of(q, k, v, k_rope, grad)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape, dtype=q.dtype, device=q.device)
    dv = torch.empty(v.shape, dtype=q.dtype, device=q.device)
    # Each head's part of the shared key's gradient; summed below in a fixed order.
    parts = None if k_rope is None else dk.new_empty(k.shape[0], heads, k_rope.shape[1])
    dk2 = dk[..., operands.k1.shape[-1] :] if parts is None else parts
    delta = torch.empty_like(lse)
    with on_device(q):
        if len(q):
            picked = row("mla_prefill_delta")
            mla_prefill_delta_kernel[(triton.cdiv(len(q), picked["BLOCK_M"]), heads)](
                out, grad, delta, len(q), DV=v.shape[2], BLOCK_V=block(v.shape[2]), **picked
            )
            picked = row("mla_prefill_dq")
            mla_prefill_dq_kernel[(triton.cdiv(len(q), picked["BLOCK_M"]), heads)](
                operands.q1, *operands.tensors(KEYS), grad, lse, delta, spans.key_from, spans.key_to, dq, scale,
                scale * LOG2E, len(q), len(k), *operands.strides(("q1", *KEYS)),
                **operands.launch(KEYS, picked, picked["BLOCK_N"]),
            )  # fmt: skip
        if len(k):
            picked = row("mla_prefill_dkv")
            mla_prefill_dkv_kernel[(triton.cdiv(len(k), picked["BLOCK_N"]), heads)](
                *operands.tensors(KEYS), *operands.tensors(QUERIES), lse, delta, spans.query_from, spans.query_to,
                dk, dk2, dv, scale, scale * LOG2E, len(q), len(k), *operands.strides((*KEYS, *QUERIES)),
                dk.stride(0), dk.stride(1), dk2.stride(0), dk2.stride(1),
                **operands.launch(QUERIES, picked, picked["BLOCK_M"]),
            )  # fmt: skip
    shared = None if parts is None else parts.sum(1, dtype=torch.float32).to(q.dtype)
    return dq, dk, dv, shared


@jit
def mla_prefill_delta_kernel(
    out_ptr, grad_ptr, delta_ptr, n_queries, DV: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr
):
    """D = rowsum(dO ⊙ O), [H, T]."""
    head = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    width = tl.num_programs(1) * DV
    out = load_rows(out_ptr + head * DV, row, n_queries, width, DV, BLOCK_V).to(tl.float32)
    grad = load_rows(grad_ptr + head * DV, row, n_queries, width, DV, BLOCK_V).to(tl.float32)
    tl.store(delta_ptr + row_offset(head, n_queries) + row, tl.sum(out * grad, 1), mask=row < n_queries)  # [BLOCK_M]


@jit
def _dq_step(
    q1, q2, grad, lse, delta, dq1, dq2, lo, hi, tile, scale,
    k1_desc, k2_desc, v_desc, k1_ptr, k2_ptr, v_ptr, head, n_keys,
    stride_k1t, stride_k1h, stride_k2t, stride_k2h, stride_vt, stride_vh,
    D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_1: tl.constexpr, BLOCK_2: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A tile of keys: their scores with these queries, and what each adds to dq."""
    first = tile * BLOCK_N
    k1 = load_tile(k1_desc, k1_ptr, first, n_keys, head, stride_k1t, stride_k1h, D1, BLOCK_1, BLOCK_N, TMA)
    k2 = k1
    if D2 > 0:
        k2 = load_tile(
            k2_desc, k2_ptr, first, n_keys, head, stride_k2t, stride_k2h, D2, BLOCK_2, BLOCK_N, TMA
        )
    s = tl.dot(q1, k1.T, input_precision="ieee")
    if D2 > 0:
        s = tl.dot(q2, k2.T, s, input_precision="ieee")
    v = load_tile(v_desc, v_ptr, first, n_keys, head, stride_vt, stride_vh, DV, BLOCK_V, BLOCK_N, TMA)
    p = tl.exp2(s * scale - lse[:, None])
    if MASKED:
        key = (first + tl.arange(0, BLOCK_N))[None, :]
        p = tl.where((key >= lo[:, None]) & (key < hi[:, None]), p, 0.0)
    ds = (p * (tl.dot(grad, v.T, input_precision="ieee") - delta[:, None])).to(k1.dtype)
    dq1 = tl.dot(ds, k1, dq1, input_precision="ieee")
    if D2 > 0:
        dq2 = tl.dot(ds, k2, dq2, input_precision="ieee")
    return dq1, dq2


@jit
def mla_prefill_dq_kernel(
    q1_ptr, k1_ptr, k2_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, from_ptr, to_ptr, dq_ptr, scale, scale_log2,
    n_queries, n_keys, stride_q1t, stride_q1h, stride_k1t, stride_k1h, stride_k2t, stride_k2h, stride_vt, stride_vh,
    k1_desc, k2_desc, v_desc, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_1: tl.constexpr, BLOCK_2: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_M queries of one head, over the keys that they see; the longest first."""
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_range = row < n_queries
    query = q1_ptr + row_offset(head, stride_q1h)
    q1 = load_rows(query, row, n_queries, stride_q1t, D1, BLOCK_1)
    q2 = q1
    dq1 = tl.zeros([BLOCK_M, BLOCK_1], tl.float32)
    dq2 = tl.zeros([BLOCK_M, BLOCK_2], tl.float32)
    if D2 > 0:
        q2 = load_rows(query + D1, row, n_queries, stride_q1t, D2, BLOCK_2)
    grad = load_rows(grad_ptr + head * DV, row, n_queries, heads * DV, DV, BLOCK_V)
    at = row_offset(head, n_queries) + row
    lse = tl.load(lse_ptr + at, mask=in_range, other=0.0) * 1.4426950408889634  # [BLOCK_M]
    delta = tl.load(delta_ptr + at, mask=in_range, other=0.0)  # [BLOCK_M]
    lo = tl.load(from_ptr + row, mask=in_range, other=0)  # [BLOCK_M]
    hi = tl.load(to_ptr + row, mask=in_range, other=0)  # [BLOCK_M]
    first, whole_first, whole_last, last = bounds(lo, hi, in_range, BLOCK_N)
    for tile in range(whole_first, whole_last):
        dq1, dq2 = _dq_step(
            q1, q2, grad, lse, delta, dq1, dq2, lo, hi, tile, scale_log2,
            k1_desc, k2_desc, v_desc, k1_ptr, k2_ptr, v_ptr, head, n_keys,
            stride_k1t, stride_k1h, stride_k2t, stride_k2h, stride_vt, stride_vh,
            D1, D2, DV, TMA, False, BLOCK_N, BLOCK_1, BLOCK_2, BLOCK_V,
        )  # fmt: skip
    for i in range(last - first - (whole_last - whole_first)):
        tile = tile_number(i, first, whole_first, whole_last)
        dq1, dq2 = _dq_step(
            q1, q2, grad, lse, delta, dq1, dq2, lo, hi, tile, scale_log2,
            k1_desc, k2_desc, v_desc, k1_ptr, k2_ptr, v_ptr, head, n_keys,
            stride_k1t, stride_k1h, stride_k2t, stride_k2h, stride_vt, stride_vh,
            D1, D2, DV, TMA, True, BLOCK_N, BLOCK_1, BLOCK_2, BLOCK_V,
        )  # fmt: skip
    to = dq_ptr + head * (D1 + D2)
    store_rows(to, dq1 * scale, row, n_queries, heads * (D1 + D2), D1, BLOCK_1)
    if D2 > 0:
        store_rows(to + D1, dq2 * scale, row, n_queries, heads * (D1 + D2), D2, BLOCK_2)


@jit
def _dkv_step(
    k1, k2, v, dk1, dk2, dv, lo, hi, tile, scale, lse_ptr, delta_ptr,
    q1_desc, q2_desc, grad_desc, q1_ptr, q2_ptr, grad_ptr, head, n_queries,
    stride_q1t, stride_q1h, stride_q2t, stride_q2h, stride_gradt, stride_gradh,
    D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_1: tl.constexpr, BLOCK_2: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A tile of queries: scores transposed, keys as rows, so that each product sums over queries."""
    first = tile * BLOCK_M
    q1 = load_tile(q1_desc, q1_ptr, first, n_queries, head, stride_q1t, stride_q1h, D1, BLOCK_1, BLOCK_M, TMA)
    q2 = q1
    query = first + tl.arange(0, BLOCK_M)
    lse = tl.load(lse_ptr + query, mask=query < n_queries, other=0.0) * 1.4426950408889634  # [BLOCK_M]
    delta = tl.load(delta_ptr + query, mask=query < n_queries, other=0.0)  # [BLOCK_M]
    if D2 > 0:
        q2 = load_tile(
            q2_desc, q2_ptr, first, n_queries, head, stride_q2t, stride_q2h, D2, BLOCK_2, BLOCK_M, TMA
        )
    s = tl.dot(k1, q1.T, input_precision="ieee")
    if D2 > 0:
        s = tl.dot(k2, q2.T, s, input_precision="ieee")
    grad = load_tile(
        grad_desc, grad_ptr, first, n_queries, head, stride_gradt, stride_gradh, DV, BLOCK_V, BLOCK_M, TMA
    )
    p = tl.exp2(s * scale - lse[None, :])
    if MASKED:
        p = tl.where((query[None, :] >= lo[:, None]) & (query[None, :] < hi[:, None]), p, 0.0)
    dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision="ieee")
    ds = (p * (tl.dot(v, grad.T, input_precision="ieee") - delta[None, :])).to(q1.dtype)
    dk1 = tl.dot(ds, q1, dk1, input_precision="ieee")
    if D2 > 0:
        dk2 = tl.dot(ds, q2, dk2, input_precision="ieee")
    return dk1, dk2, dv


@jit
def mla_prefill_dkv_kernel(
    k1_ptr, k2_ptr, v_ptr, q1_ptr, q2_ptr, grad_ptr, lse_ptr, delta_ptr, from_ptr, to_ptr, dk1_ptr, dk2_ptr, dv_ptr,
    scale, scale_log2, n_queries, n_keys,
    stride_k1t, stride_k1h, stride_k2t, stride_k2h, stride_vt, stride_vh,
    stride_q1t, stride_q1h, stride_q2t, stride_q2h, stride_gradt, stride_gradh,
    stride_dk1t, stride_dk1h, stride_dk2t, stride_dk2h,
    q1_desc, q2_desc, grad_desc, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_1: tl.constexpr, BLOCK_2: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_N keys of one head, over the queries that see them; early keys, seen longest, go first."""
    head = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_range = row < n_keys
    k1 = load_rows(k1_ptr + row_offset(head, stride_k1h), row, n_keys, stride_k1t, D1, BLOCK_1)
    k2 = k1
    dk1 = tl.zeros([BLOCK_N, BLOCK_1], tl.float32)
    dk2 = tl.zeros([BLOCK_N, BLOCK_2], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    if D2 > 0:
        k2 = load_rows(k2_ptr + row_offset(head, stride_k2h), row, n_keys, stride_k2t, D2, BLOCK_2)
    v = load_rows(v_ptr + row_offset(head, stride_vh), row, n_keys, stride_vt, DV, BLOCK_V)
    lse_ptr += row_offset(head, n_queries)
    delta_ptr += row_offset(head, n_queries)
    lo = tl.load(from_ptr + row, mask=in_range, other=0)  # [BLOCK_N]
    hi = tl.load(to_ptr + row, mask=in_range, other=0)  # [BLOCK_N]
    first, whole_first, whole_last, last = bounds(lo, hi, in_range, BLOCK_M)
    for i in range(last - first - (whole_last - whole_first)):
        tile = tile_number(i, first, whole_first, whole_last)
        dk1, dk2, dv = _dkv_step(
            k1, k2, v, dk1, dk2, dv, lo, hi, tile, scale_log2, lse_ptr, delta_ptr,
            q1_desc, q2_desc, grad_desc, q1_ptr, q2_ptr, grad_ptr, head, n_queries,
            stride_q1t, stride_q1h, stride_q2t, stride_q2h, stride_gradt, stride_gradh,
            D1, D2, DV, TMA, True, BLOCK_M, BLOCK_1, BLOCK_2, BLOCK_V,
        )  # fmt: skip
    for tile in range(whole_first, whole_last):
        dk1, dk2, dv = _dkv_step(
            k1, k2, v, dk1, dk2, dv, lo, hi, tile, scale_log2, lse_ptr, delta_ptr,
            q1_desc, q2_desc, grad_desc, q1_ptr, q2_ptr, grad_ptr, head, n_queries,
            stride_q1t, stride_q1h, stride_q2t, stride_q2h, stride_gradt, stride_gradh,
            D1, D2, DV, TMA, False, BLOCK_M, BLOCK_1, BLOCK_2, BLOCK_V,
        )  # fmt: skip
    # Worked out afresh: kept through the loops, rows and masks would take the sums' registers.
    row = unknown(tl.program_id(0) * BLOCK_N) + tl.arange(0, BLOCK_N)
    store_rows(dk1_ptr + row_offset(head, stride_dk1h), dk1 * scale, row, n_keys, stride_dk1t, D1, BLOCK_1)
    if D2 > 0:
        store_rows(
            dk2_ptr + row_offset(head, stride_dk2h), dk2 * scale, row, n_keys, stride_dk2t, D2, BLOCK_2
        )
    store_rows(dv_ptr + head * DV, dv, row, n_keys, tl.num_programs(1) * DV, DV, BLOCK_V)
