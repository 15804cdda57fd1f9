"""What the model gives: logits, losses by part, and where each token was sent."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass
class ModelOutput:
    """What one forward pass gives.

    Args:
        logits: [B, T, V], position i scores token i + 1.
        loss: scalar: main + λ/D Σ MTP + balance; ``None`` without labels.
        losses: its parts as scalars in nats per token: "main", "mtp_1" … "mtp_D", "balance" (α applied).
        mtp_logits: one [B, T−k, V] per depth k, position i scores token i + k + 1; empty unless asked for.
        hidden: [B, T, D], normalised, the head's input and the MTP chain's start.
        expert_indices: per mixture layer (``config.moe_layers``) the chosen experts, Int64 [B, T', A];
            ``None`` where an MTP module did not run.
        valid: [B, T], which positions are tokens and no padding; ``None`` means all.
        expert_load: Int64 [layers, E], visits per expert, zeros where an MTP module did not run.
    """

    logits: Float[Tensor, "B T vocab"]
    hidden: Float[Tensor, "B T D"]
    loss: Float[Tensor, ""] | None = None
    losses: dict[str, Float[Tensor, ""]] = field(default_factory=dict)
    mtp_logits: list[Float[Tensor, "B Tk vocab"]] = field(default_factory=list)
    expert_indices: list[Int[Tensor, "B Tk A"] | None] = field(default_factory=list)
    n_routed_experts: int = 0
    valid: Bool[Tensor, "B T"] | None = None

    @property
    def expert_load(self) -> Int[Tensor, "layers E"]:
        """Visits per mixture layer and expert; each row sums to tokens x A, padding not counted."""
        loads = [
            torch.zeros(self.n_routed_experts, dtype=torch.int64, device=self.logits.device)
            if indices is None
            else torch.bincount(self._of_tokens(indices).flatten(), minlength=self.n_routed_experts)
            for indices in self.expert_indices
        ]
        return torch.stack(loads) if loads else torch.zeros(0, self.n_routed_experts, dtype=torch.int64)

    def _of_tokens(self, indices: Int[Tensor, "B Tk A"]) -> Int[Tensor, "*visits A"]:
        valid = self.valid_at(indices.shape[1])
        return indices if valid is None else indices[valid]

    def valid_at(self, width: int) -> Bool[Tensor, "B width"] | None:
        """``valid`` for a layer of so many positions: at depth k an MTP module's position i looks at token i + k."""
        return None if self.valid is None else self.valid[:, self.valid.shape[1] - width :]
