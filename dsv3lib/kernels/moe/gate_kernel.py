"""The gate: from router logits to chosen experts and their weights, in one launch and one pass over memory.

A token's row of logits becomes affinities (sigmoid), a bias steers the choice, groups of experts are scored by
their two best, the best groups stay, the best experts in them are chosen, and the weights are the *unbiased*
affinities of the chosen ones, normalised (paper §2.1.2, Eqs. 13 to 16). In PyTorch that is some fifteen
operations, each of which reads and writes rows of 256 numbers.

The two numbers, for V3 (256 experts in 8 groups, 8 chosen), per token: 1 KiB of logits in, 96 bytes of choices
out and, in training, 1 KiB of affinities; and about 3,000 elementary operations, nearly all of them the twelve
searches for a largest value (4 groups, 8 experts). At 4 TB/s the bytes take half a nanosecond, and 132
multiprocessors do the operations in about as much. So neither may be wasted:

- A row stays in registers from the first byte to the last. It is laid out as [groups, experts of a group], so that
  a group's score is a reduction along one axis, and read as one row again for the choice of experts. Both sizes
  are padded to powers of two, so any number of experts and groups fits.
- Largest first, the lower index among equals: affinities become integers that order as the numbers do, with NaN on
  top; the largest is one integer maximum, its place one integer minimum. Hopper has both as one instruction for
  the 32 threads of a warp (``redux.sync``), and there are no comparisons with NaN that could go either way.
- One warp takes a few rows at a time: reductions never leave the warp, and rows hide each other's waiting.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...autograd import once_differentiable
from ...errors import KernelError
from ...layers.router import choose
from ..toolchain import tuning
from ..toolchain.checks import require_dtype, require_rows, require_shape
from ..toolchain.language import jit, row_offset, tl, triton
from ..toolchain.targets import on_device, on_triton

# ---- the operation -----------------------------------------------------------------------------------------


def gate(
    logits: Float[Tensor, "T E"],
    bias: Float[Tensor, " E"],
    *,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    norm: bool = True,
    scale: float = 1.0,
    with_scores: bool = True,
    settings: dict[str, Any] | None = None,
) -> tuple[Int[Tensor, "T K"], Float[Tensor, "T K"], Float[Tensor, "T E"] | None]:
    """Choose each token's experts and weigh them: g = s / Σ s over the chosen, s = sigmoid(logits) (Eqs. 13 to 16).

    The bias decides *which* experts and is absent from *how much*. Equal affinities are settled for the lower
    index. A NaN logit on a GPU stands above all others, so its expert is chosen and the token's weights are
    NaN (all of them if normalised): the loss shows it, and nobody has to wait for the GPU to be asked.

    Args:
        logits: u · e_i, FP32 (FP64 goes to the reference), rows side by side.
        bias: b, FP32.
        top_k: K_r, experts a token visits.
        n_group: groups of experts, one a node.
        topk_group: how many groups one token may use.
        norm: divide by the sum over the chosen.
        scale: ``routed_scaling_factor``.
        with_scores: also return s, which the balance loss needs.
        settings: other than those tuned.

    Returns:
        indices: Int64, best first. weights: FP32, in their order, differentiable in the logits.
        scores: s, FP32, differentiable too; or ``None``.

    Raises:
        KernelError: wrong dtype, shape or strides; groups that do not divide the experts or hold fewer than two;
            more chosen than there are.
        InputError: a logit is NaN (on the CPU, where asking costs nothing).
    """
    _check_gate(logits, bias, top_k, n_group, topk_group)
    how = {
        "top_k": top_k,
        "n_group": n_group,
        "topk_group": topk_group,
        "norm": norm,
        "scale": float(scale),
    }
    if logits.dtype == torch.float64 or not on_triton(logits, bias):
        indices, weights, scores = gate_ref(logits, bias, **how)
    else:
        indices, weights, scores = _Gate.apply(logits, bias, how, with_scores, settings)
    return indices, weights, scores if with_scores else None


def gate_ref(
    logits: Float[Tensor, "T E"], bias: Float[Tensor, " E"], **how: Any
) -> tuple[Int[Tensor, "T K"], Float[Tensor, "T K"], Float[Tensor, "T E"]]:
    """The plain form: affinities, then the rule of ``layers.router``. Arguments as for ``gate``."""
    scores = logits.sigmoid()
    return *choose(scores, bias, **how), scores


def _check_gate(logits: Tensor, bias: Tensor, top_k: int, n_group: int, topk_group: int) -> None:
    floats = (torch.float32, torch.float64)
    require_dtype("gate", "logits", logits, floats)
    require_dtype("gate", "bias", bias, floats)
    require_rows("gate", "logits", logits)
    n_experts = logits.shape[-1]
    require_shape("gate", "bias", bias, (n_experts,))
    if n_group < 1 or n_experts % n_group or (n_group > 1 and n_experts < 2 * n_group):
        raise KernelError(
            f"gate: n_group is {n_group}, expected a divisor of the {n_experts} experts that leaves two or more "
            "to a group, which is scored by its two best"
        )
    if not 1 <= topk_group <= n_group:
        raise KernelError(f"gate: topk_group is {topk_group}, expected 1 to n_group ({n_group})")
    most = topk_group * (n_experts // n_group)
    if not 1 <= top_k <= most:
        raise KernelError(f"gate: top_k is {top_k}, expected 1 to {most}, the experts of the kept groups")


# ---- launches ----------------------------------------------------------------------------------------------


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, bias, how, with_scores, settings):
        (tokens, experts), k = logits.shape, how["top_k"]
        indices = torch.empty(tokens, k, dtype=torch.int64, device=logits.device)
        weights = logits.new_empty(tokens, k)
        scores = logits.new_empty(tokens, experts) if with_scores else None
        row = settings or tuning.pick("gate", logits.device, T=tokens, E=experts)
        group = experts // how["n_group"]
        if tokens:
            with on_device(logits):
                gate_kernel[(triton.cdiv(tokens, row["BLOCK_T"]),)](
                    logits, bias.float().contiguous(), indices, weights, scores if with_scores else logits,
                    logits.stride(0), tokens, how["scale"],
                    N_GROUP=how["n_group"], GROUP=group, TOPK_GROUP=how["topk_group"], TOP_K=k,
                    NORMALIZE=how["norm"], WITH_SCORES=with_scores,
                    G_PAD=triton.next_power_of_2(how["n_group"]), S_PAD=triton.next_power_of_2(group),
                    K_PAD=triton.next_power_of_2(k), **row,
                )  # fmt: skip
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(scores if with_scores else logits, indices)  # the one that is kept anyway
        ctx.how, ctx.with_scores = how, with_scores
        return indices, weights, scores

    @staticmethod
    @once_differentiable
    def backward(ctx, _, grad_weights, grad_scores):
        kept, indices = ctx.saved_tensors
        tokens, experts = kept.shape
        k = indices.shape[1]
        grad_logits = torch.empty(tokens, experts, dtype=kept.dtype, device=kept.device)
        grad_weights = kept.new_zeros(tokens, k) if grad_weights is None else grad_weights.contiguous()
        row = tuning.pick("gate_backward", kept.device, T=tokens, E=experts)
        if tokens:
            with on_device(kept):
                gate_backward_kernel[(triton.cdiv(tokens, row["BLOCK_T"]),)](
                    kept, indices, grad_weights, kept if grad_scores is None else grad_scores.contiguous(),
                    grad_logits, kept.stride(0), tokens, experts, ctx.how["scale"],
                    TOP_K=k, NORMALIZE=ctx.how["norm"], FROM_SCORES=ctx.with_scores,
                    WITH_SCORES=grad_scores is not None,
                    E_PAD=triton.next_power_of_2(experts), **row,
                )  # fmt: skip
        return grad_logits, None, None, None, None


# ---- kernels -----------------------------------------------------------------------------------------------


@jit
def affinity(x):
    """sigmoid, by an exponential that cannot overflow."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@jit
