"""The three products of a linear layer in FP8, of one matrix and of a stack of experts.

    Fprop   y  = x Wᵀ       sums over the layer's inputs
    Dgrad   dx = dy W       sums over its outputs
    Wgrad   dW = dyᵀ x      sums over the tokens; FP32

All are the block-scaled products of ``kernels/matmul``: on a GPU with FP8 units the Triton kernels, on a CPU the same
arithmetic in their references, slice by slice. Only here do operands of this package meet them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..kernels.matmul.gemm import gemm_fp8
from ..kernels.matmul.grouped_gemm_fp8 import (
    grouped_gemm_fp8,
    grouped_gemm_fp8_ref,
    grouped_wgrad_fp8,
    grouped_wgrad_fp8_ref,
)
from ..kernels.quantize.reference import TILE
from ..kernels.toolchain.targets import on_triton
from .operands import Groups, Operand, aligned

NAMES = ("fprop", "dgrad", "wgrad", "grouped_fprop", "grouped_dgrad", "grouped_wgrad")


def fprop(x: Operand, weight: Operand, dtype: torch.dtype) -> Float[Tensor, "M O"]:
    """y = x Wᵀ.

    Args:
        x: [M, I] in tiles. weight: [O, I] in blocks. dtype: of the result; sums are FP32 whatever it is.
    """
    return _multiply(x, weight, dtype)


def dgrad(grad: Operand, weight_t: Operand, dtype: torch.dtype) -> Float[Tensor, "M I"]:
    """dx = dy W.

    Args:
        grad: [M, O] in tiles along O. weight_t: [I, O] in blocks. dtype: of the result.
    """
    return _multiply(grad, weight_t, dtype)


def wgrad(grad_t: Operand, x_t: Operand, dtype: torch.dtype) -> Float[Tensor, "O I"]:
    """dW = dyᵀ x.

    Args:
        grad_t: [O, tokens] and x_t: [I, tokens], both in tiles along the tokens. dtype: of the result.
    """
    return _multiply(grad_t, x_t, torch.float32).to(dtype)


def grouped_fprop(x: Operand, weight: Operand, counts: Tensor, dtype: torch.dtype) -> Float[Tensor, "M O"]:
    """y = x Wᵀ of each expert's rows; a stack [E, O, I]."""
    return _multiply_grouped(x, weight, counts, dtype)


def grouped_dgrad(
    grad: Operand, weight_t: Operand, counts: Tensor, dtype: torch.dtype
) -> Float[Tensor, "M I"]:
    """dx = dy W of each expert's rows; a stack [E, I, O]."""
    return _multiply_grouped(grad, weight_t, counts, dtype)


def grouped_wgrad(
    grad_t: Operand, x_t: Operand, groups: Groups, dtype: torch.dtype
) -> Float[Tensor, "E O I"]:
    """dW = dyᵀ x of each expert, over its rows, which are filled up to whole tiles."""
    if not on_triton(x_t.values):
        return grouped_wgrad_fp8_ref(*grad_t, *x_t, groups.counts).to(dtype)
    shape = grad_t.values.shape[0], x_t.values.shape[0]
    grad_t, x_t = _whole_rows(grad_t), _whole_rows(x_t)
    made = grouped_wgrad_fp8(*grad_t, *x_t, groups.counts)
    return made[:, : shape[0], : shape[1]].to(dtype)


def _multiply_grouped(x: Operand, weight: Operand, counts: Tensor, dtype: torch.dtype) -> Tensor:
    if not on_triton(x.values):
        return grouped_gemm_fp8_ref(*x, *weight, counts, torch.float32).to(dtype)
    width = weight.values.shape[1]
    x, weight = _whole_tiles(x), _whole_tiles(weight, rows=True)
    out = dtype if dtype == torch.bfloat16 else torch.float32
    y = grouped_gemm_fp8(*x, weight.values, weight.scales.contiguous(), counts, out_dtype=out)
    return y[:, :width].to(dtype)


def _multiply(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    out = dtype if dtype == torch.bfloat16 else torch.float32
    return gemm_fp8(aligned(a.values), a.scales, aligned(b.values), b.scales, out).to(dtype)


def _whole_tiles(x: Operand, rows: bool = False) -> Operand:
    """Values filled up with zeros to whole tiles along K (and along the rows of each matrix of a stack)."""
    more = (0, -x.values.shape[-1] % TILE, 0, -x.values.shape[-2] % TILE if rows else 0)
    return Operand(F.pad(x.values.view(torch.uint8), more).contiguous().view(x.values.dtype), x.scales)


def _whole_rows(x: Operand) -> Operand:
    """Rows filled up with zeros to a multiple of 128, for the widths of a gradient."""
    more = (0, 0, 0, -x.values.shape[0] % TILE)
    return Operand(F.pad(x.values.view(torch.uint8), more).view(x.values.dtype), F.pad(x.scales, more))
