"""FP8 weights in a checkpoint: E4M3 values, and ``weight_scale_inv`` with a scale per 128 x 128 block.

Despite its name the scale is what one *multiplies* by. The released files hold it in FP32; quantisers of others
write BF16, FP16, or E8M0 (a bare power of two, as in the MX formats), each of which FP32 represents exactly.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import CheckpointError, KernelError
from ..kernels import dequantize
from .shards import Stored

SCALE_SUFFIX = "_scale_inv"
FP8_BLOCK = 128
E4M3 = torch.float8_e4m3fn


def is_fp8_matrix(name: str) -> bool:
    """The released files quantise attention, dense and expert matrices; not norms, gates, embedding or heads."""
    return name.endswith("_proj.weight") and "eh_proj" not in name or name.endswith("_with_mqa.weight")


def block_size(folder: Path) -> int:
    """Edge of the squares that share a scale, from ``config.json``.

    Raises:
        CheckpointError: the block is no square.
    """
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        block = (fields.get("quantization_config") or {}).get("weight_block_size", [FP8_BLOCK] * 2)
    except (OSError, ValueError, AttributeError):
        return FP8_BLOCK  # a model of the caller's own, beside which no config need lie
    edge = block[0] if isinstance(block, list) and block else None
    if not isinstance(edge, int) or edge < 1 or block != [edge, edge]:
        raise CheckpointError(
            f"{folder}: weight_block_size is {block!r}, expected a square, [128, 128] as released"
        )
    return edge


def read_weight(stored: Stored, name: str, block: int) -> Float[Tensor, "*shape"]:
    """One stored tensor; where it is FP8, times its scales, in FP32.

    Args:
        stored: the checkpoint's tensors. name: of a weight. block: edge of the squares that share a scale.

    Raises:
        CheckpointError: it cannot be read, or its scales are missing, of another shape or of no use.
    """
    tensor = stored.read(name)
    if tensor.dtype != torch.float8_e4m3fn:
        return tensor
    if name + SCALE_SUFFIX not in stored:
        raise CheckpointError(f"{stored.folder}: {name} is FP8 and its {name + SCALE_SUFFIX} is missing")
    scales = exact_scales(stored, name + SCALE_SUFFIX)
    try:
        return dequantize(tensor, scales, block)
    except KernelError as error:
        raise CheckpointError(
            f"{stored.folder}: {name} does not fit its {name + SCALE_SUFFIX} ({error}); expected a scale per block of "
            f"{block} x {block}, as weight_block_size in config.json says"
        ) from error


def read_fp8(
    stored: Stored, name: str, check_finite: bool
) -> tuple[Float[Tensor, "N K"], Float[Tensor, "rows cols"]] | None:
    """Values and scales as they lie in the file; ``None`` where the tensor is not FP8.

    Args:
        stored: the checkpoint's tensors. name: of a weight, in blocks of 128 x 128. check_finite: refuse NaN.

    Raises:
        CheckpointError: its scales are missing, of another shape, or no finite numbers above zero; it holds NaN.
    """
    values = stored.read(name)
    if values.dtype != E4M3:
        return None
    if name + SCALE_SUFFIX not in stored:
        raise CheckpointError(f"{stored.folder}: {name} is FP8 and its {name + SCALE_SUFFIX} is missing")
    scales = exact_scales(stored, name + SCALE_SUFFIX)
    expected = tuple(-(-n // FP8_BLOCK) for n in values.shape)
    if tuple(scales.shape) != expected:
        raise CheckpointError(
            f"{stored.folder}: {name + SCALE_SUFFIX} has shape {tuple(scales.shape)}, expected {expected}, a scale per "
            f"block of {FP8_BLOCK} x {FP8_BLOCK} of {name} {tuple(values.shape)}"
        )
    if check_finite and not bool(((scales > 0) & scales.isfinite()).all()):
        raise CheckpointError(
            f"{stored.folder}: {name + SCALE_SUFFIX} holds {float(scales.min())} to {float(scales.max())}, expected "
            "finite numbers above zero; the file is damaged"
        )
    if check_finite and bool((values.view(torch.uint8) & 0x7F).eq(0x7F).any()):
        raise CheckpointError(f"{stored.folder}: {name} holds NaN; the training run or the file is damaged")
    return values, scales


def exact_scales(stored: Stored, name: str) -> Float[Tensor, "*blocks"]:
    """Scales in FP32, without any rounding.

    Args:
        stored: the checkpoint's tensors. name: of the scales; FP32, BF16, FP16, E8M0, or FP64 that FP32 can hold.

    Raises:
        CheckpointError: they are of another type, or FP32 would round them.
    """
    scales = stored.read(name)
    exact = scales.float() if scales.is_floating_point() else None
    if exact is not None and scales.dtype == torch.float64 and not torch.equal(exact.double(), scales):
        exact = None
    if exact is None or scales.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        raise CheckpointError(
            f"{stored.folder}: {name} holds {scales.dtype}, expected scales in FP32, BF16, FP16 or E8M0 (or FP64 that "
            "FP32 can hold); quantise the checkpoint again with one of these"
        )
    return exact
