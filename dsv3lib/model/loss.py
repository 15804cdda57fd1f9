"""The loss: cross-entropy of the head and of each MTP depth, and what the balance of experts adds.

L = L_main + λ/D Σ_k L_k + α Σ_layers balance    (paper Eqs. 17, 24 and 25)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ..layers.experts import Routing
from ..layers.router import balance_loss
from .inputs import IGNORED
from .outputs import ModelOutput


@dataclass(frozen=True)
class LossWeights:
    """How much each part of the loss counts.

    Args:
        mtp: λ, shared by the D depths.
        balance: α of the auxiliary loss; 0 leaves it out.
        balance_over: what it asks to be balanced, each "sequence" (Eqs. 17 to 20) or the whole "batch" (§4.5.3).
    """

    mtp: float
    balance: float
    balance_over: str = "sequence"


def add_losses(
    out: ModelOutput,
    labels: Int[Tensor, "B T"],
    document_ids: Int[Tensor, "B T"] | None,
    routings: list[Routing],
    experts_per_token: int,
    weights: LossWeights,
) -> None:
    """Write the loss and its parts into a model's output.

    Args:
        out: with the logits of all depths.
        labels: the tokens' ids, ``IGNORED`` where there is no target.
        document_ids: a label in another document than its position is ignored.
        routings: of the mixtures that ran.
        experts_per_token: K_r.
        weights: of the parts.
    """
    out.losses["main"] = next_token_loss(out.logits, labels, 1, document_ids)
    for k, logits in enumerate(out.mtp_logits, start=1):
        out.losses[f"mtp_{k}"] = next_token_loss(logits, labels, k + 1, document_ids)
    out.loss = out.losses["main"]
    if out.mtp_logits:
        depths = sum(out.losses[f"mtp_{k}"] for k in range(1, len(out.mtp_logits) + 1))
        out.loss = out.loss + weights.mtp / len(out.mtp_logits) * depths
    if weights.balance and routings:
        out.losses["balance"] = sum(
            balance_loss(
                r.scores, experts_per_token, weights.balance, weights.balance_over, out.valid_at(r.scores.shape[1])
            )
            for r in routings
        )
        out.loss = out.loss + out.losses["balance"]


def next_token_loss(
    logits: Float[Tensor, "B Tk vocab"],
    labels: Int[Tensor, "B T"],
    ahead: int,
    document_ids: Int[Tensor, "B T"] | None = None,
) -> Float[Tensor, ""]:
    """Mean cross-entropy of position i's logits against the label ``ahead`` places on (Eq. 24).

    Args:
        logits: at least T − ahead positions are used.
        labels: the tokens' ids, ``IGNORED`` where there is no target.
        ahead: 1 for the main head, k + 1 at MTP depth k.
        document_ids: a label in another document than its position is ignored.

    Returns:
        Nats per target, at least FP32; 0 where there is no target at all.
    """
    n = max(labels.shape[1] - ahead, 0)
    target = labels[:, ahead:].long()
    if document_ids is not None:
        target = target.masked_fill(document_ids[:, ahead:] != document_ids[:, :n], IGNORED)
    # To give the last positions no target costs less than to cut their logits off, which copies the rest.
    target = F.pad(target, (0, logits.shape[1] - n), value=IGNORED)
    logits = logits.flatten(0, 1)
    if logits.element_size() < 4:
        logits = logits.float()
    total = F.cross_entropy(logits, target.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (target != IGNORED).sum().clamp(min=1)
