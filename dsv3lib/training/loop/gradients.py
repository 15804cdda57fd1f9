"""One step's forward and backward pass: losses, clipped gradients, and the load of every expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

from ...model import DeepSeekV3
from ...model.loss import LossWeights
from ...model.outputs import ModelOutput
from ..text.data import Batch
from .balance import domain_load


class Gradients(NamedTuple):
    """What a forward and backward pass gave; the gradients, clipped, lie in the parameters.

    Args:
        loss: the whole. losses: its parts. norm: of all gradients, before they were clipped.
        load: visits by mixture layer and expert, over the whole step. domain_load: the same by text domain.
        more: further fields of the step's record.
    """

    loss: float
    losses: dict[str, float]
    norm: float
    load: Int64[Tensor, "layers E"]
    domain_load: dict[str, list[list[int]]]
    more: Mapping[str, list] = MappingProxyType({})


def gradients(
    model: DeepSeekV3, batch: Batch, weights: LossWeights, limit: float | int, domains: Sequence[str]
) -> Gradients:
    """Forward, backward and clipping by the global norm (paper §4.2: 1.0).

    Args:
        model: its parameters get gradients. batch: the whole step's. weights: of the loss's parts.
        limit: the largest norm of all gradients together. domains: names of the text domains.

    Raises:
        InputError: a router met NaN.
    """
    device = next(model.parameters()).device
    out = model(
        batch.input_ids.to(device),
        labels=batch.labels.to(device),
        document_ids=batch.document_ids.to(device),
        loss_weights=weights,
    )
    return finish(model, out, out.losses, batch, limit, domains)


def finish(
    model: DeepSeekV3,
    out: ModelOutput,
    losses: Mapping[str, Tensor],
    batch: Batch,
    limit: float | int,
    domains: Sequence[str],
) -> Gradients:
    """Backward from ``out.loss`` and clipping, and what a step's record wants to know.

    Args:
        model: its parameters get gradients. out: what it made of the batch. losses: the parts of the loss.
        batch, limit, domains: as for ``gradients``.
    """
    out.loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit).item()
    load = out.expert_load.cpu()
    by_domain = domain_load(out.expert_indices, batch.domain_ids, len(domains), load.shape[-1])
    parts = {name: part.item() for name, part in losses.items()}
    return Gradients(out.loss.item(), parts, norm, load, dict(zip(domains, by_domain.tolist(), strict=True)))
