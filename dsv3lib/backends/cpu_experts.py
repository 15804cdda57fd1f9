"""The routed experts on a CPU: one expert's rows from gather to answer before the next expert's.

The staged form (gather all, multiply all, gate all, multiply all) walks through memory that no cache holds,
once for each stage. One expert's rows do fit, so here every stage finds them where the last one left them.
Gate values are applied to the narrow hidden layer rather than to the answers, which then need not be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..autograd import once_differentiable
from ..gemm import mm, padded_room
from ..layers.experts import Visits
from ..linear import WeightGradients
from .side_by_side import side_by_side


def experts_one_by_one(
    x: Float[Tensor, "N D"],
    weights: Float[Tensor, "N A"],
    gate_up_proj: Float[Tensor, "E gate_up D"],
    down_proj: Float[Tensor, "E D F"],
    visits: Visits,
    later: WeightGradients | None = None,
) -> Float[Tensor, "N D"]:
    """Σ_a g_a · down(silu(gate x) ⊙ up x) over each token's experts (second sum of Eq. 12).

    Args:
        x: tokens.
        weights: gate values g.
        gate_up_proj: the experts' first matrices, gate rows first.
        down_proj: their second.
        visits: sorted by expert.
        later: where the matrices' gradients wait, if they are not to be made in backward.

    Returns:
        The weighted answers; differentiable once in the first four.
    """
    sizes = visits.counts.tolist()
    return _OneByOne.apply(x, weights, gate_up_proj, down_proj, visits.order, visits.inverse, sizes, later)


def _each(sizes: list[int], rows: tuple[Tensor, ...], of_expert: tuple[Tensor, ...]) -> Iterator[tuple]:
    """For each visited expert its part of every sorted tensor, and its matrix of every stacked one."""
    parts = zip(*(x.split(sizes) for x in rows), *(x.unbind(0) for x in of_expert), strict=True)
    return (part for part, size in zip(parts, sizes, strict=True) if size)


class _OneByOne(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, w_in, w_out, order, inverse, sizes, later):
        token = order // weights.shape[1]
        g = weights.flatten().index_select(0, order).unsqueeze(1)
        gate_up = x.new_empty(token.numel(), w_in.shape[1])
        y = x.new_empty(token.numel(), x.shape[1])
        sorted_rows = token, g, gate_up, *gate_up.chunk(2, -1), y

        def one(rows, g_e, both, gate, up, answer, into, back):
            n = len(rows)
            both.copy_(mm(_gathered(x, rows), into)[:n])
            hidden = padded_room(n, gate)
            torch.mul(F.silu(gate).mul_(up), g_e, out=hidden[:n])
            answer.copy_(mm(hidden, back)[:n])

        each = _each(sizes, sorted_rows, (w_in.transpose(1, 2), w_out.transpose(1, 2)))
        side_by_side((partial(one, *parts) for parts in each), gate_up.numel() * x.shape[1])
        ctx.save_for_backward(x, g, w_in, w_out, gate_up, token, inverse)
        ctx.sizes, ctx.later = sizes, later
        ctx.leaves = None if later is None else (w_in, w_out)
        return _sum_home(y, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, g, w_in, w_out, gate_up, token, inverse = ctx.saved_tensors
        grad_g, grad_rows = torch.empty_like(g), x.new_empty(token.numel(), x.shape[1])
        of_weights = _of_weights(w_in, w_out, ctx.sizes)
        wanted = ctx.needs_input_grad[2:4]
        products: list[Callable[[], Tensor]] = []
        sorted_rows = token, g, *gate_up.chunk(2, -1), grad_g, grad_rows

        def one(rows, g_e, gate, up, to_g, to_x, into, back, to_in, to_out):
            own: list[Callable[[], Tensor]] = []
            n, open_gate = len(rows), F.silu(gate)
            padded, answer = padded_room(n, gate), _gathered(grad, rows)  # the answers' gradient
            hidden = torch.mul(open_gate, up, out=padded[:n])
            grad_hidden = mm(answer, back)[:n]
            torch.sum(grad_hidden * hidden, -1, keepdim=True, out=to_g)
            if wanted[1]:
                hidden.mul_(g_e)
                own.append(partial(_into, to_out, answer.t(), padded))
            grad_hidden.mul_(g_e)
            grad_both = padded_room(n, gate_up)
            to_gate, to_up = grad_both[:n].chunk(2, -1)
            torch.mul(grad_hidden, open_gate, out=to_up)
            torch.ops.aten.silu_backward.grad_input(grad_hidden.mul_(up), gate, grad_input=to_gate)
            if wanted[0]:
                own.append(partial(_into, to_in, grad_both.t(), _gathered(x, rows)))
            to_x.copy_(mm(grad_both, into)[:n])
            if ctx.later is None:
                _run(own)  # while the expert's rows are in the cache
            products.extend(own)

        each = _each(ctx.sizes, sorted_rows, (w_in, w_out, *of_weights))
        side_by_side((partial(one, *parts) for parts in each), 2 * gate_up.numel() * x.shape[1])
        if ctx.later is not None:
            for leaf, made in zip(ctx.leaves, of_weights, strict=True):
                if leaf.requires_grad:
                    ctx.later.put(leaf, partial(_after, products, made))
            wanted = False, False
        of_weights = (made if want else None for made, want in zip(of_weights, wanted, strict=True))
        grad_weights = grad_g.view(-1)[inverse]
        return _sum_home(grad_rows, inverse), grad_weights, *of_weights, None, None, None, None


def _gathered(x: Tensor, rows: Tensor) -> Tensor:
    """An expert's rows of x, padded."""
    room = padded_room(len(rows), x)
    torch.index_select(x, 0, rows, out=room[: len(rows)])
    return room


def _into(out: Tensor, a: Tensor, b: Tensor) -> None:
    out.copy_(mm(a, b))


def _of_weights(w_in: Tensor, w_out: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Room for the matrices' gradients."""
    grad_in, grad_out = torch.empty_like(w_in), torch.empty_like(w_out)
    for e, size in enumerate(sizes):
        if not size:  # nobody came, nobody writes there
            grad_in[e].zero_(), grad_out[e].zero_()
    return grad_in, grad_out


def _run(products: list[Callable[[], Tensor]]) -> None:
    """Make products, each once."""
    while products:
        products.pop(0)()


def _after(products: list[Callable[[], Tensor]], made: Tensor) -> Tensor:
    """A gradient, once the products that fill it have been made: whoever of the two asks first makes them all."""
    _run(products)
    return made


def _sum_home(y: Tensor, inverse: Tensor) -> Tensor:
    """Σ_a y[inverse[n, a]], in a fixed order: what an embedding layer calls a bag."""
    return F.embedding_bag(inverse, y, mode="sum")
