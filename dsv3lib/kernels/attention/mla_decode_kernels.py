"""The two kernels of absorbed decoding: a split of a row's pages, and the joining of splits (see ``mla_decode``).

The state of a program is that of a running softmax: for each of its rows the largest score so far m, the sum of
exponentials l, and the weighted latents acc, all relative to m. A tile of tokens brings new scores; where the
largest grows, the old sums shrink by exp2(m - new).
"""

from __future__ import annotations

from ..toolchain.language import jit, row_offset, tl
from .latent_format import latent_columns
from .tiles import unknown

PAGE = 64  # tokens a page: the edge of a Hopper's matrix instruction
MOST_SPLITS = 64  # the second kernel reads as many partial results, one after the other


@jit
def _load_tile(
    latent_ptr, rope_ptr, scales_ptr, page, first, end, like,
    C: tl.constexpr, R: tl.constexpr, FP8: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, PAGE_TOKENS: tl.constexpr,
):  # fmt: skip
    """Latents [BLOCK_N, C] and keys [BLOCK_N, R] of the tokens from ``first`` on, zeros from ``end`` on."""
    tokens = first + tl.arange(0, BLOCK_N)
    stored = page * PAGE_TOKENS + tokens % PAGE_TOKENS
    valid = (tokens < end)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    r = tl.arange(0, BLOCK_R)[None, :]
    if FP8:
        BYTES: tl.constexpr = C + C // 32 + 2 * R
        columns = latent_columns(BLOCK_C // 128)
        keep = valid[:, :, None] & (columns < C)
        # [BLOCK_N, BLOCK_C / 128, 128]
        values = tl.load(
            latent_ptr + row_offset(stored, BYTES)[:, None, None] + columns, mask=keep, other=0.0
        )
        tiles = tl.arange(0, BLOCK_C // 128)[None, :]
        at = row_offset(stored, BYTES // 4)[:, None] + tiles
        scale = tl.load(scales_ptr + at, mask=valid & (tiles < C // 128), other=0.0)  # [BLOCK_N, BLOCK_C / 128]
        latent = tl.reshape((values.to(tl.float32) * scale[:, :, None]).to(like), [BLOCK_N, BLOCK_C])
        at = row_offset(stored, BYTES // 2)[:, None] + r
        key = tl.load(rope_ptr + at, mask=valid & (r < R), other=0.0).to(tl.float32).to(like)  # [BLOCK_N, BLOCK_R]
    else:
        offset = row_offset(stored, C + R)[:, None]
        latent = tl.load(latent_ptr + offset + c, mask=valid & (c < C), other=0.0)  # [BLOCK_N, BLOCK_C]
        key = tl.load(rope_ptr + offset + r, mask=valid & (r < R), other=0.0)  # [BLOCK_N, BLOCK_R]
    return latent, key


@jit
def _copy_tile(
    latent_desc, rope_desc, rope_ptr, scales_ptr, at, like, C: tl.constexpr, R: tl.constexpr, FP8: tl.constexpr,
    SWAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The same of a whole tile by the copy engine, from row ``at`` of the cache on.

    Transposed, tiles are not fetched ahead (two programs on a processor take turns instead), and each copy is
    waited for where it is asked for: there the small key goes by ordinary loads, on their way before.
    """
    if SWAP and not FP8:
        r = tl.arange(0, BLOCK_R)[None, :]
        rows = row_offset(at + tl.arange(0, BLOCK_N), C + R)[:, None]
        key = tl.load(rope_ptr + rows + r, mask=r < R, other=0.0)  # [BLOCK_N, BLOCK_R]
    else:
        key = rope_desc.load([at, 0])  # [BLOCK_N, BLOCK_R]
    latent = latent_desc.load([at, 0])  # [BLOCK_N, BLOCK_C]
    if FP8:
        TILES: tl.constexpr = BLOCK_C // 128
        stored = at + tl.arange(0, BLOCK_N)
        tiles = tl.arange(0, TILES)[None, :]
        offset = row_offset(stored, (C + C // 32 + 2 * R) // 4)[:, None] + tiles
        scale = tl.load(scales_ptr + offset, mask=tiles < C // 128, other=0.0)  # [BLOCK_N, TILES]
        values = tl.reshape(latent, [BLOCK_N, TILES, 128]).to(tl.float32)
        latent = tl.reshape((values * scale[:, :, None]).to(like), [BLOCK_N, BLOCK_C])
        key = key.to(tl.float32).to(like)
    return latent, key


@jit
def _weigh(s, m, l, KIND: tl.constexpr, SWAP: tl.constexpr):
    """One step of the running softmax: scores to weights, the new maximum and sum, and what the old ones shrink by.

    Everything is in powers of two. The maximum starts at a finite -1e30, so that a tile of which a row sees
    nothing adds exp2(-inf) = 0 and not NaN.
    """
    AXIS: tl.constexpr = 0 if SWAP else 1
    new = tl.maximum(m, tl.max(s, AXIS))
    p = tl.exp2(s - tl.expand_dims(new, AXIS))
    shrink = tl.exp2(m - new)
    return p.to(KIND), new, l * shrink + tl.sum(p, AXIS), shrink


@jit
def _attend(q, q_rope, latent, key, m, l, acc, limit, tokens, all_seen, scale, SWAP: tl.constexpr):
    """Scores of a tile of tokens, and their values into the running result.

    Two things here are for the compiler. Scores are scaled apart and then added: it would otherwise chain the
    two products. And the softmax stands in a branch, whose results the compiler does not follow: seeing one
    product feed another, it gives all warps the rows of the first and, with 64 rows for 8 warps, computes every
    score twice. The branch is worth having by itself, as most tiles need no mask.
    """
    if SWAP:
        content = tl.dot(latent, q.T, input_precision="ieee")
        position = tl.dot(key, q_rope.T, input_precision="ieee")
        keep = tokens[:, None] < limit[None, :]
    else:
        content = tl.dot(q, latent.T, input_precision="ieee")
        position = tl.dot(q_rope, key.T, input_precision="ieee")
        keep = tokens[None, :] < limit[:, None]
    s = content * scale + position * scale
    if all_seen:
        p, m, l, shrink = _weigh(s, m, l, latent.dtype, SWAP)
    else:
        p, m, l, shrink = _weigh(tl.where(keep, s, float("-inf")), m, l, latent.dtype, SWAP)
    if SWAP:
        acc = tl.dot(latent.T, p, acc * shrink[None, :], input_precision="ieee")
    else:
        acc = tl.dot(p, latent, acc * shrink[:, None], input_precision="ieee")
    return m, l, acc


@jit
def mla_decode_kernel(
    q_ptr, latent_desc, rope_desc, latent_ptr, rope_ptr, scales_ptr, table_ptr, lengths_ptr, out_ptr, lse_ptr,
    scale, batch, new, heads, stride_q_batch, stride_q_row, stride_table,
    C: tl.constexpr, R: tl.constexpr, FP8: tl.constexpr, TMA: tl.constexpr, SWAP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
):  # fmt: skip
    """A program: some rows (heads x new tokens) of a sequence, over one split of its tokens."""
    rows = new * heads
    blocks = tl.cdiv(rows, BLOCK_ROWS)
    b = tl.program_id(0) // blocks
    split = tl.program_id(1)
    row = tl.program_id(0) % blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    c = tl.arange(0, BLOCK_C)
    r = tl.arange(0, BLOCK_R)
    in_range = (row < rows)[:, None]
    query = q_ptr + row_offset(b, stride_q_batch) + row_offset(row, stride_q_row)[:, None]
    q = tl.load(query + c[None, :], mask=in_range & (c < C)[None, :], other=0.0)  # [BLOCK_ROWS, BLOCK_C]
    q_rope = tl.load(query + C + r[None, :], mask=in_range & (r < R)[None, :], other=0.0)  # [BLOCK_ROWS, BLOCK_R]

    length = tl.load(lengths_ptr + b)  # scalar
    limit = length - new + row // heads + 1  # tokens that each row sees
    tiles = tl.cdiv(length, BLOCK_N)
    share = tl.cdiv(tiles, tl.num_programs(1))
    first = split * share
    last = tl.minimum(first + share, tiles)
    table = table_ptr + row_offset(b, stride_table)

    m = tl.full([BLOCK_ROWS], -1e30, tl.float32)
    l = tl.zeros([BLOCK_ROWS], tl.float32)
    if SWAP:
        acc = tl.zeros([BLOCK_C, BLOCK_ROWS], tl.float32)
    else:
        acc = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    end = last
    if TMA:  # the copy engine knows no mask: it brings whole tiles, the partly filled one comes last
        last = tl.minimum(last, length // BLOCK_N)
    page = tl.load(table + first * BLOCK_N // PAGE_TOKENS, mask=first < last, other=0)  # scalar
    for tile in range(first, last):
        start = tile * BLOCK_N
        if TMA:
            at = page * PAGE_TOKENS + start % PAGE_TOKENS
            latent, key = _copy_tile(
                latent_desc, rope_desc, rope_ptr, scales_ptr, at, q.dtype,
                C, R, FP8, SWAP, BLOCK_N, BLOCK_C, BLOCK_R,
            )  # fmt: skip
        else:
            latent, key = _load_tile(
                latent_ptr, rope_ptr, scales_ptr, page, start, length, q.dtype,
                C, R, FP8, BLOCK_N, BLOCK_C, BLOCK_R, PAGE_TOKENS,
            )  # fmt: skip
        # The next page's number is fetched a tile ahead, or every copy would wait for it.
        page = tl.load(table + (start + BLOCK_N) // PAGE_TOKENS, mask=tile + 1 < last, other=0)  # scalar
        tokens = start + tl.arange(0, BLOCK_N)
        all_seen = start + BLOCK_N <= length - new + 1
        m, l, acc = _attend(q, q_rope, latent, key, m, l, acc, limit, tokens, all_seen, scale, SWAP)
    if TMA:
        if first < end and last < end:
            start = last * BLOCK_N
            page = tl.load(table + start // PAGE_TOKENS)  # scalar
            latent, key = _load_tile(
                latent_ptr, rope_ptr, scales_ptr, page, start, length, q.dtype,
                C, R, FP8, BLOCK_N, BLOCK_C, BLOCK_R, PAGE_TOKENS,
            )  # fmt: skip
            tokens = start + tl.arange(0, BLOCK_N)
            all_seen = start + BLOCK_N <= length - new + 1
            m, l, acc = _attend(q, q_rope, latent, key, m, l, acc, limit, tokens, all_seen, scale, SWAP)

    # Rows and their masks are worked out afresh: kept through the loop they would take the result's registers.
    row = unknown(tl.program_id(0) % blocks * BLOCK_ROWS) + tl.arange(0, BLOCK_ROWS)
    in_range = (row < rows)[:, None]
    # A row that saw nothing: 0 / 1 = 0, and its lse is -inf.
    total = tl.where(l == 0.0, 1.0, l)
    written = row_offset(split * batch + b, rows) + row
    lse = tl.where(l == 0.0, float("-inf"), (m + tl.log2(total)) / 1.4426950408889634)
    tl.store(lse_ptr + written, lse, mask=row < rows)  # [BLOCK_ROWS]
    if SWAP:
        at = row_offset(written, C)[None, :] + c[:, None]
        keep = (row < rows)[None, :] & (c < C)[:, None]
        value = acc / total[None, :]
    else:
        at = row_offset(written, C)[:, None] + c[None, :]
        keep = in_range & (c < C)[None, :]
        value = acc / total[:, None]
    # [BLOCK_ROWS, BLOCK_C], with SWAP [BLOCK_C, BLOCK_ROWS]
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=keep)


@jit
def mla_decode_join_kernel(
    parts_ptr, parts_lse_ptr, out_ptr, lse_ptr, rows, splits,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """out = Σ_s exp(lse_s - lse) out_s, one row a program, splits in their order."""
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    c = tl.arange(0, BLOCK_C)
    parts = tl.load(parts_lse_ptr + row_offset(s, rows) + row, mask=s < splits, other=float("-inf"))  # [BLOCK_S]
    highest = tl.max(parts, 0)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(tl.exp(parts - shift), 0)
    acc = tl.zeros([BLOCK_C], tl.float32)
    at = row
    for _ in range(splits):
        weight = tl.exp(tl.load(parts_lse_ptr + at) - shift)  # scalar
        acc += weight * tl.load(parts_ptr + row_offset(at, C) + c, mask=c < C, other=0.0)  # [BLOCK_C]
        at += rows
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    acc = acc / total
    tl.store(out_ptr + row_offset(row, C) + c, acc.to(out_ptr.dtype.element_ty), mask=c < C)  # [BLOCK_C]
    tl.store(lse_ptr + row, tl.where(nothing, float("-inf"), shift + tl.log(total)))  # scalar
