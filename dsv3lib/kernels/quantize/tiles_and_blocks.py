"""FP8 with one scale a tile: 1 x 128 for activations, 128 x 128 for weights (paper §3.3.2, Figure 7a).

E4M3 reaches from 2^-9 to 448. One scale for a whole tensor is set by its largest value, and everything a few
hundred times smaller falls to zero; one scale for each 128 values confines an outlier to its own tile. The
scale returned is what a stored value is *multiplied* by, as ``weight_scale_inv`` is in the released files,
despite its name.

The two numbers, for 32768 tokens of V3's width 7168 in BF16: 0.47 GB read, 0.23 GB of values and 7 MB of scales
written; about eight instructions a value, where 132 multiprocessors have time for twenty in the time that its
three bytes take at 4.3 TB/s. Memory is the limit as long as nothing costs tens of instructions, and an exact
division would: so a tile divides once, for the inverse of its scale, and each value is multiplied by that.
Reference and kernel do the same operations in the same order, each rounded as IEEE says, and agree to the last
bit. The largest value is found among bit patterns, which sort as the sizes do, with infinity above all numbers
and NaN above infinity: no NaN is lost.

Every value is read once and stays in registers until it is written. A thread reads 16 bytes at a time, four
times before their first use; at 32 registers a multiprocessor holds all 2048 threads that it can, and 128 KiB
are on their way to it, four times what covers the memory's latency.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import KernelError
from ..toolchain import tuning
from ..toolchain.checks import require_dtype, require_multiple
from ..toolchain.language import jit, row_offset, tl, to_e4m3, triton
from ..toolchain.targets import has_fp8, on_device, on_triton
from .reference import (
    TILE,
    BothWays,
    Format,
    dequantize_ref,
    quantize_blocks_ref,
    quantize_tiles_both_ref,
    quantize_tiles_ref,
    scale_height,
)
from .rounding import pack_e4m3, rounded_to, scale_and_inverse, size_bits, to_e5m6, widened

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # FP64 goes to the reference
DTYPES = (*KERNEL_DTYPES, torch.float64)
LARGEST_SQUARE = 128  # edge of a block that one program holds in registers

Settings = dict[str, int]


# ---- what one calls ----------------------------------------------------------------------------------------


def quantize_tiles(
    x: Float[Tensor, "*M K"],
    power_of_two: bool = False,
    format: Format = "e4m3",
    settings: Settings | None = None,
) -> tuple[Float[Tensor, "*M K"], Float[Tensor, "*M tiles"]]:
    """Quantise with one scale per 1 x 128 tile, amax / 448 (an all-zero tile gets 1).

    scale = max |x| · (1 / 448), values = E4M3(x · (1 / scale)), to nearest even (paper §3.3.2), in FP32. No scale
    lies below 2^-126. A tile that holds NaN or infinity has scale NaN and all values NaN: what is wrong stays visible.

    Differs from the released code: amax has no floor (there 1e-4), so that small tiles keep their digits; and a
    power-of-two scale is found on the bits, where exp2(ceil(log2 x)) is now and then half of what is needed.

    Args:
        x: FP32, BF16, FP16 or FP64; K divides by 128.
        power_of_two: round the scale up to a power of two, so that a change of tiles rounds nothing
            (paper §3.3.3).
        format: ``"e5m6"`` is V3's 12-bit format for the input of the linear after attention (paper §3.3.3): 5
            bits of exponent, 6 of mantissa, largest value 65024.
        settings: the kernel's, instead of those in ``tuned/``.

    Returns:
        values: float8_e4m3fn, the shape of x; E5M6 as FP16, whose range it shares, holding nothing but E5M6's
        values. scales: FP32 [..., K/128]; x ≈ values · scale.

    Raises:
        KernelError: K does not divide by 128; a format or dtype that is not there.
    """
    require_dtype("quantize_tiles", "x", x, DTYPES)
    require_multiple("quantize_tiles", "the last dimension", x.shape[-1], TILE)
    if format not in ("e4m3", "e5m6"):
        raise KernelError(f"quantize_tiles: format is {format!r}, expected 'e4m3' or 'e5m6'")
    if not _on_kernel(x, fp8=format == "e4m3"):
        return quantize_tiles_ref(x, power_of_two, format)
    values = x.new_empty(x.shape, dtype=torch.float16 if format == "e5m6" else torch.float8_e4m3fn)
    scales = x.new_empty(*x.shape[:-1], x.shape[-1] // TILE, dtype=torch.float32)
    if x.ndim == 2 and x.stride(1) == 1:
        rows = x
    else:
        rows = x.contiguous().view(-1, x.shape[-1])
    if scales.numel():
        row = settings or tuning.pick("quantize_tiles", x.device, tiles=scales.numel())
        with on_device(x):
            quantize_tiles_kernel[(triton.cdiv(scales.numel(), row["TILES"]),)](
                rows, values, scales, scales.numel(), scales.shape[-1], rows.stride(0),
                FLAT=rows.is_contiguous(), POWER_OF_TWO=power_of_two, E5M6=format == "e5m6", **row,
            )  # fmt: skip
    return values, scales


def quantize_tiles_both(
    x: Float[Tensor, "M K"], power_of_two: bool = False, settings: Settings | None = None
) -> BothWays:
    """Quantise a matrix to E4M3 along its rows, and its transpose along its columns, reading it once.

    The forward product sums over K, the product for the weights' gradient over M, and FP8 matrix instructions
    want both operands laid out along that sum: 1 x 128 tiles become 128 x 1 tiles (paper §3.3.2). Both come from
    the same high-precision values, so nothing is rounded twice.

    Args:
        x: [M, K], K divides by 128; any M.
        power_of_two: as in :func:`quantize_tiles`.

    Returns:
        values [M, K], scales [M, K/128], values_t [K, P], scales_t [K, P/128] with P the next multiple of 128 from
        M; beyond M stand zeros, which add nothing to a sum over M.

    Raises:
        KernelError: K does not divide by 128; a dtype that is not there.
    """
    require_dtype("quantize_tiles_both", "x", x, DTYPES)
    require_multiple("quantize_tiles_both", "the last dimension", x.shape[-1], TILE)
    if not _on_kernel(x):
        return quantize_tiles_both_ref(x, power_of_two)
    m, k = x.shape
    padded = m + -m % TILE
    both = BothWays(
        x.new_empty(m, k, dtype=torch.float8_e4m3fn),
        x.new_empty(m, k // TILE, dtype=torch.float32),
        x.new_empty(k, padded, dtype=torch.float8_e4m3fn),
        x.new_empty(k, padded // TILE, dtype=torch.float32),
    )
    if m and k:
        x = x if x.stride(1) == 1 else x.contiguous()
        row = settings or tuning.pick("quantize_tiles_both", x.device, M=m, K=k)
        with on_device(x):
            quantize_tiles_both_kernel[(k // TILE, padded // TILE)](
                x, both.values, both.scales, both.values_t.view(torch.int32), both.scales_t,
                m, k, padded, x.stride(0), POWER_OF_TWO=power_of_two, **row,
            )  # fmt: skip
    return both


def quantize_blocks(
    w: Float[Tensor, "N K"],
    block: int = TILE,
    power_of_two: bool = False,
    settings: Settings | None = None,
) -> tuple[Float[Tensor, "N K"], Float[Tensor, "rows cols"]]:
    """Quantise a weight to E4M3 with one scale per ``block`` x ``block``; edges may be cut short.

    Args:
        w: [N, K], any sizes.
        power_of_two: round scales up to powers of two.

    Returns:
        values: float8_e4m3fn [N, K]. scales: FP32 [ceil(N/block), ceil(K/block)]. Zeros, NaN and infinity are
        treated as in :func:`quantize_tiles`.

    Raises:
        KernelError: the block has no edge; a dtype that is not there.
    """
    values, scales, _ = _quantize_blocks(w, block, power_of_two, False, settings)
    return values, scales


def quantize_blocks_both(
    w: Float[Tensor, "N K"], power_of_two: bool = False, settings: Settings | None = None
) -> BothWays:
    """The same for 128 x 128 blocks, with the transposed copy that the product for the input's gradient reads.

    A square block of the transpose is the transposed block: it has the same scale and the same values.

    Returns:
        values [N, K], scales [ceil(N/128), ceil(K/128)], values_t [K, N], scales_t, the transpose of scales.

    Raises:
        KernelError: a dtype that is not there.
    """
    values, scales, values_t = _quantize_blocks(w, TILE, power_of_two, True, settings)
    if values_t is None:
        values_t = values.t().contiguous()
    return BothWays(values, scales, values_t, scales.t().contiguous())


def dequantize(
    values: Tensor,
    scales: Float[Tensor, "*s"],
    block: int = TILE,
    dtype: torch.dtype = torch.float32,
    settings: Settings | None = None,
) -> Float[Tensor, "*M K"]:
    """values · scale, for tiles (a scale per row and 128 columns) and for blocks (a scale per square).

    Args:
        values: float8_e4m3fn, or E5M6 in FP16.
        scales: FP32, as either quantiser returned them.
        block: edge of a square, width of a tile.

    Raises:
        KernelError: the scales fit neither form, or a dtype that is not there.
    """
    require_dtype("dequantize", "values", values, (torch.float8_e4m3fn, torch.float16))
    require_dtype("dequantize", "scales", scales, (torch.float32,))
    height = scale_height(values, scales, block)
    fp8 = values.dtype == torch.float8_e4m3fn
    on_gpu = not values.is_meta and on_triton(values, scales) and (not fp8 or has_fp8(values.device))
    if not on_gpu or dtype not in KERNEL_DTYPES or block != TILE:
        return dequantize_ref(values, scales, block, dtype)
    rows = values.contiguous().view(-1, values.shape[-1]) if values.numel() else values
    out = values.new_empty(values.shape, dtype=dtype)
    if values.numel():
        m, k = rows.shape
        tiles = triton.cdiv(k, TILE)
        row = settings or tuning.pick("dequantize", values.device, tiles=m * tiles)
        with on_device(values):
            dequantize_kernel[(triton.cdiv(m * tiles, row["TILES"]),)](
                rows, scales.contiguous(), out, m * tiles, tiles, k, HEIGHT=height, EVEN=k % TILE == 0, **row
            )
    return out


def _quantize_blocks(
    w: Tensor, block: int, power_of_two: bool, transposed: bool, settings: Settings | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    require_dtype("quantize_blocks", "w", w, DTYPES)
    if block < 1:
        raise KernelError(f"quantize_blocks: block is {block}, expected at least 1")
    if not _on_kernel(w) or block > LARGEST_SQUARE:
        return *quantize_blocks_ref(w, block, power_of_two), None
    n, k = w.shape
    grid = (triton.cdiv(k, block), triton.cdiv(n, block))
    values = w.new_empty(n, k, dtype=torch.float8_e4m3fn)
    values_t = w.new_empty(k, n, dtype=torch.float8_e4m3fn) if transposed else None
    scales = w.new_empty(grid[1], grid[0], dtype=torch.float32)
    if w.numel():
        w = w if w.stride(1) == 1 else w.contiguous()
        row = settings or tuning.pick("quantize_blocks", w.device, N=n, K=k)
        with on_device(w):
            quantize_blocks_kernel[grid](
                w, values, scales, values_t, n, k, w.stride(0), POWER_OF_TWO=power_of_two,
                TRANSPOSED=transposed, EDGE=block, SIDE=triton.next_power_of_2(block), **row,
            )  # fmt: skip
    return values, scales, values_t


def _on_kernel(x: Tensor, fp8: bool = True) -> bool:
    """FP64, a tensor that is only a shape, and E4M3 on a GPU without it go to the reference."""
    return not x.is_meta and on_triton(x) and x.dtype in KERNEL_DTYPES and (not fp8 or has_fp8(x.device))


# ---- the kernels -------------------------------------------------------------------------------------------


@jit
def quantize_tiles_kernel(
    x, values, scales, n_tiles, per_row, stride_x,
    FLAT: tl.constexpr, POWER_OF_TWO: tl.constexpr, E5M6: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """TILES tiles a program, taken in the order in which they lie, whatever the width of a row."""
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    inside = (tile < n_tiles)[:, None]
    column = tl.arange(0, 128)[None, :]
    target = row_offset(tile, 128)[:, None] + column
    if FLAT:
        source = target
    else:
        source = (row_offset(tile // per_row, stride_x) + (tile % per_row) * 128)[:, None] + column
    tiles = widened(tl.load(x + source, mask=inside, other=0.0))  # [TILES, 128]
    scale, inverse = scale_and_inverse(tl.max(size_bits(tiles), 1), POWER_OF_TWO, E5M6)
    scaled = tiles * inverse[:, None]
    rounded = to_e5m6(scaled) if E5M6 else to_e4m3(scaled)
    tl.store(values + target, rounded, mask=inside)  # [TILES, 128]
    tl.store(scales + tile, scale, mask=tile < n_tiles)  # [TILES]


@jit
def _load_rows(x, row, column, M, stride_x):
    place = row_offset(row, stride_x)[:, None] + column[None, :]
    return widened(tl.load(x + place, mask=(row < M)[:, None], other=0.0))  # [32, 128]


@jit
def _write_rows(values, scales, rows, row, column, M, K, along, POWER_OF_TWO: tl.constexpr):
    """Quantise tiles of rows and write them; gives back the largest sizes along the columns."""
    bits = size_bits(rows)
    scale, inverse = scale_and_inverse(tl.max(bits, 1), POWER_OF_TWO, False)
    place = row_offset(row, K)[:, None] + column[None, :]
    tl.store(values + place, to_e4m3(rows * inverse[:, None]), mask=(row < M)[:, None])  # [32, 128]
    tl.store(scales + row_offset(row, K // 128) + along, scale, mask=row < M)  # [32]
    return bits


@jit
def quantize_tiles_both_kernel(
    x, values, scales, words_t, scales_t, M, K, padded, stride_x, POWER_OF_TWO: tl.constexpr
):
    """One square of 128 x 128 a program: read once, scaled along both edges, written straight and turned.

    Bytes are slow to turn one by one. So the square is read as four sets of rows, 4i, 4i + 1, 4i + 2 and
    4i + 3, of which a thread holds the same places: four neighbours of the transpose meet in one thread, are
    packed into a word, and words are turned.
    """
    along = tl.program_id(0)
    column = along * 128 + tl.arange(0, 128)
    row = tl.program_id(1) * 128 + tl.arange(0, 32) * 4
    x0 = _load_rows(x, row, column, M, stride_x)
    x1 = _load_rows(x, row + 1, column, M, stride_x)
    x2 = _load_rows(x, row + 2, column, M, stride_x)
    x3 = _load_rows(x, row + 3, column, M, stride_x)
    b0 = _write_rows(values, scales, x0, row, column, M, K, along, POWER_OF_TWO)
    b1 = _write_rows(values, scales, x1, row + 1, column, M, K, along, POWER_OF_TWO)
    b2 = _write_rows(values, scales, x2, row + 2, column, M, K, along, POWER_OF_TWO)
    b3 = _write_rows(values, scales, x3, row + 3, column, M, K, along, POWER_OF_TWO)
    bits = tl.max(tl.maximum(tl.maximum(b0, b1), tl.maximum(b2, b3)), 0)
    scale, inverse = scale_and_inverse(bits, POWER_OF_TWO, False)
    by = inverse[None, :]
    turned = tl.trans(pack_e4m3(x0 * by, x1 * by, x2 * by, x3 * by))
    word = tl.program_id(1) * 32 + tl.arange(0, 32)
    tl.store(words_t + row_offset(column, padded // 4)[:, None] + word[None, :], turned)  # [128, 32] words of four
    tl.store(scales_t + row_offset(column, padded // 128) + tl.program_id(1), scale)  # [128]


@jit
def quantize_blocks_kernel(
    w, values, scales, values_t, N, K, stride_w, POWER_OF_TWO: tl.constexpr,
    TRANSPOSED: tl.constexpr, EDGE: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """One block a program, in registers of the next power of two."""
    edge = tl.arange(0, SIDE)
    column = tl.program_id(0) * EDGE + edge
    row = tl.program_id(1) * EDGE + edge
    inside = ((row < N) & (edge < EDGE))[:, None] & ((column < K) & (edge < EDGE))[None, :]
    square = tl.load(w + row_offset(row, stride_w)[:, None] + column[None, :], mask=inside, other=0.0)  # [SIDE, SIDE]
    square = widened(square)
    bits = tl.max(tl.max(size_bits(square), 1), 0)
    scale, inverse = scale_and_inverse(bits, POWER_OF_TWO, False)
    rounded = to_e4m3(square * inverse)
    tl.store(values + row_offset(row, K)[:, None] + column[None, :], rounded, mask=inside)  # [SIDE, SIDE]
    tl.store(scales + row_offset(tl.program_id(1), tl.cdiv(K, EDGE)) + tl.program_id(0), scale)  # scalar
    if TRANSPOSED:
        target = row_offset(column, N)[:, None] + row[None, :]
        tl.store(values_t + target, tl.trans(rounded), mask=tl.trans(inside))  # [SIDE, SIDE]


@jit
def dequantize_kernel(
    values, scales, out, n_tiles, per_row, K,
    HEIGHT: tl.constexpr, EVEN: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """TILES tiles a program; HEIGHT rows of values share a row of scales. EVEN: no tile is cut short."""
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    row, along = tile // per_row, tile % per_row
    column = along[:, None] * 128 + tl.arange(0, 128)[None, :]
    if EVEN:
        place = row_offset(tile, 128)[:, None] + tl.arange(0, 128)[None, :]
        inside = (tile < n_tiles)[:, None]
    else:
        place = row_offset(row, K)[:, None] + column
        inside = (tile < n_tiles)[:, None] & (column < K)
    scale = tl.load(scales + row_offset(row // HEIGHT, per_row) + along, mask=tile < n_tiles, other=0.0)  # [TILES]
    result = tl.load(values + place, mask=inside, other=0.0).to(tl.float32) * scale[:, None]  # [TILES, 128]
    tl.store(out + place, rounded_to(result, out.dtype.element_ty), mask=inside)  # [TILES, 128]
