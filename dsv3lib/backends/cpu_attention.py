"""Causal attention in blocks of rows, for the CPU: the upper half of the score matrix is never touched.

torch's fused attention is made for long contexts: its backward computes every score again, block by block.
Up to about a thousand tokens the probabilities of a layer fit in memory, and it is quicker to keep them.
Each block of rows meets the columns up to its own end, so that a little over half of the square is computed.
Without a gradient nothing is kept, and long contexts are quick in blocks too, where ``gemm`` is.
``backends.cpu`` chooses; the plain formula is ``causal_attention_ref``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from .. import gemm
from ..autograd import once_differentiable
from .side_by_side import side_by_side

GROUP = 24  # sequences at a time: a block of their scores stays in the cores' caches
BLOCK = 64  # rows at a time: less wasted above the diagonal with fewer, less started work with more
ROWS, SCORES = 128, 2**20  # of a block of ``long_attention``, at most: 4 MiB of scores
MOST_TOKENS = 1024  # half of T² probabilities per head are kept; beyond this the fused kernel is as quick


def causal_attention_ref(
    q: Float[Tensor, "N T QK"], k: Float[Tensor, "N T QK"], v: Float[Tensor, "N T V"], scale: float
) -> Float[Tensor, "N T V"]:
    """softmax(scale · q kᵀ + mask) v, the plain form: the whole square, −inf above the diagonal."""
    scores = q @ k.transpose(1, 2) * scale
    above = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(above, float("-inf")).softmax(-1) @ v


def causal_attention(
    q: Float[Tensor, "N T QK"], k: Float[Tensor, "N T QK"], v: Float[Tensor, "N T V"], scale: float
) -> Float[Tensor, "N T V"]:
    """softmax(scale · q kᵀ + mask) v, where position t sees itself and what lies before (Eq. 10).

    Args:
        q: queries of N = batch x heads independent sequences.
        k: keys.
        v: values.
        scale: 1/√(width of q), times YaRN's temperature.

    Returns:
        Weighted values; differentiable once in q, k and v.
    """
    return _CausalAttention.apply(q, k, v, scale)


class _CausalAttention(torch.autograd.Function):
    """Backward with the kept P: dV = Pᵀ dO, dS = P ⊙ (dP − rowsum(dP ⊙ P)), dQ = dS K, dK = dSᵀ Q."""

    @staticmethod
    def forward(ctx, q, k, v, scale):
        out, above, at_once = torch.empty_like(v), above_diagonal(BLOCK, q), heads_at_once(len(q))

        def one(q_g, k_g, v_g, out_g, of_group):
            q_g, k_t = q_g * scale, k_g.transpose(1, 2)
            for start, end in blocks(q.shape[1]):
                scores = torch.bmm(q_g[:, start:end], k_t[..., :end])
                scores[..., start:] += above[: end - start, : end - start]
                p = torch.softmax(scores, -1, out=scores)
                out_g[:, start:end] = torch.bmm(p, v_g[:, :end])
                of_group.append(p)

        each = [(*parts, []) for parts in groups(at_once, q, k, v, out)]
        side_by_side((partial(one, *parts) for parts in each), q.numel() * q.shape[1])
        kept = [p for *_, of_group in each for p in of_group]
        ctx.save_for_backward(q, k, v, *kept)  # q as it came, not scaled: it may be made again instead of kept
        ctx.scale, ctx.at_once = scale, at_once
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, *kept = ctx.saved_tensors
        grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q, k, v))
        cut = blocks(q.shape[1])
        each = zip(groups(ctx.at_once, q, k, v, grad, grad_q, grad_k, grad_v), batched(kept, len(cut)), strict=True)

        def one(q_g, k_g, v_g, to_out, to_q, to_k, to_v, probabilities):
            v_t = v_g.transpose(1, 2)
            # From the last block, which meets every column and so writes where the others add.
            for (start, end), p in zip(reversed(cut), reversed(probabilities), strict=True):
                g, q_b = to_out[:, start:end], q_g[:, start:end]
                grad_p = torch.bmm(g, v_t[..., :end])
                grad_s = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype)
                if end == q.shape[1]:
                    torch.bmm(p.transpose(1, 2), g, out=to_v)
                    torch.bmm(grad_s.transpose(1, 2), q_b, out=to_k)
                else:
                    to_v[:, :end] += torch.bmm(p.transpose(1, 2), g)
                    to_k[:, :end] += torch.bmm(grad_s.transpose(1, 2), q_b)
                to_q[:, start:end] = torch.bmm(grad_s, k_g[:, :end])

        side_by_side((partial(one, *parts, p) for parts, p in each), 2 * q.numel() * q.shape[1])
        return grad_q.mul_(ctx.scale), grad_k.mul_(ctx.scale), grad_v, None


def long_attention(
    q: Float[Tensor, "N T QK"], k: Float[Tensor, "N S QK"], v: Float[Tensor, "N S V"], scale: float
) -> Float[Tensor, "N T V"]:
    """The same over long contexts, without a gradient: queries are the last T of S positions.

    A block of rows meets all its columns in one product, so that softmax is one operation, and its scores lie in a
    core's cache or near it. Columns are padded to ``gemm.padded_size``.

    Args:
        q: queries of N = batch x heads independent sequences.
        k: keys.
        v: values.
        scale: as for ``causal_attention``.
    """
    n_new, n_total = q.shape[1], k.shape[1]
    each = max(16, min(ROWS, SCORES // n_total))
    out = q.new_empty(*q.shape[:2], v.shape[2])
    first = n_total - n_new
    above = above_diagonal(each, q, each + max(gemm.LEAST_ROWS, n_total // gemm.STEPS))

    def one(head: int, start: int) -> None:
        end = min(start + each, n_new)
        columns = min(n_total, gemm.padded_size(first + end))
        # Blocks at the end, of other shapes from call to call, are torch's.
        product = gemm.mm if end - start == each and columns == gemm.padded_size(columns) else torch.mm
        scores = product(q[head, start:end] * scale, k[head, :columns].t())
        beside = scores[:, first + start :]
        beside += above[: end - start, : beside.shape[1]]
        p = torch.softmax(scores, -1, out=scores)
        out[head, start:end] = product(p, v[head, :columns])

    starts = reversed(range(0, n_new, each))  # those that take longest first
    side_by_side((partial(one, head, start) for start in starts for head in range(len(q))), q.numel() * n_total)
    return out


def batched(items: list[Tensor], n: int) -> list[list[Tensor]]:
    """The items, n at a time."""
    return [items[i : i + n] for i in range(0, len(items), n)]


def heads_at_once(n: int) -> int:
    """How many of n sequences make a group: at most ``GROUP``, and as many groups for each thread."""
    threads = torch.get_num_threads()
    count = -(-n // (GROUP * threads)) * threads
    return max(1, -(-n // count))


def groups(each: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """A few heads of every tensor at a time."""
    return zip(*(x.split(each) for x in tensors), strict=True)


def blocks(n_tokens: int) -> list[tuple[int, int]]:
    """First row and end of each block."""
    return [(start, min(start + BLOCK, n_tokens)) for start in range(0, n_tokens, BLOCK)]


def above_diagonal(n: int, like: Tensor, width: int | None = None) -> Float[Tensor, "n width"]:
    """−inf above the diagonal, 0 elsewhere: added, it hides the future. ``width`` is n by default."""
    return like.new_full((n, n if width is None else width), float("-inf")).triu_(1)
