"""Absorbed decoding: every head of a few new tokens attends to the paged latents, split over long contexts.

With absorption (paper §2.1.1) all heads share one key, the latent beside the turned key (576 values), and one
value, the latent itself (512): o_h = Σ_t softmax_t(scale · q_h·[c_t; k_t]) c_t. What a head would have had of its
own is in its query.

The two numbers, per cached token at V3's sizes in BF16: 1152 bytes read once, and 2 · (576 + 512) = 2176
operations a head. 128 heads make 242 operations a byte, where an H200's limits cross near 200: the matrix units
decide. 16 heads (one of eight GPUs) make 30: memory decides, and all that counts is to keep it busy.

The design that follows:

* A page of 64 tokens is brought into shared memory once, by the copy engine, and serves as keys and as values.
  Two pages and the queries of 64 rows fill 224 of a Hopper's 227 KiB.
* Many rows (heads x new tokens): 64 of them a program. The result, 64 x 512 FP32, is spread over 256 threads at
  128 registers each; the two halves of the threads share the scores of a page and then take 256 columns each.
* Few rows: transposed. Tokens and latent columns feed the 64-wide side of the matrix instruction, rows the
  narrow side (16 or 32), so that nothing is computed for padding.
* A row of the batch is cut into splits where there are too few programs for the chip; a second kernel joins
  the partial results, each weighed by its exp(lse), always in the same order: same input, same bits.
* The last, partly filled page is read through ordinary loads with a mask, after all others: what lies behind a
  row's end may be NaN, and a weight of 0 would not undo it. Whole pages need no mask.
* The FP8 cache (``latent_format.py``) is read as 656 bytes a token and multiplied by its scales on the way.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int32, Shaped
from torch import Tensor

from ...errors import KernelError
from ...numerics import LOG2E, TILE
from ..toolchain import tuning
from ..toolchain.checks import require_dtype, require_multiple, require_shape
from ..toolchain.language import TensorDescriptor, triton
from ..toolchain.targets import on_device, on_triton, processors, require_fp8
from .latent_format import dequantize_latent_ref, split_stored, stored_bytes
from .mla_decode_kernels import MOST_SPLITS, PAGE, mla_decode_join_kernel, mla_decode_kernel

MOST_TOKENS = 2**31 - 1  # in a cache
MOST_NEW = 4  # new tokens a call: one, and what speculation drafted
START_PAGES = 2  # what a split costs beyond its pages, in pages: queries in, partial results out and in again
COPY_BYTES = 16  # the copy engine wants rows that start on such a border
__all__ = ["as_pages", "mla_decode", "mla_decode_ref", "plan_splits"]

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def as_pages(
    buffer: Shaped[Tensor, "B S latent"],
) -> tuple[Shaped[Tensor, "pages 64 latent"], Int32[Tensor, "B per_row"]]:
    """A contiguous buffer of rows seen as pages, without a copy: row b owns pages b·S/64 to (b + 1)·S/64 - 1.

    Args:
        buffer: [B, S, C + R] (or bytes, for the FP8 form), S a multiple of 64: a layer's buffer of the cache.

    Returns:
        pages: a view. block_table: each row's pages in order.

    Raises:
        KernelError: S is no multiple of 64, or the buffer is not contiguous.
    """
    batch, capacity, width = buffer.shape
    if capacity % PAGE or not buffer.is_contiguous():
        raise KernelError(
            f"as_pages: buffer has shape {list(buffer.shape)} and strides {buffer.stride()}, expected a contiguous "
            f"one with room for a multiple of {PAGE} tokens: reserve {-(-capacity // PAGE) * PAGE}"
        )
    table = torch.arange(batch * capacity // PAGE, dtype=torch.int32, device=buffer.device)
    return buffer.view(-1, PAGE, width), table.view(batch, capacity // PAGE)


@lru_cache
def plan_splits(programs: int, pages: int, slots: int) -> int:
    """Into how many splits a context is cut, from sizes that the host knows: the lengths stay on the device.

    A split costs its pages and a start; all splits run in ⌈programs · splits / slots⌉ rounds. The least product
    wins, and of equals the fewest splits.

    Args:
        programs: blocks without splitting.
        pages: most pages a row can have.
        slots: programs that run at once.
    """

    def rounds_times_pages(splits: int) -> int:
        return -(-programs * splits // slots) * (-(-pages // splits) + START_PAGES)

    return min(range(1, max(1, min(pages, MOST_SPLITS)) + 1), key=rounds_times_pages)


def mla_decode_ref(
    q: Float[Tensor, "B new H latent"],
    cache: Tensor,
    block_table: Int32[Tensor, "B per_row"],
    lengths: Int32[Tensor, " B"],
    scale: float,
    value_dim: int,
) -> tuple[Float[Tensor, "B new H C"], Float[Tensor, "B new H"]]:
    """The plain form of :func:`mla_decode`: gather each row's tokens, then softmax in FP32 (FP64 for FP64)."""
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_zeros(*q.shape[:3], value_dim)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=exact, device=q.device)
    for b, length in enumerate(lengths.tolist()):
        kept = cache[block_table[b, : -(-length // PAGE)].long()].flatten(0, 1)[:length]
        if cache.dtype == torch.uint8:
            # The kernel multiplies in the queries' dtype, so values are rounded to it here too.
            kept = dequantize_latent_ref(kept, value_dim, q.dtype)
        kept = kept.to(exact)
        for j in range(q.shape[1]):
            seen = length - q.shape[1] + j + 1
            if seen > 0:
                scores = q[b, j].to(exact) @ kept[:seen].t() * scale
                lse[b, j] = scores.logsumexp(-1)
                out[b, j] = (scores.softmax(-1) @ kept[:seen, :value_dim]).to(q.dtype)
    return out, lse


def mla_decode(
    q: Float[Tensor, "B new H latent"],
    cache: Tensor,
    block_table: Int32[Tensor, "B per_row"],
    lengths: Int32[Tensor, " B"],
    scale: float,
    value_dim: int,
    splits: int | None = None,
    settings: dict[str, Any] | None = None,
) -> tuple[Float[Tensor, "B new H C"], Float[Tensor, "B new H"]]:
    """o = Σ_t softmax_t(scale · q·[c_t; k_t]) c_t over a row's cached tokens (paper Eq. 10, absorbed).

    Query j of ``new`` sees the row's first ``lengths - new + j + 1`` tokens: itself and all before.

    Args:
        q: absorbed queries, [W_UKᵀ q_nope; q_rope], of 1 to 4 new tokens; BF16, FP16 or FP32 (FP64 on the CPU).
        cache: [pages, 64, C + R] of q's dtype, or the FP8 form, uint8 [pages, 64, C + 4·C/128 + 2·R];
            contiguous. Memory beyond a row's end is never used, whatever it holds.
        block_table: the pages of each row in order.
        lengths: tokens per row *with* the new ones; both stay on the device, and their values are not checked.
        scale: of the scores, YaRN's factor included.
        value_dim: C, the part of a token that is its value.
        splits: into how many parts a row is cut; ``None`` chooses by the sizes.
        settings: block sizes and the like; ``None`` takes those that ship.

    Returns:
        out: q's dtype. lse: FP32, natural logarithm of the sum of exponentials; a query that sees nothing
        (a row of length 0) has out 0 and lse -inf.

    Raises:
        KernelError: dtypes, shapes or layout do not fit together; the GPU has no E4M3; a gradient is asked of the
            kernel (the reference has one).
    """
    fp8 = cache.dtype == torch.uint8
    _check(q, cache, block_table, lengths, value_dim, splits)
    if not on_triton(q, cache, block_table, lengths) or q.dtype == torch.float64:
        return mla_decode_ref(q, cache, block_table, lengths, scale, value_dim)
    if q.requires_grad and torch.is_grad_enabled():
        raise KernelError(
            "mla_decode: q requires a gradient and the kernel has none to give: decode under torch.no_grad() or "
            "torch.inference_mode(), or call mla_decode_ref"
        )
    operation = "mla_decode_fp8" if fp8 else "mla_decode"
    if fp8:
        require_fp8(operation, q.device)
    batch, new, heads, width = q.shape
    rows = new * heads
    if batch * rows == 0:
        return q.new_empty(*q.shape[:3], value_dim), q.new_empty(q.shape[:3], dtype=torch.float32)
    q = q.reshape(batch, rows, width)
    q = q if q.stride(-1) == 1 else q.contiguous()
    settings = dict(settings or tuning.pick(operation, q.device, rows=rows, bytes=q.element_size()))
    parts = _parts(cache, value_dim)
    settings["TMA"] = bool(settings["TMA"]) and _copyable(parts)
    tiles = triton.cdiv(rows, settings["BLOCK_ROWS"])
    if splits is None:
        slots = processors(q.device) * settings["RESIDENT"]
        splits = plan_splits(batch * tiles, block_table.shape[1], slots)
    settings.pop("RESIDENT")
    # One split writes the result itself; several write FP32 parts of it.
    kind = q.dtype if splits == 1 else torch.float32
    out = torch.empty(splits, batch, rows, value_dim, dtype=kind, device=q.device)
    lse = torch.empty(splits, batch, rows, dtype=torch.float32, device=q.device)
    descriptors = _descriptors(cache, value_dim, settings["BLOCK_N"], settings["TMA"])
    with on_device(q):
        mla_decode_kernel[batch * tiles, splits](
            q, *descriptors, *parts, block_table, lengths, out, lse, scale * LOG2E, batch, new, heads,
            q.stride(0), q.stride(1), block_table.stride(0), **_sizes(width, value_dim, cache), **settings,
        )  # fmt: skip
        if splits > 1:
            some, some_lse = out, lse
            out = torch.empty(batch, rows, value_dim, dtype=q.dtype, device=q.device)
            lse = torch.empty(batch, rows, dtype=torch.float32, device=q.device)
            join = tuning.pick("mla_decode_join", q.device)
            mla_decode_join_kernel[(batch * rows,)](
                some, some_lse, out, lse, batch * rows, splits, C=value_dim,
                BLOCK_C=triton.next_power_of_2(value_dim), BLOCK_S=triton.next_power_of_2(splits), **join,
            )  # fmt: skip
    return out.view(batch, new, heads, value_dim), lse.view(batch, new, heads)


def _check(
    q: Tensor, cache: Tensor, table: Tensor, lengths: Tensor, value_dim: int, splits: int | None
) -> None:
    batch, new, _, width = q.shape
    require_dtype("mla_decode", "q", q, (*FLOATS, torch.float64))
    if not 0 < value_dim < width:
        raise KernelError(
            f"mla_decode: value_dim is {value_dim}, expected 1 to {width - 1}, less than q's width"
        )
    if not 1 <= new <= MOST_NEW:
        raise KernelError(f"mla_decode: q holds {new} new tokens a row, expected 1 to {MOST_NEW}")
    if splits is not None and splits < 1:
        raise KernelError(f"mla_decode: splits is {splits}, expected at least 1")
    fp8 = cache.dtype == torch.uint8
    if not fp8:
        require_dtype("mla_decode", "cache", cache, (q.dtype, torch.uint8))
    if fp8:
        require_multiple("mla_decode", "value_dim of an FP8 cache", value_dim, TILE)
    stored = stored_bytes(value_dim, width - value_dim) if fp8 else width
    require_shape("mla_decode", "cache", cache, (None, PAGE, stored))
    if cache.shape[0] * PAGE > MOST_TOKENS:
        raise KernelError(
            f"mla_decode: cache holds {cache.shape[0]} pages, expected at most {MOST_TOKENS // PAGE}: the copy engine "
            "counts rows in 32 bits"
        )
    if not cache.is_contiguous() or cache.data_ptr() % COPY_BYTES:
        raise KernelError(
            f"mla_decode: cache has strides {cache.stride()} and starts {cache.data_ptr() % COPY_BYTES} bytes past a "
            f"{COPY_BYTES}-byte border, expected contiguous pages on such a border: call .contiguous() or .clone()"
        )
    require_dtype("mla_decode", "block_table", table, (torch.int32,))
    require_shape("mla_decode", "block_table", table, (batch, None))
    require_dtype("mla_decode", "lengths", lengths, (torch.int32,))
    require_shape("mla_decode", "lengths", lengths, (batch,))
    if table.shape[1] > 1 and table.stride(1) != 1 or batch > 1 and lengths.stride(0) != 1:
        raise KernelError("mla_decode: block_table and lengths must lie side by side: call .contiguous()")


def _copyable(parts: tuple[Tensor | None, ...]) -> bool:
    """Whether latents and keys start where the copy engine can read, row for row."""
    return all(
        part.numel()
        and not part.data_ptr() % COPY_BYTES
        and not part.stride(-2) * part.element_size() % COPY_BYTES
        for part in parts[:2]
    )


def _parts(cache: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Latents, keys and (of the FP8 form) scales, as views of the cache."""
    if cache.dtype == torch.uint8:
        values, scales, rope = split_stored(cache, rank)
        return values, rope, scales
    return cache, cache[..., rank:], None


def _descriptors(cache: Tensor, rank: int, tokens: int, copied: bool) -> tuple[Any, Any]:
    """What the copy engine is told of latents and keys, or nothing."""
    if not copied:
        return None, None
    flat = cache.view(-1, cache.shape[-1])
    latent, rope, _ = _parts(flat, rank)
    latent = latent[:, :rank]
    return tuple(
        TensorDescriptor(part, list(part.shape), list(part.stride()), [tokens, block])
        for part, block in ((latent, _block_c(rank, cache)), (rope, _block(rope.shape[1])))
    )


def _block_c(rank: int, cache: Tensor) -> int:
    """Columns that a latent is padded to; FP8 values go in tiles of 128."""
    return TILE * triton.next_power_of_2(rank // TILE) if cache.dtype == torch.uint8 else _block(rank)


def _block(size: int) -> int:
    """The power of two that covers a size, at least 16, the least that a matrix product takes."""
    return max(16, triton.next_power_of_2(size))


def _sizes(width: int, rank: int, cache: Tensor) -> dict[str, int | bool]:
    rope, fp8 = width - rank, cache.dtype == torch.uint8
    blocks = {"BLOCK_C": _block_c(rank, cache), "BLOCK_R": _block(rope)}
    return {"C": rank, "R": rope, "FP8": fp8, "PAGE_TOKENS": PAGE, **blocks}
