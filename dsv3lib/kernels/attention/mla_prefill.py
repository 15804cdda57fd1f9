"""Causal attention of prefill and training: 192-wide keys, 128-wide values, packed documents.

Where many queries meet many keys, MLA expands its latents to full keys and values (``layers.attention``) and
this is softmax(scale · q kᵀ + mask) v (paper Eq. 10), without the score matrix ever standing in memory.

The two numbers, for a document of T tokens and one head at V3's sizes: half of 2·(192 + 128)·T² operations
forward and 2.6 times that backward; 2·(192 + 192 + 128 + 128)·T bytes. At T = 4096 that is 1000 operations a
byte, five times what an H200 needs to be kept from waiting for memory: the matrix units decide.

* 192 is no power of two, and padding it to 256 would waste a quarter of them: scores are two products, 128 + 64,
  which fall on the key's content and rotary part. The rotary part is one for all heads and may be passed once.
* A tile of queries keeps a running maximum and sum (``_step``) while tiles of keys pass through shared memory.
* Documents are packed without padding. What a query sees is a span of keys, [lo, hi), worked out for each token
  beforehand; a tile's loop runs over the union of its rows' spans. Tiles that every row sees whole take no mask.
* Causal tiles differ in length; the longest start first, so that none is left over at the end.
* Backward (``mla_prefill_backward``) makes the scores again from the saved lse.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from ...autograd import once_differentiable
from ...errors import KernelError
from ...numerics import LOG2E
from ..toolchain import tuning
from ..toolchain.checks import require_dtype, require_rows, require_shape
from ..toolchain.language import jit, row_offset, tl, triton
from ..toolchain.targets import on_device, on_triton
from . import mla_prefill_backward
from .spans import Spans, attention_spans
from .tiles import (
    Operands,
    bounds,
    load_rows,
    load_tile,
    store_rows,
    tile_number,
)

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def mla_prefill_ref(
    q: Float[Tensor, "T H QK"],
    k: Float[Tensor, "S H K"],
    v: Float[Tensor, "S H V"],
    starts: Int32[Tensor, " borders"],
    scale: float,
    causal: bool = True,
    k_starts: Int32[Tensor, " borders"] | None = None,
    k_rope: Float[Tensor, "S R"] | None = None,
) -> tuple[Float[Tensor, "T H V"], Float[Tensor, "H T"]]:
    """The plain form of :func:`mla_prefill`: one document after the other, softmax in FP32 (FP64 for FP64)."""
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    if k_rope is not None:
        k = torch.cat([k, k_rope[:, None].expand(-1, k.shape[1], -1)], -1)
    borders, k_borders = starts.tolist(), (starts if k_starts is None else k_starts).tolist()
    outs, sums, done = [], [], 0
    for a, b, c, d in zip(borders, borders[1:], k_borders, k_borders[1:], strict=False):
        scores = torch.einsum("thd,shd->hts", q[a:b].to(exact), k[c:d].to(exact)) * scale
        if causal:
            seen = torch.ones(b - a, d - c, dtype=torch.bool, device=q.device).tril(d - c - (b - a))
            scores = scores.masked_fill(~seen, float("-inf"))
        lse = scores.logsumexp(-1)
        p = (scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp()
        outs.append(torch.einsum("hts,shv->thv", p, v[c:d].to(exact)).to(q.dtype))
        sums.append(lse)
        done = b
    rest = q.shape[0] - done  # tokens past the last border see nothing
    outs.append(q.new_zeros(rest, q.shape[1], v.shape[2]))
    sums.append(torch.full((q.shape[1], rest), float("-inf"), dtype=exact, device=q.device))
    return torch.cat(outs), torch.cat(sums, 1)


def mla_prefill(
    q: Float[Tensor, "T H QK"],
    k: Float[Tensor, "S H K"],
    v: Float[Tensor, "S H V"],
    starts: Int32[Tensor, " borders"],
    scale: float,
    causal: bool = True,
    k_starts: Int32[Tensor, " borders"] | None = None,
    k_rope: Float[Tensor, "S R"] | None = None,
    settings: dict[str, dict[str, Any]] | None = None,
) -> tuple[Float[Tensor, "T H V"], Float[Tensor, "H T"]]:
    """softmax(scale · q kᵀ) v within each of several packed documents (paper Eq. 10).

    A batch [B, T, H, ·] is B documents of T tokens: flatten it and pass ``starts = arange(B + 1) · T``. What a
    query does not see has the weight 0, which does not undo NaN: operands must be finite in every document.

    Args:
        q: queries of all documents, one after the other; BF16, FP16 or FP32 (FP64 on the CPU).
        k: keys, laid out and typed like ``q``.
        v: values, laid out and typed like ``q``.
        starts: Int32 [documents + 1], where each begins, and the end of the last; documents may be empty. They
            stay on the device, and their values are not checked.
        scale: of the scores, YaRN's factor included.
        causal: whether a query sees its own token and those before alone, or the whole document.
        k_starts: borders of the documents' keys where they differ: a document's queries are its last tokens,
            so that prefill can go on behind a cache. ``None``: as ``starts``.
        k_rope: the part of the key that all heads share, once; k then holds the rest, and QK = K + R.
        settings: by operation ("mla_prefill", "mla_prefill_dq", "mla_prefill_dkv"); ``None`` takes what ships.

    Returns:
        out: q's dtype; differentiable in q, k, v and k_rope. lse: FP32 [H, T], natural logarithm of the sum of
        exponentials, without a gradient. Queries that see nothing get 0 and -inf.

    Raises:
        KernelError: dtypes, shapes or layout do not fit together.
    """
    _check(q, k, v, starts, k_starts, k_rope)
    if not on_triton(q, k, v, starts, k_starts, k_rope) or q.dtype == torch.float64:
        out, lse = mla_prefill_ref(q, k, v, starts, scale, causal, k_starts, k_rope)
        return out, lse.detach()
    k_starts = starts if k_starts is None else k_starts
    spans = attention_spans(starts, k_starts, q.shape[0], k.shape[0], causal)
    return _Prefill.apply(q, k, v, k_rope, spans, scale, settings or {})


def _check(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, k_starts: Tensor | None, k_rope: Tensor | None
) -> None:
    require_dtype("mla_prefill", "q", q, (*FLOATS, torch.float64))
    heads, shared = q.shape[1], 0 if k_rope is None else k_rope.shape[-1]
    require_shape("mla_prefill", "k", k, (None, heads, q.shape[2] - shared))
    require_shape("mla_prefill", "v", v, (k.shape[0], heads, None))
    if k_rope is not None:
        require_shape("mla_prefill", "k_rope", k_rope, (k.shape[0], None))
    elif k_starts is None and k.shape[0] != q.shape[0]:
        raise KernelError(
            f"mla_prefill: there are {q.shape[0]} queries and {k.shape[0]} keys: where they differ, pass k_starts"
        )
    for name, tensor in (("k", k), ("v", v), ("k_rope", k_rope)):
        if tensor is not None:
            require_dtype("mla_prefill", name, tensor, (q.dtype,))
    for name, tensor in (("starts", starts), ("k_starts", k_starts)):
        if tensor is not None:
            require_dtype("mla_prefill", name, tensor, (torch.int32,))
            require_shape("mla_prefill", name, tensor, (starts.shape[0],))
    if starts.shape[0] < 1 or not all(q.shape[1:]) or not all((*k.shape[1:], v.shape[2])):
        raise KernelError(
            f"mla_prefill: q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} need heads and widths of at "
            f"least 1, and starts {list(starts.shape)} at least one border"
        )
    for name, tensor in (("q", q), ("k", k), ("v", v), ("k_rope", k_rope)):
        if tensor is not None:
            require_rows("mla_prefill", name, tensor)


class _Prefill(torch.autograd.Function):
    """Saves q, k, v, out and lse; nothing of size T²."""

    @staticmethod
    def forward(ctx, q, k, v, k_rope, spans: Spans, scale: float, settings: dict[str, Any]):
        row = settings.get("mla_prefill") or tuning.pick("mla_prefill", q.device, bytes=q.element_size())
        operands = Operands.of(q, k, v, k_rope)
        out = torch.empty(q.shape[0], q.shape[1], v.shape[2], dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
        if len(q):
            grid = (triton.cdiv(len(q), row["BLOCK_M"]), q.shape[1])
            names = ("k1", "k2", "v")
            with on_device(q):
                mla_prefill_kernel[grid](
                    operands.q1, *operands.tensors(names), spans.key_from, spans.key_to, out, lse, scale * LOG2E,
                    len(q), len(k), *operands.strides(("q1", *names)), **operands.launch(names, row, row["BLOCK_N"]),
                )  # fmt: skip
        ctx.save_for_backward(q, k, v, k_rope, out, lse, *spans)
        ctx.scale, ctx.settings = scale, settings
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        q, k, v, k_rope, out, lse, *spans = ctx.saved_tensors
        grads = mla_prefill_backward.backward(
            q, k, v, k_rope, out, lse, grad.contiguous(), Spans(*spans), ctx.scale, ctx.settings
        )
        return *grads, None, None, None


@jit
def _step(
    q1, q2, m, l, acc, lo, hi, tile, scale,
    k1_desc, k2_desc, v_desc, k1_ptr, k2_ptr, v_ptr, head, n_keys,
    stride_k1t, stride_k1h, stride_k2t, stride_k2h, stride_vt, stride_vh,
    D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_1: tl.constexpr, BLOCK_2: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A tile of keys and values into the running softmax; the maximum starts finite, so that -inf is no NaN."""
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
    if MASKED:
        key = (first + tl.arange(0, BLOCK_N))[None, :]
        s = tl.where((key >= lo[:, None]) & (key < hi[:, None]), s, float("-inf"))
    new = tl.maximum(m, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - new[:, None])
    shrink = tl.exp2(m - new)
    l = l * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return new, l, acc


