"""The FP8 form of a cached latent: 656 bytes a token at V3's sizes, where BF16 takes 1152.

A token's latent has two parts with different needs. The 512 normalised values are E4M3 with one FP32 scale per
128 of them; the 64 values of the turned key stay BF16, since scores at long range are sensitive to its angle::

    | 512 x E4M3 | 4 x FP32 scale | 64 x BF16 |        C + 4 C/128 + 2 R bytes

The three parts lie in one row, so that a page is one block of memory and a token one run of bytes. Two numbers:
per token 1152 bytes read and 656 written, some 2000 operations; 1.1 operations a byte, bound by memory by a
factor of two hundred. So a program takes a few whole rows, reads them once in 16-byte pieces, and keeps nothing.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from ...errors import KernelError
from ...numerics import E4M3_MAX, TILE
from ..quantize.reference import scale_and_inverse_ref
from ..quantize.rounding import scale_and_inverse, size_bits
from ..toolchain import tuning
from ..toolchain.checks import require_dtype, require_multiple, require_rows, require_shape
from ..toolchain.language import jit, row_offset, tl, to_bf16, to_e4m3, triton
from ..toolchain.targets import on_device, on_triton, require_fp8

SCALE_BYTES = 4
ROPE_BYTES = 2
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@cache
def stored_bytes(rank: int, rope: int) -> int:
    """Bytes a token of the FP8 cache takes: C + 4·ceil(C/128) + 2·R.

    Args:
        rank: C, values of the latent; a multiple of 4. A small model's last tile is shorter than 128.
        rope: R, values of the turned key; even.

    Raises:
        KernelError: scales or the rotary part would begin or end off a 4-byte border.
    """
    require_multiple("latent format", "the latent's rank", rank, SCALE_BYTES)
    require_multiple("latent format", "the rotary width", rope, 2)
    return rank + SCALE_BYTES * tiles_of(rank) + ROPE_BYTES * rope


def tiles_of(rank: int) -> int:
    """Scales of a latent: one for each 128 values begun."""
    return -(-rank // TILE)


def split_stored(
    stored: UInt8[Tensor, "*rows width"], rank: int
) -> tuple[Tensor, Float[Tensor, "*rows tiles"], Float[Tensor, "*rows rope"]]:
    """The three parts of stored rows as typed views of the same memory: E4M3, FP32 scales, BF16.

    Raises:
        KernelError: the rows are too short for such a latent.
    """
    head = rank + SCALE_BYTES * tiles_of(rank)
    if rank % SCALE_BYTES or stored.shape[-1] < head or (stored.shape[-1] - head) % ROPE_BYTES:
        raise KernelError(
            f"latent format: rows of {stored.shape[-1]} bytes cannot hold {rank} FP8 values in tiles of {TILE}, "
            f"their scales and a BF16 key: expected {head} + 2·R bytes"
        )
    return (
        stored[..., :rank].view(torch.float8_e4m3fn),
        stored[..., rank:head].view(torch.float32),
        stored[..., head:].view(torch.bfloat16),
    )


def quantize_latent_ref(
    latents: Float[Tensor, "*rows latent"], rank: int, power_of_two: bool = False
) -> UInt8[Tensor, "*rows width"]:
    """The plain form of :func:`quantize_latent`."""
    width = stored_bytes(rank, latents.shape[-1] - rank)
    stored = torch.empty(*latents.shape[:-1], width, dtype=torch.uint8, device=latents.device)
    values, scales, rope = split_stored(stored, rank)
    tiles = F.pad(latents[..., :rank].float(), (0, -rank % TILE)).unflatten(-1, (-1, TILE))
    amax = tiles.abs().amax(-1)
    if power_of_two:
        scale, _ = scale_and_inverse_ref(amax, True, "e4m3")
    else:
        scale = torch.where(amax == 0, torch.ones_like(amax), amax / E4M3_MAX)
    scales.copy_(scale)
    values.copy_((tiles / scale[..., None]).clamp(-E4M3_MAX, E4M3_MAX).flatten(-2)[..., :rank])
    rope.copy_(latents[..., rank:])
    return stored


def dequantize_latent_ref(
    stored: UInt8[Tensor, "*rows width"], rank: int, dtype: torch.dtype = torch.bfloat16
) -> Float[Tensor, "*rows latent"]:
    """The plain form of :func:`dequantize_latent`."""
    values, scales, rope = split_stored(stored, rank)
    latent = values.float() * scales.repeat_interleave(TILE, -1)[..., :rank]
    return torch.cat([latent.to(dtype), rope.to(dtype)], -1)


def quantize_latent(
    latents: Float[Tensor, "*rows latent"], rank: int = 512, power_of_two: bool = False
) -> UInt8[Tensor, "*rows width"]:
    """Cached latents in FP8: scale = amax/448 per 128 values, value = round(x / scale), the turned key in BF16.

    Args:
        latents: [..., C + R], the normalised latent beside the turned key; FP32, BF16 or FP16.
        rank: C, a multiple of 4; what follows it is the key.
        power_of_two: round scales up to powers of two, which a public decoding kernel asks for: it reads them as
        E8M0.

    Returns:
        [..., C + 4·ceil(C/128) + 2·R] bytes. A tile of zeros gets the scale 1; NaN and infinity make their tile NaN.

    Raises:
        KernelError: dtype or widths do not fit, or the GPU has no E4M3.
    """
    require_dtype("quantize_latent", "latents", latents, FLOATS)
    width = stored_bytes(rank, latents.shape[-1] - rank)
    if latents.shape[-1] <= rank:
        raise KernelError(
            f"quantize_latent: rows of {latents.shape[-1]} values hold no key behind a latent of {rank}"
        )
    if not on_triton(latents):
        return quantize_latent_ref(latents, rank, power_of_two)
    require_fp8("quantize_latent", latents.device)
    rows = latents.reshape(-1, latents.shape[-1])
    require_rows("quantize_latent", "latents", rows)
    stored = torch.empty(*latents.shape[:-1], width, dtype=torch.uint8, device=latents.device)
    values, scales, rope = split_stored(stored.view(-1, width), rank)
    if len(rows):
        settings = tuning.pick("quantize_latent", latents.device)
        sizes = _sizes(rank, rope.shape[-1])
        grid = (triton.cdiv(len(rows), settings["BLOCK_M"]),)
        with on_device(latents):
            quantize_latent_kernel[grid](
                rows,
                values,
                scales,
                rope,
                len(rows),
                rows.stride(0),
                POWER_OF_TWO=power_of_two,
                **sizes,
                **settings,
            )
    return stored


def dequantize_latent(
    stored: UInt8[Tensor, "*rows width"], rank: int = 512, dtype: torch.dtype = torch.bfloat16
) -> Float[Tensor, "*rows latent"]:
    """The inverse: [..., C + R] out of stored bytes, value · scale.

    Args:
        stored: what :func:`quantize_latent` made.
        rank: C.
        dtype: of the result; FP32, BF16 or FP16.

    Raises:
        KernelError: dtype or widths do not fit, or the GPU has no E4M3.
    """
    require_dtype("dequantize_latent", "stored", stored, (torch.uint8,))
    if dtype not in FLOATS:
        raise KernelError(f"dequantize_latent: dtype is {dtype}, expected float32, bfloat16 or float16")
    if not on_triton(stored):
        return dequantize_latent_ref(stored, rank, dtype)
    require_fp8("dequantize_latent", stored.device)
    rows = stored.reshape(-1, stored.shape[-1]).contiguous()
    values, scales, rope = split_stored(rows, rank)
    out = torch.empty(*stored.shape[:-1], rank + rope.shape[-1], dtype=dtype, device=stored.device)
    require_shape("dequantize_latent", "stored", rows, (None, stored_bytes(rank, rope.shape[-1])))
    if len(rows):
        settings = tuning.pick("dequantize_latent", stored.device)
        grid = (triton.cdiv(len(rows), settings["BLOCK_M"]),)
        with on_device(stored):
            dequantize_latent_kernel[grid](
                values, scales, rope, out, len(rows), **_sizes(rank, rope.shape[-1]), **settings
            )
    return out


def _sizes(rank: int, rope: int) -> dict[str, int]:
    """Constants of both kernels: widths, and the powers of two that cover them."""
    return {
        "C": rank,
        "R": rope,
        "BLOCK_T": triton.next_power_of_2(tiles_of(rank)),
        "BLOCK_R": triton.next_power_of_2(rope),
    }


@jit
def latent_columns(BLOCK_T: tl.constexpr):
    """Column numbers as [1, tiles, 128]: each tile is a row of its own, so that its maximum is a reduction."""
    return (tl.arange(0, BLOCK_T)[:, None] * 128 + tl.arange(0, 128)[None, :])[None, :, :]


@jit
def quantize_latent_kernel(
    x_ptr, values_ptr, scales_ptr, rope_ptr, n_rows, stride_x,
    POWER_OF_TWO: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows a program; bytes of a row are a constant, which keeps 16-byte accesses provable."""
    TILES: tl.constexpr = (C + 127) // 128
    BYTES: tl.constexpr = C + 4 * TILES + 2 * R
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_range = rows < n_rows
    source = x_ptr + row_offset(rows, stride_x)
    tiles = tl.arange(0, BLOCK_T)[None, :]
    columns = latent_columns(BLOCK_T)
    keep = in_range[:, None, None] & (columns < C)
    x = tl.load(source[:, None, None] + columns, mask=keep, other=0.0).to(
        tl.float32
    )  # [BLOCK_M, BLOCK_T, 128]
    if POWER_OF_TWO:
        scale, _ = scale_and_inverse(tl.max(size_bits(x), 2), True, False)
    else:
        # The maximum of a GPU drops NaN unless told; a tile with NaN must not look sound.
        amax = tl.reduce(tl.abs(x), 2, _larger_or_nan)
        scale = tl.where(amax == 0.0, 1.0, tl.div_rn(amax, tl.full(amax.shape, 448.0, tl.float32)))
    quotient = tl.div_rn(x, tl.broadcast_to(scale[:, :, None], x.shape))
    at = row_offset(rows, BYTES)[:, None, None] + columns
    tl.store(values_ptr + at, to_e4m3(quotient), mask=keep)  # [BLOCK_M, BLOCK_T, 128]
    at = row_offset(rows, BYTES // 4)[:, None] + tiles
    tl.store(scales_ptr + at, scale, mask=in_range[:, None] & (tiles < TILES))  # [BLOCK_M, BLOCK_T]
    rope = tl.arange(0, BLOCK_R)[None, :]
    keep = in_range[:, None] & (rope < R)
    key = tl.load(source[:, None] + C + rope, mask=keep, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_R]
    tl.store(
        rope_ptr + row_offset(rows, BYTES // 2)[:, None] + rope, to_bf16(key), mask=keep
    )  # [BLOCK_M, BLOCK_R]


@jit
def _larger_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@jit
def dequantize_latent_kernel(
    values_ptr, scales_ptr, rope_ptr, out_ptr, n_rows,
    C: tl.constexpr, R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The same rows back: value times the scale of its tile."""
    TILES: tl.constexpr = (C + 127) // 128
    BYTES: tl.constexpr = C + 4 * TILES + 2 * R
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_range = rows < n_rows
    tiles = tl.arange(0, BLOCK_T)[None, :]
    columns = latent_columns(BLOCK_T)
    keep = in_range[:, None, None] & (columns < C)
    # [BLOCK_M, BLOCK_T, 128]
    x = tl.load(values_ptr + row_offset(rows, BYTES)[:, None, None] + columns, mask=keep, other=0.0)
    at = row_offset(rows, BYTES // 4)[:, None] + tiles
    scale = tl.load(
        scales_ptr + at, mask=in_range[:, None] & (tiles < TILES), other=0.0
    )  # [BLOCK_M, BLOCK_T]
    target = out_ptr + row_offset(rows, C + R)
    value = x.to(tl.float32) * scale[:, :, None]
    # [BLOCK_M, BLOCK_T, 128]
    tl.store(target[:, None, None] + columns, _rounded(value, out_ptr.dtype.element_ty), mask=keep)
    rope = tl.arange(0, BLOCK_R)[None, :]
    keep = in_range[:, None] & (rope < R)
    key = tl.load(
        rope_ptr + row_offset(rows, BYTES // 2)[:, None] + rope, mask=keep, other=0.0
    )  # [BLOCK_M, BLOCK_R]
    key = _rounded(key.to(tl.float32), out_ptr.dtype.element_ty)
    tl.store(target[:, None] + C + rope, key, mask=keep)  # [BLOCK_M, BLOCK_R]


@jit
def _rounded(x, T: tl.constexpr):
    """FP32 to a dtype, to nearest even in the interpreter too."""
    if T == tl.bfloat16:
        return to_bf16(x)
    return x.to(T)