def ordered(x):
    """FP32 to integers that order as the numbers do, NaN above all. No −0 arises here: s + b with s ≥ +0."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@jit
def unordered(key):
    """Back to the number: the map is its own inverse."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit
def gate_kernel(
    logits_ptr, bias_ptr, indices_ptr, weights_ptr, scores_ptr,
    stride_logits, n_tokens, scale,
    N_GROUP: tl.constexpr, GROUP: tl.constexpr, TOPK_GROUP: tl.constexpr, TOP_K: tl.constexpr,
    NORMALIZE: tl.constexpr, WITH_SCORES: tl.constexpr,
    G_PAD: tl.constexpr, S_PAD: tl.constexpr, K_PAD: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """BLOCK_T tokens from logits to choices."""
    NEVER: tl.constexpr = -2147483648  # below the key of −inf: padding, and what is taken already
    DROPPED: tl.constexpr = -2139095041  # the key of −inf
    BEYOND: tl.constexpr = 2147483647
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    there = token < n_tokens
    group = tl.arange(0, G_PAD)[None, :, None]
    place = tl.arange(0, S_PAD)[None, None, :]
    expert = group * GROUP + place
    real = (group < N_GROUP) & (place < GROUP)
    row = row_offset(token, stride_logits)
    # [BLOCK_T, G_PAD, S_PAD]
    x = tl.load(logits_ptr + row[:, None, None] + expert, mask=there[:, None, None] & real, other=0.0)
    s = affinity(x)
    if WITH_SCORES:
        out = row_offset(token, N_GROUP * GROUP)[:, None, None] + expert
        tl.store(scores_ptr + out, s, mask=there[:, None, None] & real)  # [BLOCK_T, G_PAD, S_PAD]
    # [BLOCK_T, G_PAD, S_PAD] + [1, G_PAD, S_PAD]
    key = tl.where(real, ordered(s + tl.load(bias_ptr + expert, mask=real, other=0.0)), NEVER)

    if N_GROUP > 1:
        first = tl.max(key, axis=2)
        where_first = tl.min(tl.where(key == first[:, :, None], place, BEYOND), axis=2)
        second = tl.max(tl.where(place == where_first[:, :, None], NEVER, key), axis=2)
        number = tl.arange(0, G_PAD)[None, :]
        score = tl.where(number < N_GROUP, ordered(unordered(first) + unordered(second)), NEVER)
        kept = tl.zeros([BLOCK_T, G_PAD], dtype=tl.int32)
        for _ in tl.static_range(TOPK_GROUP):
            top = tl.max(score, axis=1)
            g = tl.min(tl.where(score == top[:, None], number, BEYOND), axis=1)
            taken = number == g[:, None]
            kept = tl.where(taken, 1, kept)
            score = tl.where(taken, NEVER, score)
        key = tl.where(real & (kept[:, :, None] == 0), DROPPED, key)

    key = tl.reshape(key, [BLOCK_T, G_PAD * S_PAD])
    flat = tl.arange(0, G_PAD * S_PAD)[None, :]
    expert = (flat // S_PAD) * GROUP + flat % S_PAD
    slot = tl.arange(0, K_PAD)[None, :]
    chosen = tl.zeros([BLOCK_T, K_PAD], dtype=tl.int32)
    for k in tl.static_range(TOP_K):
        top = tl.max(key, axis=1)
        e = tl.min(tl.where(key == top[:, None], expert, BEYOND), axis=1)
        chosen = tl.where(slot == k, e[:, None], chosen)
        key = tl.where(expert == e[:, None], NEVER, key)

    # The chosen logits again: these bytes have just been here, and it spares eight reductions over the row.
    used = there[:, None] & (slot < TOP_K)
    s = affinity(tl.load(logits_ptr + row[:, None] + chosen, mask=used, other=0.0))  # [BLOCK_T, K_PAD]
    s = tl.where(slot < TOP_K, s, 0.0)
    if NORMALIZE:
        s = s / (tl.sum(s, axis=1)[:, None] + 1e-20)
    out = row_offset(token, TOP_K)[:, None] + slot
    tl.store(indices_ptr + out, chosen.to(tl.int64), mask=used)  # [BLOCK_T, K_PAD]
    tl.store(weights_ptr + out, s * scale, mask=used)  # [BLOCK_T, K_PAD]


@jit
def gate_backward_kernel(
    kept_ptr, indices_ptr, grad_weights_ptr, grad_scores_ptr, grad_logits_ptr,
    stride_kept, n_tokens, n_experts, scale,
    TOP_K: tl.constexpr, NORMALIZE: tl.constexpr, FROM_SCORES: tl.constexpr, WITH_SCORES: tl.constexpr,
    E_PAD: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """With Z = Σ s over the chosen: ds_k = scale · (g_k − Σ_j g_j s_j / Z) / Z, and dx = ds · s (1 − s).

    A row at a time: what belongs to one chosen expert is then a scalar, which every thread of the warp holds.
    """
    expert = tl.arange(0, E_PAD)
    real = expert < n_experts
    for i in tl.static_range(BLOCK_T):
        token = tl.program_id(0) * BLOCK_T + i
        if token < n_tokens:
            row = kept_ptr + row_offset(token, stride_kept)
            few = row_offset(token, TOP_K)
            shared, inverse = 0.0, scale
            if NORMALIZE:
                z, dot = 1e-20, 0.0
                for k in tl.static_range(TOP_K):
                    s_k = tl.load(row + tl.load(indices_ptr + few + k))  # scalar
                    if not FROM_SCORES:
                        s_k = affinity(s_k)
                    z += s_k
                    dot += s_k * tl.load(grad_weights_ptr + few + k)  # scalar
                shared, inverse = dot / z, scale / z
            s = tl.load(row + expert, mask=real, other=0.0)  # [E_PAD]
            if not FROM_SCORES:
                s = affinity(s)
            dense = row_offset(token, n_experts) + expert
            d = tl.zeros([E_PAD], dtype=tl.float32)
            if WITH_SCORES:
                d += tl.load(grad_scores_ptr + dense, mask=real, other=0.0)  # [E_PAD]
            for k in tl.static_range(TOP_K):
                g_k = (tl.load(grad_weights_ptr + few + k) - shared) * inverse  # scalar
                d += tl.where(expert == tl.load(indices_ptr + few + k).to(tl.int32), g_k, 0.0)  # scalar
            tl.store(grad_logits_ptr + dense, d * s * (1.0 - s), mask=real)  # [E_PAD]
