"""FP8 matrix product with a scale per tile: C = A Bᵀ, promoted to FP32 after every 128 elements of K.

At M = 4096 tokens, N = 24576, K = 7168, the size that others publish, 1.44 TFLOP meet 0.41 GB: 3500 a byte,
far over the few hundred at which a GPU's two limits meet. The tensor cores are the limit, and three things stand
in their way:

* **Promotion.** Hopper's FP8 tensor cores keep about 14 bits while they accumulate (paper §3.3.2), and a scale is
  right for one slice of 128 elements anyway. So each slice is a product of its own, which ordinary cores then scale
  and add in FP32: ``acc += (a b) · scale``, one fused multiply-add per element and slice. Written with two factors
  per element it would be three operations; here both scales are multiplied once a row.
* **Shared memory and L2.** Large tiles ask for fewer bytes: two halves of 128 rows share B (``fp8_slices.py``).
* **Waiting.** While one warpgroup promotes, another can multiply, as far as barriers let the two drift apart: in one
  block of 8 warps they meet at each half, two blocks of 4 warps on a multiprocessor (small K) never do.

With few rows the weights' bytes are the limit, and another kernel takes over (``gemm_few_rows.py``).

Scales are what stored values are *multiplied* by. 128 x 128 blocks on both sides are no recipe: an activation's
outlier would set the scale of 128 rows, and the paper saw that diverge for gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ...errors import KernelError
from ...numerics import TILE
from ..toolchain import tuning
from ..toolchain.checks import ALIGNMENT, require_aligned, require_dtype, require_shape
from ..toolchain.language import jit, row_offset, tl, to_bf16, triton
from ..toolchain.targets import on_device, on_triton, processors, require_fp8
from .fp8_slices import describe, place, sum_of_slices, sum_of_tiled_slices
from .gemm_few_rows import launch_few_rows

E4M3 = torch.float8_e4m3fn
OUTPUTS = (torch.bfloat16, torch.float32)

Quantised = tuple[Tensor, Tensor]  # values and the scales that they are multiplied by


def gemm_fp8(
    a: Float[Tensor, "M K"],
    a_scales: Float[Tensor, "M slices"],
    b: Float[Tensor, "N K"],
    b_scales: Float[Tensor, "rows slices"],
    out_dtype: torch.dtype = torch.bfloat16,
    accumulate_into: Float[Tensor, "M N"] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Float[Tensor, "M N"]:
    """C[m, n] = Σ_s a_scales[m, s] · b_scales[n, s] · Σ_{k in slice s} a[m, k] b[n, k] (paper Figure 7).

    NaN and infinity in values or scales reach every product that they belong to, as in the reference.

    Args:
        a: E4M3 [M, K], 1 x 128 tiles; any M.
        a_scales: FP32 [M, ceil(K/128)], of any strides: the transposed layout ([K/128, M].t()) is read with the fewest
            transactions.
        b: E4M3 [N, K]; any N, as V3's 576 rows of ``kv_a_proj_with_mqa`` ask, and any K whose rows lie on 16-byte
            borders: the last tile of either is cut short.
        b_scales: FP32, a scale per 128 x 128 block [ceil(N/128), ceil(K/128)], or per 1 x 128 tile [N, ceil(K/128)].
        out_dtype: BF16 or FP32.
        accumulate_into: FP32 [M, N] that the product is added to and that is returned.
        settings: block sizes and the like; the device's own when None.

    Raises:
        KernelError: a dtype, shape, stride or alignment that the kernel cannot take, or a GPU without E4M3.
    """
    _check(a, a_scales, b, b_scales, out_dtype, accumulate_into)
    m, n, k = a.shape[0], b.shape[0], a.shape[1]
    if not on_triton(a, a_scales, b, b_scales, accumulate_into):
        product = gemm_fp8_ref(a, a_scales, b, b_scales, out_dtype)
        return product if accumulate_into is None else accumulate_into.add_(product)
    require_fp8("gemm_fp8", a.device)
    if accumulate_into is not None:
        out_dtype = torch.float32
    if m == 0 or n == 0 or k == 0:
        return a.new_zeros(m, n, dtype=out_dtype) if accumulate_into is None else accumulate_into
    tiled = b_scales.shape[0] == n
    if settings is None:
        sizes = {"M": m, "N": n, "K": k, "OUT": out_dtype.itemsize, "TILED": int(tiled)}
        settings = tuning.pick("gemm_fp8", a.device, **sizes)
    width = n if settings["FEW_ROWS"] else _padded(n, out_dtype)
    c = a.new_empty(m, width, dtype=out_dtype)[:, :n]
    if accumulate_into is not None and c.stride(0) == n:
        c = accumulate_into
    if tiled and n % TILE:  # the last tile of columns reads scales past the last row
        b_scales = F.pad(b_scales, (0, 0, 0, -n % TILE))
    launch = launch_few_rows if settings["FEW_ROWS"] else _launch
    if TILE % settings["BLOCK_N"]:
        raise KernelError(f"gemm_fp8: BLOCK_N is {settings['BLOCK_N']}, expected a divisor of {TILE}")
    if tiled and settings["HALVES"] != 1:
        raise KernelError(f"gemm_fp8: HALVES is {settings['HALVES']}, expected 1 for tiles on both sides")
    with on_device(a):
        launch(a, a_scales, b, b_scales, c, tiled, c is accumulate_into, dict(settings))
    return c if accumulate_into is None or c is accumulate_into else accumulate_into.add_(c)


def gemm_fp8_ref(
    a: Float[Tensor, "M K"],
    a_scales: Float[Tensor, "M slices"],
    b: Float[Tensor, "N K"],
    b_scales: Float[Tensor, "rows slices"],
    out_dtype: torch.dtype = torch.bfloat16,
    sums: torch.dtype = torch.float32,
) -> Float[Tensor, "M N"]:
    """The plain form: one product a slice of 128, scaled and added in the order of K.

    Args:
        sums: what products and sums are taken in, FP32 as in the kernel; FP64 shows the rounding of that.
    """
    total = a.new_zeros(a.shape[0], b.shape[0], dtype=sums)
    per_row = b_scales
    if b_scales.shape[0] != b.shape[0]:
        per_row = b_scales.repeat_interleave(TILE, 0)[: b.shape[0]]
    for s in range(a_scales.shape[1]):
        k = slice(s * TILE, (s + 1) * TILE)
        product = a[:, k].to(sums) @ b[:, k].to(sums).t()
        total += product * (a_scales[:, s, None].to(sums) * per_row[None, :, s].to(sums))
    return total.to(out_dtype)


def fprop(
    x: Quantised, weight: Quantised, out_dtype: torch.dtype = torch.bfloat16
) -> Float[Tensor, "tokens out"]:
    """Y = X Wᵀ, the forward product.

    Args:
        x: E4M3 [tokens, in] with 1 x 128 tiles along ``in``.
        weight: E4M3 [out, in] with 128 x 128 blocks.
    """
    return gemm_fp8(*x, *weight, out_dtype)


def dgrad(
    dy: Quantised, weight_t: Quantised, out_dtype: torch.dtype = torch.bfloat16
) -> Float[Tensor, "tokens in"]:
    """dX = dY W, the backward product for the input; its K is the layer's width of output.

    Args:
        dy: E4M3 [tokens, out] with 1 x 128 tiles along ``out``.
        weight_t: E4M3 [in, out] with 128 x 128 blocks. FP8 tensor cores read both operands along K, so the weight
            must lie transposed in memory. Blocks are square: the transposed values with transposed scales are
            exact, nothing is quantised anew.
    """
    return gemm_fp8(*dy, *weight_t, out_dtype)


def wgrad(
    dy_t: Quantised, x_t: Quantised, accumulate_into: Float[Tensor, "out in"] | None = None
) -> Float[Tensor, "out in"]:
    """dW = dYᵀ X in FP32, the backward product for the weight; its K is the number of tokens.

    Args:
        dy_t: E4M3 [out, tokens] and x_t: E4M3 [in, tokens], both with 1 x 128 tiles along *tokens*. The tiles of
            the forward pass lie along the other dimension, so these are quantised again from the high-precision
            values (the paper turns 1 x 128 into 128 x 1 tiles); tokens are padded with zeros to a multiple of 128.
        accumulate_into: the FP32 gradient that this micro-batch is added to.
    """
    return gemm_fp8(*dy_t, *x_t, torch.float32, accumulate_into)


@jit
def gemm_fp8_kernel(
    a, b, c, a_scales, b_scales, M, N, K, stride_am, stride_ak, stride_bn, stride_bk, programs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HALVES: tl.constexpr, GROUP: tl.constexpr,
    TILED: tl.constexpr, ADD: tl.constexpr, num_stages: tl.constexpr,
):  # fmt: skip
    """Tiles of HALVES · BLOCK_M rows and BLOCK_N columns, ``programs`` of them at a time."""
    tiles_m = tl.cdiv(M, BLOCK_M * HALVES)
    tiles_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, programs):
        tile_m, tile_n = place(tile, tiles_m, tiles_n, GROUP)
        row, col = tile_m * (BLOCK_M * HALVES), tile_n * BLOCK_N
        rows = row + tl.arange(0, BLOCK_M)
        scale = a_scales + row_offset(rows, stride_am)
        if TILED:
            b_scale = b_scales + row_offset(col + tl.arange(0, BLOCK_N), stride_bn)
            first = sum_of_tiled_slices(
                a, b, row, col, scale, rows < M, b_scale, stride_ak, stride_bk, 0, tl.cdiv(K, 128),
                BLOCK_M, BLOCK_N, num_stages,
            )  # fmt: skip
        else:
            b_scale = b_scales + row_offset(col // 128, stride_bn)
            next_half = row_offset(tl.full((), BLOCK_M, tl.int32), stride_am)
            first, second = sum_of_slices(
                a, b, row, col, scale, rows < M, b_scale, stride_ak, stride_bk, next_half, rows + BLOCK_M < M,
                tl.cdiv(K, 128), BLOCK_M, BLOCK_N, HALVES,
            )  # fmt: skip
        if ADD:
            first += c.load([row, col])
        c.store([row, col], first if c.dtype == tl.float32 else to_bf16(first))
        if HALVES == 2:
            if ADD:
                second += c.load([row + BLOCK_M, col])
            c.store([row + BLOCK_M, col], second if c.dtype == tl.float32 else to_bf16(second))


def _check(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, out_dtype: torch.dtype, into: Tensor | None
) -> None:
    name = "gemm_fp8"
    require_shape(name, "a", a, (None, None))
    m, k = a.shape
    require_shape(name, "b", b, (None, k))
    n = b.shape[0]
    for label, values in (("a", a), ("b", b)):
        require_dtype(name, label, values, (E4M3,))
        if values.numel():
            require_aligned(name, label, values)
    rows, slices = -(-n // TILE), -(-k // TILE)
    for label, scales in (("a_scales", a_scales), ("b_scales", b_scales)):
        require_dtype(name, label, scales, (torch.float32,))
    require_shape(name, "a_scales (1 x 128 tiles)", a_scales, (m, slices))
    if b_scales.shape not in ((n, slices), (rows, slices)):
        raise KernelError(
            f"{name}: b_scales has shape {list(b_scales.shape)}, expected [{rows}, {slices}] for 128 x 128 "
            f"blocks or [{n}, {slices}] for 1 x 128 tiles"
        )
    if out_dtype not in OUTPUTS:
        raise KernelError(f"{name}: out_dtype is {out_dtype}, expected torch.bfloat16 or torch.float32")
    if into is not None:
        require_dtype(name, "accumulate_into", into, (torch.float32,))
        require_shape(name, "accumulate_into", into, (m, n))
        if not into.is_contiguous():
            raise KernelError(
                f"{name}: accumulate_into has strides {into.stride()}, expected contiguous rows"
            )


def _padded(n: int, dtype: torch.dtype) -> int:
    """Columns of a result whose rows begin on 16-byte borders, as the copy engine writes them."""
    return n + -n % (ALIGNMENT // dtype.itemsize)


def _launch(a, a_scales, b, b_scales, c, tiled: bool, add: bool, settings: dict[str, Any]) -> None:
    per_processor = settings.pop("PER_PROCESSOR")
    settings.pop("FEW_ROWS")
    rows, cols = settings["BLOCK_M"], settings["BLOCK_N"]
    tiles = triton.cdiv(a.shape[0], rows * settings["HALVES"]) * triton.cdiv(b.shape[0], cols)
    programs = min(processors(a.device) * per_processor, tiles)
    gemm_fp8_kernel[(programs,)](
        describe(a, rows, TILE), describe(b, cols, TILE), describe(c, rows, cols), a_scales, b_scales,
        a.shape[0], b.shape[0], a.shape[1], *a_scales.stride(), *b_scales.stride(), programs,
        TILED=tiled, ADD=add, **settings,
    )  # fmt: skip
