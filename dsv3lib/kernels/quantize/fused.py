"""Quantisation as the last step of the pass that makes the values: after SwiGLU, and after RMSNorm.

Both feed FP8 matrix products (paper §3.3.2, Figure 6), so what they make would be written in BF16, read again, and
written as E4M3. Fused, it never leaves the registers at two bytes.

The two numbers, for 65536 visits of experts of width 2048: 537 MB of gate and up read, 134 MB of E4M3 written,
671 MB in all; apart, SwiGLU and quantisation move 1208 MB. RMSNorm of 8192 tokens of width 7168: 117 MB read,
59 MB written, 176 MB instead of 411.

Values are rounded to the input's dtype before they are quantised, as if they had been written and read: what is
kept for the backward pass and what is quantised are the same numbers. These are the insides of an FP8 layer,
whose backward is that layer's own: they record no gradient themselves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..elementwise.gated import silu, swiglu_ref
from ..elementwise.norms import DTYPES, KERNEL_DTYPES, WIDEST, as_rows, rms_norm_ref
from ..toolchain import tuning
from ..toolchain.checks import require_dtype, require_multiple, require_shape
from ..toolchain.language import jit, row_offset, tl, to_e4m3, triton
from ..toolchain.targets import has_fp8, on_device, on_triton
from .reference import TILE, quantize_tiles_ref
from .rounding import rounded_to, scale_and_inverse, size_bits, widened

Settings = dict[str, int]


class Quantized(NamedTuple):
    """What a fused operation gives.

    Args:
        values: E4M3.
        scales: FP32, one per 128 values.
        kept: the values before quantisation, where asked for.
        inverse_rms: 1 / rms of each row in FP32, which the backward of RMSNorm needs; ``None`` after SwiGLU.
    """

    values: Tensor
    scales: Tensor
    kept: Tensor | None = None
    inverse_rms: Tensor | None = None


def swiglu_quantize(
    gate_up: Float[Tensor, "*M both"],
    power_of_two: bool = False,
    keep: bool = False,
    settings: Settings | None = None,
) -> Quantized:
    """quantize_tiles(silu(gate) ⊙ up) in one pass.

    Args:
        gate_up: [..., 2 I], the gate in the first half of a row; I divides by 128.
        power_of_two: round scales up to powers of two.
        keep: return the unquantised values too.

    Returns:
        values [..., I], scales [..., I/128], and ``kept`` in the dtype of gate_up.

    Raises:
        KernelError: a width that does not divide by 256, or a dtype that is not there.
    """
    require_dtype("swiglu_quantize", "gate_up", gate_up, DTYPES)
    require_multiple("swiglu_quantize", "the last dimension", gate_up.shape[-1], 2 * TILE)
    if not _on_kernel(gate_up):
        return swiglu_quantize_ref(gate_up, power_of_two, keep)
    width = gate_up.shape[-1] // 2
    values = gate_up.new_empty(*gate_up.shape[:-1], width, dtype=torch.float8_e4m3fn)
    scales = gate_up.new_empty(*gate_up.shape[:-1], width // TILE, dtype=torch.float32)
    kept = gate_up.new_empty(values.shape) if keep else None
    rows = as_rows(gate_up)
    row = settings or tuning.pick("swiglu_quantize", gate_up.device, tiles=scales.numel())
    with on_device(gate_up):
        swiglu_quantize_kernel[(triton.cdiv(scales.numel(), row["TILES"]),)](
            rows, values, scales, kept, scales.numel(), scales.shape[-1], rows.stride(0),
            POWER_OF_TWO=power_of_two, KEEP=keep, **row,
        )  # fmt: skip
    return Quantized(values, scales, kept)


def rms_norm_quantize(
    x: Float[Tensor, "*M N"],
    weight: Float[Tensor, " N"],
    eps: float,
    power_of_two: bool = False,
    keep: bool = False,
    settings: Settings | None = None,
) -> Quantized:
    """quantize_tiles(rms_norm(x, weight, eps)) in one pass.

    Args:
        x: [..., N], N divides by 128; rows wider than 16384 go to the reference.
        weight: w.
        eps: ε.
        power_of_two: round scales up to powers of two.
        keep: return the unquantised values too.

    Returns:
        values [..., N], scales [..., N/128], ``kept`` in the dtype of x, and ``inverse_rms`` [...].

    Raises:
        KernelError: a width that does not divide by 128, a weight that does not fit, a dtype that is not there.
    """
    require_dtype("rms_norm_quantize", "x", x, DTYPES)
    require_dtype("rms_norm_quantize", "weight", weight, DTYPES)
    require_multiple("rms_norm_quantize", "the last dimension", x.shape[-1], TILE)
    require_shape("rms_norm_quantize", "weight", weight, x.shape[-1:])
    if x.shape[-1] > WIDEST or weight.dtype not in KERNEL_DTYPES or not _on_kernel(x, weight):
        return rms_norm_quantize_ref(x, weight, eps, power_of_two, keep)
    rows = as_rows(x)
    m, n = rows.shape
    values = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    scales = x.new_empty(*x.shape[:-1], n // TILE, dtype=torch.float32)
    inverse_rms = x.new_empty(x.shape[:-1], dtype=torch.float32)
    kept = x.new_empty(x.shape) if keep else None
    row = settings or tuning.pick("rms_norm_quantize", x.device, N=n)
    with on_device(x):
        rms_norm_quantize_kernel[(triton.cdiv(m, row["ROWS"]),)](
            rows, weight.contiguous(), values, scales, kept, inverse_rms, m, n, rows.stride(0), eps,
            POWER_OF_TWO=power_of_two, KEEP=keep, TILES=triton.next_power_of_2(n // TILE), **row,
        )  # fmt: skip
    return Quantized(values, scales, kept, inverse_rms)


def swiglu_quantize_ref(
    gate_up: Float[Tensor, "*M both"], power_of_two: bool = False, keep: bool = False
) -> Quantized:
    """The two references one after the other."""
    hidden = swiglu_ref(gate_up)
    return Quantized(*quantize_tiles_ref(hidden, power_of_two), hidden if keep else None)


def rms_norm_quantize_ref(
    x: Float[Tensor, "*M N"],
    weight: Float[Tensor, " N"],
    eps: float,
    power_of_two: bool = False,
    keep: bool = False,
) -> Quantized:
    """The two references one after the other."""
    normed = rms_norm_ref(x, weight, eps)
    inverse_rms = torch.rsqrt(x.double().square().mean(-1) + eps).float()
    return Quantized(*quantize_tiles_ref(normed, power_of_two), normed if keep else None, inverse_rms)


def _on_kernel(x: Tensor, weight: Tensor | None = None) -> bool:
    if x.is_meta or not x.numel() or x.dtype not in KERNEL_DTYPES:
        return False
    return on_triton(x, weight) and has_fp8(x.device)


@jit
def swiglu_quantize_kernel(
    gate_up, values, scales, kept, n_tiles, per_row, stride_x,
    POWER_OF_TWO: tl.constexpr, KEEP: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """TILES tiles of the result a program, in the order in which they lie."""
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    inside = (tile < n_tiles)[:, None]
    column = tl.arange(0, 128)[None, :]
    source = gate_up + (row_offset(tile // per_row, stride_x) + (tile % per_row) * 128)[:, None] + column
    gate = widened(tl.load(source, mask=inside, other=0.0))  # [TILES, 128]
    up = widened(tl.load(source + per_row * 128, mask=inside, other=0.0))  # [TILES, 128]
    activated, _ = silu(gate)
    hidden = rounded_to(activated * up, gate_up.dtype.element_ty)
    target = row_offset(tile, 128)[:, None] + column
    if KEEP:
        tl.store(kept + target, hidden, mask=inside)  # [TILES, 128]
    hidden = widened(hidden)
    scale, inverse = scale_and_inverse(tl.max(size_bits(hidden), 1), POWER_OF_TWO, False)
    tl.store(values + target, to_e4m3(hidden * inverse[:, None]), mask=inside)  # [TILES, 128]
    tl.store(scales + tile, scale, mask=tile < n_tiles)  # [TILES]


@jit
def rms_norm_quantize_kernel(
    x, weight, values, scales, kept, inverse_rms, M, N, stride_x, eps,
    POWER_OF_TWO: tl.constexpr, KEEP: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows a program, each seen as TILES tiles of 128, the last of which may lie past its end."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = tl.arange(0, TILES)
    column = tile[None, :, None] * 128 + tl.arange(0, 128)[None, None, :]
    inside = (row < M)[:, None, None] & (column < N)
    # [ROWS, TILES, 128]
    x_rows = tl.load(x + row_offset(row, stride_x)[:, None, None] + column, mask=inside, other=0.0)
    x_rows = widened(x_rows)
    rms = tl.rsqrt(tl.sum(tl.sum(x_rows * x_rows, 2), 1) / N + eps)
    by = widened(tl.load(weight + column, mask=column < N, other=0.0))  # [1, TILES, 128]
    normed = rounded_to(x_rows * rms[:, None, None] * by, x.dtype.element_ty)
    target = row_offset(row, N)[:, None, None] + column
    if KEEP:
        tl.store(kept + target, normed, mask=inside)  # [ROWS, TILES, 128]
    normed = widened(normed)
    scale, inverse = scale_and_inverse(tl.max(size_bits(normed), 2), POWER_OF_TWO, False)
    tl.store(values + target, to_e4m3(normed * inverse[:, :, None]), mask=inside)  # [ROWS, TILES, 128]
    place = row_offset(row, N // 128)[:, None] + tile[None, :]
    tl.store(scales + place, scale, mask=(row < M)[:, None] & (tile < N // 128)[None, :])  # [ROWS, TILES]
    tl.store(inverse_rms + row, rms, mask=row < M)  # [ROWS]
