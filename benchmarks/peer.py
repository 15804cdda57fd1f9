"""The peer on the CPU: transformers' DeepSeek-V3 with our weights, in each of its backends.

It stacks experts as we do and names everything as the checkpoint does, so our state goes in unchanged.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dsv3lib import DeepSeekV3, ModelConfig

# What runs eagerly on a CPU. flex_attention must be compiled, paged attention is for serving, and the other
# expert kernels want a GPU.
EXPERTS = ("grouped_mm", "eager", "batched_mm")
ATTENTION = ("sdpa", "eager")


@dataclass(frozen=True)
class Backend:
    """One way of transformers to run: which experts' implementation, which attention."""

    experts: str
    attention: str

    def __str__(self) -> str:
        return f"{self.experts} + {self.attention}"


def backends() -> list[Backend]:
    """All of them, the likely best first."""
    return [Backend(e, a) for e in EXPERTS for a in ATTENTION]


class Peer:
    """transformers' model with the weights of ``ours``.

    Args:
        ours: the model whose weights it takes.
        dtype: of its weights; the routing biases stay in FP32, as ours do.
    """

    def __init__(self, ours: DeepSeekV3, dtype: torch.dtype = torch.float32) -> None:
        self.model = build(ours.config)
        self.model.load_state_dict(ours.state_dict())
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(dtype)

    def use(self, backend: Backend) -> None:
        """Run with this backend from now on."""
        self.model.set_experts_implementation(backend.experts)
        self.model.set_attn_implementation(backend.attention)

    def cache(self) -> Any:
        """A new, empty cache."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def logits(self, input_ids: Tensor, cache: Any) -> Tensor:
        """Scores of all given tokens, which the cache takes in."""
        return self.model(input_ids=input_ids, past_key_values=cache, use_cache=True).logits

    def train_step(self, input_ids: Tensor) -> Tensor:
        """Forward and backward; returns the loss, gradients are left on the parameters."""
        self.model.zero_grad(set_to_none=True)
        loss = self.model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        return loss.detach()


def build(config: ModelConfig) -> Any:
    """transformers' model of this configuration, weights at random."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, logging

    logging.set_verbosity_error()
    fields = asdict(config)
    for name in ("rope_scaling", "num_nextn_predict_layers", "mtp_loss_weight", "aux_loss_alpha"):
        fields.pop(name)
    return DeepseekV3ForCausalLM(DeepseekV3Config(**fields)).to(torch.float32)
