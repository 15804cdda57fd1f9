"""Expert parallelism (EP) as a backend: a block's stages whose experts lie on several ranks.

Four exchanges a layer and micro-batch, each launched by one stage and waited for in a later one, so that a pipeline's
overlapped pair computes the other micro-batch's attention and MLP between them (paper §3.2.1, Figure 4):

    forward    dispatch launches             →  experts waits, computes, launches  →  combine waits
    backward   combine↤ launches ∂L/∂y       →  experts↤ waits, computes, launches →  dispatch↤ waits

Between two stages an empty tensor, the *ticket*, stands in the graph for the rows that are on the wires.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..autograd import once_differentiable
from ..errors import InputError
from ..fp8.operands import Operand, along_rows, restored
from ..layers.experts import Experts
from ..layers.operations import Operations
from .expert_all_to_all import BACKWARD, COMBINE, DISPATCH, ExpertAllToAll, Route
from .wires import UnderWay, Wires


class Crossing:
    """One layer's exchanges for one micro-batch, one after the other.

    Attributes:
        route: where the tokens go, known when dispatch has arrived.
    """

    def __init__(self, parallel: ExpertParallel) -> None:
        self.parallel = parallel
        self.route: Route | None = None
        self._under_way: UnderWay | None = None

    def launch(self, name: str, exchange: Any) -> None:
        """Let one go; the last one has been waited for."""
        self._under_way = self.parallel.wires.launch(f"{self.parallel.label} {name}", exchange)

    def wait(self) -> Any:
        """What it brought."""
        arrived, self._under_way = self._under_way, None
        return arrived.wait()


class Dispatching(NamedTuple):
    """Tokens on the wires: what the stage ``dispatch`` gives.

    Args:
        ticket: empty; stands for them in the graph.
        crossing: brings them.
    """

    ticket: Float[Tensor, "0 D"]
    crossing: Crossing


class ExpertParallel(Operations):
    """The plain operations, with dispatch and combine as all-to-alls.

    Dispatch carries FP8 where the recipe computes in it: E4M3 values in tiles of 1 x 128 with power-of-two scales,
    which the experts' first product makes of them anyway, so that no bit is lost (paper §3.3.3). Combine and all
    gradients travel in the model's dtype, gate values in theirs.

    Differs from the paper: ∂L/∂y goes to the experts in the model's dtype, where V3 sends it in FP8 too; the weights'
    gradient would be quantised twice.

    Args:
        exchange: between the ranks that share the experts. wires: carry it out. fp8: dispatch in FP8.
        label: of the micro-batch, for the trace.

    Attributes:
        received: visits of each expert that this rank holds, by the experts' module, since somebody cleared it.
    """

    name = "expert parallel"

    def __init__(self, exchange: ExpertAllToAll, wires: Wires, fp8: bool = False, label: str = "") -> None:
        self.exchange, self.wires, self.fp8, self.label = exchange, wires, fp8, label
        self.received: dict[nn.Module, Tensor] = {}

    def of(self, label: str) -> ExpertParallel:
        """The same for another micro-batch."""
        other = copy.copy(self)
        other.label = label
        return other

    def dispatch(
        self,
        experts: nn.Module,
        x: Float[Tensor, "N D"],
        indices: Int[Tensor, "N A"],
        weights: Float[Tensor, "N A"],
    ) -> Dispatching:
        """Launch the tokens.

        Raises:
            InputError: somebody changed the experts' module, whose weights are spread over ranks.
        """
        if not self.intact(experts, Experts):
            raise InputError(
                f"experts: {type(experts).__name__} was changed or hooked, expected the plain {Experts.__name__}, "
                "which alone can be spread over ranks; use ep=1"
            )
        crossing = Crossing(self)
        return Dispatching(_Dispatch.apply(x, weights, indices, crossing), crossing)

    def experts(self, experts: nn.Module, sent: Dispatching) -> Float[Tensor, "0 D"]:
        """Wait for the tokens, answer them, launch each row's weighted sum over the experts of this rank."""
        rows, gates = _Arrive.apply(sent.ticket, sent.crossing)
        route = sent.crossing.route
        self.received[experts] = self.received.get(experts, 0) + route.counts
        answers = experts.answer(rows.index_select(0, route.row), route.counts)
        weighted = answers * gates[route.row, route.slot].to(answers.dtype)[:, None]
        return _Depart.apply(torch.zeros_like(rows).index_add(0, route.row, weighted), sent.crossing)

    def combine(self, answers: Float[Tensor, "0 D"], sent: Dispatching) -> Float[Tensor, "N D"]:
        """Wait for the answers."""
        return _Combine.apply(answers, sent.crossing)

    # ---- what travels ----------------------------------------------------------------------------------

    def packed(self, x: Float[Tensor, "N D"]) -> Tensor:
        """Tokens as they are dispatched: as they are, or bytes [N, D + 4 · ceil(D/128)], which gloo takes for FP8."""
        if not self.fp8:
            return x
        values, scales = along_rows(x, power_of_two=True)
        return torch.cat([part.contiguous().view(torch.uint8) for part in (values, scales)], 1)

    def unpacked(self, sent: Tensor, like: Tensor) -> Float[Tensor, "R D"]:
        """The inverse, in the dtype of the tokens."""
        if not self.fp8:
            return sent
        d = like.shape[1]
        values, scales = sent[:, :d].contiguous(), sent[:, d:].contiguous()
        operand = Operand(values.view(torch.float8_e4m3fn), scales.view(torch.float32))
        return restored(operand, like.dtype)


