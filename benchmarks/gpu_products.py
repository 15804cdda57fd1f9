"""Cases of the GPU benchmark: FP8 quantisers, matrix products and grouped products."""

from __future__ import annotations

from functools import partial

import gpu_peers as peers
import torch
import torch.nn.functional as F
from gpu_work import (
    BF16_DIFFERENCE,
    FP8_MEAN_RELATIVE,
    TILE,
    Call,
    Work,
    mean_relative,
    noise,
    unequal,
    uneven,
)  # fmt: skip

from dsv3lib import kernels as k


def quantize(device: torch.device, M: int, K: int) -> Work:
    """1 x 128 tiles of an activation."""
    x = noise(device, M, K)
    return Work(
        lambda: k.quantize_tiles(x),
        lambda: unequal(k.quantize_tiles(x), k.quantize_tiles_ref(x)),
        0.0,  # bit for bit
        0.0,
        M * K * (2 + 1) + 4 * M * K // TILE,
        peers={"torch": lambda: lambda: k.quantize_tiles_ref(x)},
        goals={"of copy": 0.85},
    )


def quantize_both(device: torch.device, M: int, K: int) -> Work:
    """Tiles along rows and along columns, transposed, out of one pass."""
    x = noise(device, M, K)
    return Work(
        lambda: k.quantize_tiles_both(x),
        lambda: unequal(k.quantize_tiles_both(x), k.quantize_tiles_both_ref(x)),
        0.0,
        0.0,
        M * K * (2 + 2) + 8 * M * K // TILE,
        peers={"two passes": lambda: lambda: (k.quantize_tiles(x), k.quantize_tiles(x.t().contiguous()))},
        goals={"of copy": 0.85},
    )


def fused(device: torch.device, M: int, D: int, norm: int) -> Work:
    """RMSNorm or SwiGLU with quantisation as its last step: the result is never written in BF16."""
    x = noise(device, M, D if norm else 2 * D)
    w = noise(device, D)
    ours = (lambda: k.rms_norm_quantize(x, w, 1e-6)) if norm else (lambda: k.swiglu_quantize(x))
    plain = (lambda: k.rms_norm_quantize_ref(x, w, 1e-6)) if norm else (lambda: k.swiglu_quantize_ref(x))
    apart = (
        (lambda: k.quantize_tiles(k.rms_norm(x, w, 1e-6)))
        if norm
        else (lambda: k.quantize_tiles(k.swiglu(x)))
    )

    def error() -> float:
        found, expected = ours(), plain()
        return peers.difference(k.dequantize(*found[:2]), k.dequantize_ref(*expected[:2]))

    return Work(
        ours,
        error,
        BF16_DIFFERENCE,
        0.0,
        x.nbytes + M * D + 4 * M * D // TILE,
        peers={"two kernels": lambda: apart},
        goals={"of copy": 0.85},
    )


def gemm(device: torch.device, M: int, N: int, K: int) -> Work:
    """y = x Wᵀ in FP8 with 1x128 and 128x128 scales."""
    x, w = noise(device, M, K), noise(device, N, K)
    (a, a_s), (b, b_s) = k.quantize_tiles(x), k.quantize_blocks(w)
    expected = k.gemm_fp8_ref(a, a_s, b, b_s)
    found = {
        name: partial(peer, a, a_s, b, b_s, expected)
        for name, peer in {
            "scaled_mm": peers.torch_scaled_mm, "DeepGEMM": peers.deep_gemm, "torchao": peers.torchao_gemm
        }.items()
    }  # fmt: skip
    few = M <= 128
    large = (M, N, K) == (4096, 24576, 7168)
    return Work(
        lambda: k.gemm_fp8(a, a_s, b, b_s),
        lambda: mean_relative(k.gemm_fp8(a, a_s, b, b_s), expected),
        FP8_MEAN_RELATIVE,
        2.0 * M * N * K,
        M * K + N * K + 2 * M * N + 4 * a_s.numel() + 4 * b_s.numel(),
        "fp8",
        {"bf16 matmul": lambda: lambda: x @ w.t(), **found},
        lambda: k.gemm_fp8(*k.quantize_tiles(x), b, b_s),
        {"of copy": 0.8} if few else {"TFLOP/s": 900, "times bf16 matmul": 1.3} if large else {},
    )


def grouped(device: torch.device, G: int, M: int, N: int, K: int, fp8: int = 1) -> Work:
    """The experts' product: rows sorted by expert, loads as uneven as a router leaves them."""
    counts = uneven(device, G, G * M)
    rows = G * M
    x, w = noise(device, rows, K), noise(device, G, N, K)
    ends = counts.cumsum(0).to(torch.int32)
    expected = k.grouped_gemm_ref(x, w, counts)

    def torch_grouped() -> Call:
        return peers.first_that_agrees(
            [("grouped_mm", lambda: lambda: F.grouped_mm(x, w.transpose(1, 2), offs=ends))], expected
        )

    common = {"flops": 2.0 * rows * N * K, "peers": {"grouped_mm": torch_grouped}}
    if not fp8:
        return Work(
            lambda: k.grouped_gemm(x, w, counts),
            lambda: peers.difference(k.grouped_gemm(x, w, counts), expected),
            BF16_DIFFERENCE,
            moved=2.0 * (rows * K + G * N * K + rows * N),
            matrix="bf16",
            **common,
        )
    a, a_s = k.quantize_tiles(x)
    blocks = [k.quantize_blocks(one) for one in w]
    b, b_s = torch.stack([v for v, _ in blocks]), torch.stack([s for _, s in blocks])
    exact = k.grouped_gemm_fp8_ref(a, a_s, b, b_s, counts)
    return Work(
        lambda: k.grouped_gemm_fp8(a, a_s, b, b_s, counts),
        lambda: mean_relative(k.grouped_gemm_fp8(a, a_s, b, b_s, counts), exact),
        FP8_MEAN_RELATIVE,
        moved=float(rows * K + G * N * K + 2 * rows * N + 4 * a_s.numel()),
        matrix="fp8",
        with_quantisation=lambda: k.grouped_gemm_fp8(*k.quantize_tiles(x), b, b_s, counts),
        goals={"times grouped_mm": 1.5},
        **common,
    )
