"""One transformer block: MLA, then a dense network or a mixture of experts, each behind its norm."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from ..config import ModelConfig
from .attention import MultiHeadLatentAttention, Step
from .experts import MLP, MixtureOfExperts, Routing
from .norm import RMSNorm
from .recompute import run


class Block(nn.Module):
    """x + MLA(norm x), then x + FFN(norm x) (paper §2.1, Figure 2).

    Args:
        config: sizes. layer: its index; the first ``first_k_dense_replace`` are dense, MTP modules count on
            from the last layer.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MultiHeadLatentAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        dense = layer < config.first_k_dense_replace
        self.mlp = MLP(config.hidden_size, config.intermediate_size) if dense else MixtureOfExperts(config)

    def forward(self, x: Float[Tensor, "B T D"], step: Step) -> tuple[Float[Tensor, "B T D"], Routing | None]:
        """The block's output and, for a mixture, how its tokens were routed."""
        attended = self.self_attn(run(step.recipes, self.input_layernorm, x), step)
        if step.recipes is None:
            h, x = self.post_attention_layernorm.of_sum(attended, x)
        else:  # the sum is kept, and only its norm is made again
            x = x + attended
            h = run(step.recipes, self.post_attention_layernorm, x)
        if isinstance(self.mlp, MLP):
            return x + self.mlp(h), None
        y, routing = self.mlp(h)
        return x + y, routing
