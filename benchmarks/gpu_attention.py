"""Cases of the GPU benchmark: absorbed decoding and causal attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import gpu_peers as peers
import torch
import torch.nn.functional as F
from gpu_work import (
    ATTENTION_DIFFERENCE,
    BF16_DIFFERENCE,
    PAGE,
    Call,
    Work,
    floating,
    noise,
)  # fmt: skip
from torch import Tensor

from dsv3lib import kernels as k


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
