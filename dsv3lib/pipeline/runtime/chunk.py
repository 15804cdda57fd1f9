"""One micro-batch's pass through one stage of the model, cut at the borders of its blocks' stages.

``forward`` and ``backward`` are generators that stop after each stage of a block, so that an overlapped pair can take
turns. Backward computes gradients for inputs alone; those of weights wait in the model's queue (the actions I and W).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...layers.operations import PLAIN_OPERATIONS, Operations
from ...layers.router import balance_loss
from ...layers.step import Step
from ...linear import WeightGradients
from ...model import DeepSeekV3
from ...model.loss import LossWeights, add_losses
from ...model.outputs import ModelOutput
from ...model.stages import STAGES, StagedBlock, embed, head
from ...recompute import Recompute
from .layout import Part

# Forward and backward stages of an overlapped pair: combine↤, attention, dispatch, experts↤, experts, dispatch↤,
# attention↤, combine. Between what sends tokens and what needs them stands arithmetic of the other (Figure 4).
PAIR = "bffbfbbf"


class MicroBatch(NamedTuple):
    """A pipeline's unit of work.

    Args:
        input_ids: tokens.
        labels: targets.
        document_ids: which document a token is of, or ``None``.
    """

    input_ids: Int[Tensor, "B T"]
    labels: Int[Tensor, "B T"]
    document_ids: Int[Tensor, "B T"] | None = None


class Pass:
    """A micro-batch in one stage.

    Args:
        model: holds the stage's layers.
        part: which they are.
        batch: the micro-batch.
        weights: of the loss's parts.
        share: what the micro-batch's loss counts in the step's, 1 / (number of micro-batches).
        backend: who computes; expert parallelism where experts lie on several ranks (``Engine.backend``).
        label: of the micro-batch, for the trace.

    Attributes:
        output: the stage's last activation, cut off; ``None`` at the model's end.
        grad_input: ∂L/∂x after backward; ``None`` at the model's beginning.
        losses: at the end, "main", "mtp_k"; everywhere "balance" of each mixture layer, by its index.
        loads: visits of each row's tokens to each expert, [B, E], by the layer's index.
        later: the weights' products, between I and W.
        stages: (label and stage, start, end) of each stage of a block, "↤" for backward; seconds of the wall clock.
    """

    def __init__(
        self,
        model: DeepSeekV3,
        part: Part,
        batch: MicroBatch,
        weights: LossWeights,
        share: float,
        backend: Operations = PLAIN_OPERATIONS,
        label: str = "",
    ) -> None:
        self.backend, self.label = backend, label
        self.stages: list[tuple[str, float, float]] = []
        self.model, self.part, self.batch, self.weights, self.share = model, part, batch, weights, share
        self.output: Tensor | None = None
        self.grad_input: Tensor | None = None
        self.losses: dict[str, Tensor] = {}
        self.balances: dict[int, Tensor] = {}
        self.loads: dict[int, Tensor] = {}
        self.later: WeightGradients | None = None
        self._runs: list[StagedBlock] = []
        self._embedded: Tensor | None = None
        self._balance: Tensor | None = None
        self._loss: Tensor | None = None
        self._leaf: Tensor | None = None

    def forward(self, x: Float[Tensor, "B T D"] | None) -> Iterator[str]:
        """Run the stage, yielding after each stage of a block.

        Args:
            x: the activation of the stage before; nothing at the model's beginning.
        """
        if self.part.first:
            self._embedded = x = embed(self.model, self.batch.input_ids)
        recompute = Recompute() if self.model.recompute else None
        step = Step(self.model.rope.table(x.shape[1], x), recompute=recompute, backend=self.backend)
        for layer in self.part.blocks:
            run = StagedBlock(self.model.model.layers[layer], x, step)
            self._runs.append(run)
            for _ in STAGES:
                yield self._timed(run.forward)
            x, routing = run.output
            if routing is not None:
                self._count(layer, routing.indices)
                self._weigh(layer, routing)
        if self.part.last:
            self._end(x, step)
        else:
            self.output = x.detach()

    def _timed(self, stage: Callable[..., str], *grad: Tensor | None) -> str:
        begun = time.time()
        name = stage(*grad) + ("↤" if grad else "")
        self.stages.append((f"{self.label} {name}", begun, time.time()))
        return name

    def _weigh(self, layer: int, routing) -> None:
        if not self.weights.balance:
            return
        top_k = self.model.config.num_experts_per_tok
        loss = balance_loss(routing.scores, top_k, self.weights.balance, self.weights.balance_over)
        self.balances[layer] = loss.detach()
        self._balance = loss if self._balance is None else self._balance + loss

    def _count(self, layer: int, indices: Tensor) -> None:
        visits = indices.flatten(1)
        rows = visits.new_zeros(len(visits), self.model.config.n_routed_experts)
        self.loads[layer] = rows.scatter_add_(1, visits, torch.ones_like(visits))

    def _end(self, x: Tensor, step: Step) -> None:
        """Head, MTP chain and loss."""
        model, batch = self.model, self.batch
        self._leaf = x.detach().requires_grad_()
        recompute = step.recompute
        if recompute is not None:
            with recompute.saving():
                out, routings = self._logits(step)
        else:
            out, routings = self._logits(step)
        ran = [routing for routing in routings if routing is not None]
        add_losses(out, batch.labels, batch.document_ids, ran, model.config.num_experts_per_tok, self.weights)
        for depth, routing in enumerate(routings):
            if routing is not None:
                layer = model.config.num_hidden_layers + depth
                self._count(layer, routing.indices)
                if self.weights.balance:
                    self.balances[layer] = balance_loss(
                        routing.scores.detach(), model.config.num_experts_per_tok, self.weights.balance,
                        self.weights.balance_over,
                    )  # fmt: skip
        self.losses = {name: part.detach() for name, part in out.losses.items() if name != "balance"}
        self._loss = out.loss

    def _logits(self, step: Step):
        model = self.model
        hidden, logits = head(model, self._leaf, step)
        out = ModelOutput(logits, hidden, n_routed_experts=model.config.n_routed_experts)
        routings = []
        if model.config.num_nextn_predict_layers:
            out.mtp_logits, routings = model.mtp_chain(hidden, embed(model, self.batch.input_ids), step)
        return out, routings

    def backward(self, grad: Float[Tensor, "B T D"] | None) -> Iterator[str]:
        """Gradients for inputs, yielding after each stage of a block.

        Args:
            grad: ∂L/∂y from the stage after; nothing at the model's end, where the loss is.
        """
        if self._balance is not None:  # leaves its gradient in the blocks' affinities
            (self._balance * self.share).backward()
        if self.part.last:
            (self._loss * self.share).backward()
            grad = self._leaf.grad
        while self._runs:
            run = self._runs.pop()
            for _ in STAGES:
                yield self._timed(run.backward, grad)
            grad = run.grad_input
        if self.part.first:
            self._embedded.backward(grad)
        else:
            self.grad_input = grad
        self._loss = self._leaf = self._embedded = self._balance = None


def finish(stages: Iterator[str]) -> None:
    """Run one pass to its end."""
    for _ in stages:
        pass


def overlap(forward: Iterator[str], backward: Iterator[str]) -> None:
    """Run an overlapped pair, stage by stage in turns (paper §3.2.1, Figure 4).

    Args:
        forward: of one micro-batch. backward: of another.
    """
    left = {"f": forward, "b": backward}
    for who in cycle(PAIR):
        if who in left and next(left[who], None) is None:
            del left[who]
        if not left:
            return
