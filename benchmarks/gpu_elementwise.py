"""Cases of the GPU benchmark: the gate, the permutation of tokens, norms, RoPE and SwiGLU."""

from __future__ import annotations

import gpu_peers as peers
import torch
import torch.nn.functional as F
from gpu_work import (
    BF16_DIFFERENCE,
    NORM_DIFFERENCE,
    Work,
    noise,
)  # fmt: skip
from torch import Tensor

from dsv3lib import kernels as k


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
