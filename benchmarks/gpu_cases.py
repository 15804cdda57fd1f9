"""What is measured on a GPU: each kernel at V3's shapes, with its reference, its peers, its bytes and operations.

A case is prepared when its turn comes and dropped after it, so that a card of 80 GB suffices. Data are random and
drawn afresh; the reference computes in FP32 from the same operands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gpu_peers as peers
import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3lib import kernels as k

Call = Callable[[], Any]
TILE = 128
PAGE = 64
FP8_MEAN_RELATIVE = 1e-3
BF16_DIFFERENCE = 1e-5
ATTENTION_DIFFERENCE = 5e-6
NORM_DIFFERENCE = 1e-5


@dataclass
class Work:
    """One case, ready to run.

    Args:
        ours: the call that is timed. error: the difference from the reference, in the measure that ``tolerance``
            bounds. flops, moved: operations, and the fewest bytes through the device's memory.
        matrix: which matrix rate bounds it, "bf16", "fp8" or "" for none.
        peers: calls that prepare a peer; each may raise :class:`gpu_peers.NotMeasured`.
        with_quantisation: the same with its operands quantised first.
        goals: what was set out to reach: "TFLOP/s", "of copy", or "times NAME" for a peer.
    """

    ours: Call
    error: Callable[[], float]
    tolerance: float
    flops: float
    moved: float
    matrix: str = ""
    peers: Mapping[str, Callable[[], Call]] = field(default_factory=dict)
    with_quantisation: Call | None = None
    goals: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A kernel at a shape; ``prepare(device, **shape)`` makes the operands."""

    operation: str
    shape: Mapping[str, int]
    prepare: Callable[..., Work]

    @property
    def name(self) -> str:
        """As tables call it."""
        return f"{self.operation} " + "×".join(f"{n}{v}" for n, v in self.shape.items())


def cases(small: bool = False) -> Iterator[Case]:
    """All cases; ``small`` is a rehearsal, for a machine without a GPU."""
    for operation, prepare, shapes, rehearsal in TABLE:
        for shape in [rehearsal] if small else shapes:
            yield Case(operation, shape, prepare)


# ---- FP8 -----------------------------------------------------------------------------------------------------


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
    apart = (lambda: k.quantize_tiles(k.rms_norm(x, w, 1e-6))) if norm else (lambda: k.quantize_tiles(k.swiglu(x)))

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


# ---- attention -----------------------------------------------------------------------------------------------