@jit
def mla_prefill_kernel(
    q1_ptr, k1_ptr, k2_ptr, v_ptr, from_ptr, to_ptr, out_ptr, lse_ptr, scale, n_queries, n_keys,
    stride_q1t, stride_q1h, stride_k1t, stride_k1h, stride_k2t, stride_k2h, stride_vt, stride_vh,
    k1_desc, k2_desc, v_desc, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_1: tl.constexpr, BLOCK_2: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_M queries of one head. Later tiles have longer spans, so the last goes first."""
    head = tl.program_id(1)
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M + tl.arange(0, BLOCK_M)
    query = q1_ptr + row_offset(head, stride_q1h)
    q1 = load_rows(query, row, n_queries, stride_q1t, D1, BLOCK_1)
    q2 = q1
    if D2 > 0:
        q2 = load_rows(query + D1, row, n_queries, stride_q1t, D2, BLOCK_2)
    lo = tl.load(from_ptr + row, mask=row < n_queries, other=0)  # [BLOCK_M]
    hi = tl.load(to_ptr + row, mask=row < n_queries, other=0)  # [BLOCK_M]
    first, whole_first, whole_last, last = bounds(lo, hi, row < n_queries, BLOCK_N)
    m = tl.full([BLOCK_M], -1e30, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for tile in range(whole_first, whole_last):
        m, l, acc = _step(
            q1, q2, m, l, acc, lo, hi, tile, scale, k1_desc, k2_desc, v_desc, k1_ptr, k2_ptr, v_ptr, head, n_keys,
            stride_k1t, stride_k1h, stride_k2t, stride_k2h, stride_vt, stride_vh,
            D1, D2, DV, TMA, False, BLOCK_N, BLOCK_1, BLOCK_2, BLOCK_V,
        )  # fmt: skip
    for i in range(last - first - (whole_last - whole_first)):
        tile = tile_number(i, first, whole_first, whole_last)
        m, l, acc = _step(
            q1, q2, m, l, acc, lo, hi, tile, scale, k1_desc, k2_desc, v_desc, k1_ptr, k2_ptr, v_ptr, head, n_keys,
            stride_k1t, stride_k1h, stride_k2t, stride_k2h, stride_vt, stride_vh,
            D1, D2, DV, TMA, True, BLOCK_N, BLOCK_1, BLOCK_2, BLOCK_V,
        )  # fmt: skip
    nothing = l == 0.0
    total = tl.where(nothing, 1.0, l)
    lse = tl.where(nothing, float("-inf"), (m + tl.log2(total)) / 1.4426950408889634)
    tl.store(lse_ptr + row_offset(head, n_queries) + row, lse, mask=row < n_queries)  # [BLOCK_M]
    width = tl.num_programs(1) * DV
    store_rows(out_ptr + head * DV, acc / total[:, None], row, n_queries, width, DV, BLOCK_V)