class _Dispatch(torch.autograd.Function):
    """Forward: launch tokens and gate values. Backward: their gradients have come home."""

    @staticmethod
    def forward(ctx, x, weights, indices, crossing):
        ctx.crossing = crossing
        parallel, packed = crossing.parallel, crossing.parallel.packed(x)
        exchange = parallel.exchange

        def go():
            crossing.route = route = exchange.route(indices)
            sent = exchange.outward(packed, route, DISPATCH)
            return parallel.unpacked(sent, x), exchange.outward(weights, route)

        crossing.launch(DISPATCH, go)
        return x.new_empty(0, x.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, ticket):
        return *ctx.crossing.wait(), None, None


class _Arrive(torch.autograd.Function):
    """Forward: the tokens are here. Backward: launch their gradients."""

    @staticmethod
    def forward(ctx, ticket, crossing):
        ctx.crossing = crossing
        return crossing.wait()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_rows, grad_gates):
        crossing = ctx.crossing
        exchange, route = crossing.parallel.exchange, crossing.route

        def go():
            home = exchange.homeward(grad_rows, route, DISPATCH + BACKWARD)
            return home, exchange.homeward(grad_gates, route)

        crossing.launch(DISPATCH + BACKWARD, go)
        return grad_rows.new_empty(0, grad_rows.shape[1]), None


class _Depart(torch.autograd.Function):
    """Forward: launch the answers. Backward: their gradients are here."""

    @staticmethod
    def forward(ctx, answers, crossing):
        ctx.crossing = crossing
        exchange, route = crossing.parallel.exchange, crossing.route
        crossing.launch(COMBINE, lambda: exchange.homeward(answers, route, COMBINE))
        return answers.new_empty(0, answers.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, ticket):
        return ctx.crossing.wait(), None


class _Combine(torch.autograd.Function):
    """Forward: the answers are home. Backward: launch their gradients."""

    @staticmethod
    def forward(ctx, ticket, crossing):
        ctx.crossing = crossing
        return crossing.wait()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        crossing = ctx.crossing
        exchange, route, grad = crossing.parallel.exchange, crossing.route, grad.contiguous()
        crossing.launch(COMBINE + BACKWARD, lambda: exchange.outward(grad, route, COMBINE + BACKWARD))
        return grad.new_empty(0, grad.shape[1]), None