def decode(
    device: torch.device, B: int, S: int, H: int, q: int = 1, C: int = 512, R: int = 64, fp8: int = 0
) -> Work:
    """Absorbed decoding over a paged latent cache; pages no row uses hold NaN."""
    dtype = floating(device)
    pages = -(-S // PAGE)
    latents = noise(device, B * pages, PAGE, C + R)
    cache = torch.cat([latents, torch.full_like(latents[:1], float("nan"))])
    order = torch.randperm(B * pages, device=device).int().view(B, pages)
    lengths = torch.randint(max(q, S - S // 8), S + 1, (B,), device=device, dtype=torch.int32)
    lengths[0] = S
    queries = noise(device, B, q, H, C + R)
    scale = (C // 4 + R) ** -0.5
    held = k.quantize_latent(cache, C) if fp8 else cache
    arguments = (queries, held, order, lengths, scale, C)

    def error() -> float:
        out, lse = k.mla_decode(*arguments)
        expected, expected_lse = k.mla_decode_ref(*arguments)
        off = (lse - expected_lse).abs()
        allowed = torch.maximum(torch.full_like(off, 1e-6), expected_lse.abs() * 8 / 65536)
        if bool((off > allowed).any()):
            return float("inf")
        return peers.difference(out, expected)

    tokens = int(lengths.sum())
    found: dict[str, Callable[[], Call]] = {}
    if not fp8:
        expected = k.mla_decode_ref(*arguments)[0]
        whole = (queries, cache, order, lengths, C, scale, expected)
        found = {
            "scaled_dot_product_attention": lambda: sdpa_latents(
                queries, cache, order, lengths, C, scale, expected
            ),
            "FlashMLA": partial(peers.flash_mla, *whole),
            "FlashInfer": partial(peers.flash_infer, *whole),
        }
    goals = {} if fp8 or q > 1 else {128: {"TFLOP/s": 450}, 16: {"of copy": 0.85}}.get(H, {})
    return Work(
        lambda: k.mla_decode(*arguments),
        error,
        ATTENTION_DIFFERENCE,
        2.0 * tokens * q * H * (2 * C + R),
        tokens * held.shape[-1] * held.element_size() + queries.nbytes + B * q * H * C * dtype.itemsize,
        "bf16",
        found,
        goals=goals,
    )


def sdpa_latents(
    q: Tensor, cache: Tensor, table: Tensor, lengths: Tensor, width: int, scale: float, expected: Tensor
) -> Call:
    """PyTorch's attention over latents that were gathered beforehand, which is more than it would get in practice."""
    kv = cache[table.long()].flatten(1, 2)[:, None]
    seen = torch.arange(kv.shape[2], device=q.device) < lengths[:, None]
    kv = torch.where(seen[:, None, :, None], kv, 0)
    mask = seen[:, None, None]

    def run() -> Tensor:
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), kv, kv[..., :width], attn_mask=mask, scale=scale, enable_gqa=True
        )
        return out.transpose(1, 2)

    return peers.first_that_agrees([("sdpa", lambda: run)], expected)


def prefill(
    device: torch.device, B: int, T: int, H: int, N: int = 128, R: int = 64, V: int = 128, back: int = 0
) -> Work:
    """Causal attention of packed documents, keys of N + R and values of V dimensions, forward or with backward."""
    starts = torch.arange(B + 1, device=device, dtype=torch.int32) * T
    q, key = (noise(device, B * T, H, N + R).requires_grad_(bool(back)) for _ in range(2))
    v = noise(device, B * T, H, V).requires_grad_(bool(back))
    grad = noise(device, B * T, H, V)
    scale = (N + R) ** -0.5

    def through(attend: Callable[..., Tensor], leaves: list[Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
        """The output, or with ``back`` the three gradients."""
        out = attend(*leaves)
        return torch.autograd.grad(out, leaves, upstream) if back else (out,)

    def ours() -> tuple[Tensor, ...]:
        return through(lambda a, b, c: k.mla_prefill(a, b, c, starts, scale)[0], [q, key, v], grad)

    def torchs(documents: int, dtype: torch.dtype) -> Callable[[], tuple[Tensor, ...]]:
        """The same through PyTorch, with operands laid out as it likes them beforehand."""
        leaves = [as_heads(t.detach())[:documents].to(dtype).requires_grad_(bool(back)) for t in (q, key, v)]
        attend = partial(F.scaled_dot_product_attention, is_causal=True, scale=scale)
        return lambda: through(attend, leaves, as_heads(grad)[:documents].to(dtype))

    def as_heads(t: Tensor) -> Tensor:
        return t.view(B, T, H, -1).transpose(1, 2)

    def error() -> float:
        """The largest of the differences, on the first document, in FP32."""
        exact = [t.transpose(1, 2).flatten(0, 1) for t in torchs(1, torch.float32)()]
        return max(peers.difference(a[:T], b) for a, b in zip(ours(), exact, strict=True))

    flops = 2.0 * B * H * T * T / 2 * (N + R + V)
    moved = (q.nbytes + key.nbytes + 2 * v.nbytes) * (3 if back else 1)
    return Work(
        ours,
        error,
        BF16_DIFFERENCE if back else ATTENTION_DIFFERENCE,
        flops * (3.5 if back else 1),
        moved,
        "bf16",
        {"scaled_dot_product_attention": lambda: torchs(B, q.dtype)},
    )


# ---- routing and elementwise -----------------------------------------------------------------------------------


def gate(device: torch.device, T: int, E: int, K: int, groups: int, kept: int) -> Work:
    """Scores, bias, groups, the chosen experts and their weights in one launch."""
    logits = torch.randn(T, E, device=device)
    bias = 0.1 * torch.randn(E, device=device)
    rule = {"n_group": groups, "topk_group": kept, "top_k": K, "norm": True, "scale": 2.5}

    def error() -> float:
        (i, w, *_), (j, v, *_) = k.gate(logits, bias, **rule), k.gate_ref(logits, bias, **rule)
        same = i.sort(-1).values == j.sort(-1).values
        # Affinities closer than the last bit may change places: one choice in ten thousand.
        return (
            1.0
            if float(same.float().mean()) < 0.9999
            else peers.difference(w.sort(-1).values, v.sort(-1).values)
        )

    return Work(
        lambda: k.gate(logits, bias, **rule),
        error,
        1e-4,
        0.0,
        4 * T * E + T * K * (8 + 4),
        peers={"torch": lambda: lambda: k.gate_ref(logits, bias, **rule)},
        goals={"times torch": 5.0},
    )


def permute(device: torch.device, T: int, D: int, E: int, K: int) -> Work:
    """Rows copied to their experts, and the weighted sum back."""
    x = noise(device, T, D)
    indices = torch.rand(T, E, device=device).topk(K, -1).indices
    weights = torch.rand(T, K, device=device)

    def run() -> Tensor:
        rows, _, positions = k.permute(x, indices, E)
        return k.unpermute(rows, positions, weights)

    def plain() -> Tensor:
        order = indices.flatten().argsort(stable=True)
        rows = x[order // K]
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=device)
        return (rows[back].view(T, K, D).float() * weights[..., None]).sum(1).to(x.dtype)

    return Work(
        run,
        lambda: peers.difference(run(), plain()),
        BF16_DIFFERENCE,
        0.0,
        x.element_size() * T * D * (1 + K + K + 1),
        peers={"torch": lambda: plain},
    )


def norm(device: torch.device, M: int, D: int) -> Work:
    """RMSNorm forward and backward."""
    x, w, grad = noise(device, M, D).requires_grad_(), noise(device, D).requires_grad_(), noise(device, M, D)

    def run() -> Tensor:
        return torch.autograd.grad(k.rms_norm(x, w, 1e-6), (x, w), grad)[0]

    def plain() -> Tensor:
        return torch.autograd.grad(F.rms_norm(x, (D,), w, 1e-6), (x, w), grad)[0]

    def exact() -> Tensor:
        a, b = x.detach().float().requires_grad_(), w.detach().float().requires_grad_()
        return torch.autograd.grad(F.rms_norm(a, (D,), b, 1e-6), a, grad.float())[0]

    moved = x.nbytes * 5  # forward reads x and writes y; backward reads x and the gradient and writes one
    error = lambda: peers.difference(run(), exact())  # noqa: E731
    return Work(run, error, NORM_DIFFERENCE, 0.0, moved, peers={"torch": lambda: plain})


def rope(device: torch.device, T: int, H: int, N: int = 128, R: int = 64) -> Work:
    """The rotary part of every query and the shared key turned in place, one launch."""
    q, key = noise(device, T, H, N + R), noise(device, T, R)
    angles = torch.rand(T, R // 2, device=device) * 6.28
    turns = torch.polar(torch.ones_like(angles), angles)

    def error() -> float:
        found, expected = k.rope(q, key, turns), k.rope_ref(q.float(), key.float(), turns)
        return max(peers.difference(a, b) for a, b in zip(found, expected, strict=True))

    touched = 2 * q.element_size() * (T * H * R + T * R) + 8 * angles.numel()
    return Work(
        lambda: k.rope(q, key, turns, inplace=True),
        error,
        BF16_DIFFERENCE,
        0.0,
        touched,
        peers={"torch": lambda: lambda: k.rope_ref(q, key, turns)},
    )


def swiglu(device: torch.device, M: int, D: int) -> Work:
    """silu(gate) · up, forward and backward."""
    x, grad = noise(device, M, 2 * D).requires_grad_(), noise(device, M, D)

    def run() -> Tensor:
        return torch.autograd.grad(k.swiglu(x), x, grad)[0]

    def through(a: Tensor, g: Tensor) -> Tensor:
        return torch.autograd.grad(F.silu(a[:, :D]) * a[:, D:], a, g)[0]

    return Work(
        run,
        lambda: peers.difference(run(), through(x.detach().float().requires_grad_(), grad.float())),
        NORM_DIFFERENCE,
        0.0,
        x.element_size() * M * D * (3 + 5),
        peers={"torch": lambda: lambda: through(x, grad)},
    )


TABLE: list[tuple[str, Callable[..., Work], list[dict[str, int]], dict[str, int]]] = [
    ("quantize_tiles", quantize, [{"M": 32768, "K": 4096}, {"M": 32768, "K": 7168}], {"M": 5, "K": 256}),
    ("quantize_tiles_both", quantize_both, [{"M": 32768, "K": 7168}], {"M": 128, "K": 256}),
    ("rms_norm_quantize", partial(fused, norm=1), [{"M": 32768, "D": 7168}], {"M": 5, "D": 256}),
    ("swiglu_quantize", partial(fused, norm=0), [{"M": 32768, "D": 2048}], {"M": 5, "D": 256}),
    (
        "gemm_fp8",
        gemm,
        [
            {"M": m, "N": n, "K": d}
            for m, n, d in [
                (4096, 24576, 7168),
                (4096, 32768, 512),
                (4096, 7168, 16384),
                (4096, 4096, 7168),
                (1024, 8192, 8192),
                (64, 24576, 7168),
                (128, 24576, 7168),
                (128, 7168, 16384),
            ]
        ],
        {"M": 33, "N": 256, "K": 256},
    ),
    (
        "grouped_gemm_fp8",
        grouped,
        [{"G": 8, "M": 4096, "N": 4096, "K": 7168}, {"G": 8, "M": 4096, "N": 7168, "K": 2048}],
        {"G": 3, "M": 20, "N": 128, "K": 128},
    ),
    (
        "grouped_gemm",
        partial(grouped, fp8=0),
        [{"G": 8, "M": 4096, "N": 4096, "K": 7168}, {"G": 8, "M": 4096, "N": 7168, "K": 2048}],
        {"G": 3, "M": 20, "N": 48, "K": 40},
    ),
    (
        "mla_decode",
        decode,
        [
            {"B": 128, "S": 8192, "H": 128},
            {"B": 128, "S": 8192, "H": 16},
            {"B": 64, "S": 4096, "H": 128, "q": 2},
        ],
        {"B": 2, "S": 70, "H": 16, "C": 128, "R": 16},
    ),
    (
        "mla_decode fp8",
        partial(decode, fp8=1),
        [{"B": 128, "S": 8192, "H": 128}, {"B": 128, "S": 8192, "H": 16}],
        {"B": 2, "S": 70, "H": 16, "C": 128, "R": 16},
    ),
    (
        "mla_prefill",
        prefill,
        [{"B": 2, "T": 4096, "H": 128}],
        {"B": 2, "T": 33, "H": 2, "N": 16, "R": 16, "V": 16},
    ),
    (
        "mla_prefill backward",
        partial(prefill, back=1),
        [{"B": 2, "T": 4096, "H": 128}],
        {"B": 1, "T": 33, "H": 2, "N": 16, "R": 16, "V": 16},
    ),
    (
        "gate",
        gate,
        [{"T": t, "E": 256, "K": 8, "groups": 8, "kept": 4} for t in (4096, 32768)],
        {"T": 9, "E": 32, "K": 4, "groups": 4, "kept": 2},
    ),
    ("permute", permute, [{"T": 8192, "D": 7168, "E": 256, "K": 8}], {"T": 9, "D": 64, "E": 8, "K": 2}),
    ("rms_norm", norm, [{"M": 32768, "D": 7168}], {"M": 5, "D": 96}),
    ("rope", rope, [{"T": 8192, "H": 128}], {"T": 5, "H": 2, "N": 16, "R": 8}),
    ("swiglu", swiglu, [{"M": 32768, "D": 2048}], {"M": 5, "D": 96}),
]


# ---- operands and measures ---------------------------------------------------------------------------------------


def floating(device: torch.device) -> torch.dtype:
    """bf16; in the interpreter, whose bf16 products are garbage, fp32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def noise(device: torch.device, *shape: int) -> Tensor:
    """Random numbers, never zeros: those are easier to be right on, and faster."""
    return torch.randn(*shape, device=device).to(floating(device))


def uneven(device: torch.device, groups: int, rows: int) -> Tensor:
    """Rows per group, about as uneven as a router's load, with an empty group."""
    shares = torch.rand(groups) + 0.5
    shares[groups // 2] = 0
    counts = (shares / shares.sum() * rows).long()
    counts[0] += rows - counts.sum()
    return counts.to(device)


def mean_relative(x: Tensor, expected: Tensor) -> float:
    """Mean of |x − expected| over the mean of |expected|; NaN if either holds one."""
    return float((x.float() - expected.float()).abs().mean() / expected.float().abs().mean())


def unequal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The share of values whose bits differ."""
    pairs = zip(found, expected, strict=True)
    return max(float((a.float() != b.float()).float().mean()) for a, b in pairs)
