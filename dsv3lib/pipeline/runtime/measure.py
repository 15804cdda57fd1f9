"""What each piece of a model costs here, in processor time: for a cut into stages that are really equally long.

Operations are a poor guide on a small model, where norms, routing and the loss take as long as the products. So each
piece runs by the very code that the engine runs, forward, backward for inputs, and weights.
"""

from __future__ import annotations

import time
from statistics import median
from typing import NamedTuple

import torch

from ...checks import require_integer
from ...linear import DeferredWeightGradients, set_recipe
from ...model import DeepSeekV3
from .chunk import MicroBatch, Pass, finish
from .layout import Part


class PieceSeconds(NamedTuple):
    """Processor time of one micro-batch in one piece of the model, in seconds.

    Args:
        name: "embedding and block 0 (dense)", "block 3 (experts)", "head, loss and MTP".
        forward: F. inputs: I. weights: W.
    """

    name: str
    forward: float
    inputs: float
    weights: float

    @property
    def total(self) -> float:
        """F + I + W."""
        return self.forward + self.inputs + self.weights


def piece_seconds(model: DeepSeekV3, batch: MicroBatch, repeats: int = 5) -> list[PieceSeconds]:
    """Measure every piece between which the model can be cut, the median of several runs.

    Ranks must cut alike: let one of them measure, and hand its figures to all.

    Args:
        model: whole; its weights and gradients stay as they are.
        batch: a micro-batch of the run's size.
        repeats: runs of each piece, one more to warm up.

    Returns:
        one for each block, the first with the embedding, then one for head, loss and MTP chain.
    """
    require_integer("repeats", repeats, 1)
    recipe, kept = model.recipe, [parameter.grad for parameter in model.parameters()]
    deferred = DeferredWeightGradients(recipe)
    set_recipe(model, deferred)
    try:
        count = model.config.num_hidden_layers
        names = [
            f"{'embedding and ' * (i == 0)}block {i} ({'experts' if i in model.config.moe_layers else 'dense'})"
            for i in range(count)
        ]
        parts = [Part((i,), first=i == 0, last=False) for i in range(count)] + [Part((), first=False, last=True)]
        names.append("head, loss and MTP" if model.config.num_nextn_predict_layers else "head and loss")
        return [
            _measured(name, model, part, batch, deferred, repeats)
            for name, part in zip(names, parts, strict=True)
        ]
    finally:
        set_recipe(model, recipe)
        for parameter, grad in zip(model.parameters(), kept, strict=True):
            parameter.grad = grad


def _measured(
    name: str, model: DeepSeekV3, part: Part, batch: MicroBatch, deferred: DeferredWeightGradients, repeats: int
) -> PieceSeconds:
    weight = model.model.embed_tokens.weight
    generator = torch.Generator().manual_seed(0)
    like = torch.randn(*batch.input_ids.shape, weight.shape[1], generator=generator).to(weight)
    runs = []
    for _ in range(repeats + 1):
        for parameter in model.parameters():  # each run adds to no gradient but its own
            parameter.grad = None
        clock = [time.thread_time()]
        one = Pass(model, part, batch, model.loss_weights, 1.0)
        finish(one.forward(None if part.first else like))
        clock.append(time.thread_time())
        finish(one.backward(None if part.last else like))
        later = deferred.take()
        clock.append(time.thread_time())
        later.run()
        clock.append(time.thread_time())
        runs.append([after - before for before, after in zip(clock, clock[1:], strict=False)])
    return PieceSeconds(name, *(median(column) for column in zip(*runs[1:], strict=True)))
