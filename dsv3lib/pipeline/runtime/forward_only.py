"""Forward passes through the pipeline without gradients, for validation."""

from __future__ import annotations

import torch
from torch import Tensor

from .chunk import MicroBatch, Pass, finish
from .engine import Engine
from .experts import backend_of

_TAG = 0  # the engine's own tags begin at 1


@torch.no_grad()
def forward_only(engine: Engine, batch: MicroBatch) -> tuple[dict[str, float], dict[int, Tensor]]:
    """One micro-batch through all stages, in the first direction; every rank calls it with the same one.

    Replicas do the same beside one another, and the first one's result counts.

    Args:
        engine: of this rank. batch: what goes through.

    Returns:
        The loss's parts "main" and "mtp_k", and by layer each expert's visits [E]; the same on every rank.
    """
    places, links, model = engine.schedule.routes[0].places, engine.links, engine.model
    layout, replica = engine.layout, engine.replica
    x: Tensor | None = None
    losses: dict[str, float] = {}
    loads: dict[int, Tensor] = {}
    for depth, (stage, chunk) in enumerate(places):
        if stage != engine.stage:
            continue
        if depth and places[depth - 1][0] != stage:
            dtype, device = next(iter(engine.parameters.values())).dtype, batch.input_ids.device
            like = torch.empty(*batch.input_ids.shape, model.config.hidden_size, dtype=dtype, device=device)
            x = links.receive(like, layout.rank(places[depth - 1][0], replica), _TAG)
        run = Pass(model, engine.parts[chunk], batch, model.loss_weights, 1.0, backend_of(engine.experts))
        finish(run.forward(x))
        x = run.output
        losses |= {name: part.item() for name, part in run.losses.items()}
        loads |= {layer: counted.sum(0) for layer, counted in run.loads.items()}
        if depth + 1 < len(places) and places[depth + 1][0] != stage:
            links.send(x, layout.rank(places[depth + 1][0], replica), _TAG)
    links.flush()
    found = links.gather_objects((losses, loads))
    every = [found[layout.rank(stage, 0)] for stage in range(layout.pp)]
    return (
        {name: value for one, _ in every for name, value in one.items()},
        dict(sorted((layer, load) for _, one in every for layer, load in one.items())),
    )
