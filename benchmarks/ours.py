"""Our side of the CPU comparison: the same four calls as ``peer.Peer``."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3lib import DeepSeekV3, LatentCache, ModelConfig
from dsv3lib.memory import allocate

# The size at which both sides are compared: small enough for two cores, large enough that matrix products
# matter. MTP and the balance loss are off, because transformers trains neither.
CONFIG = ModelConfig(
    vocab_size=1024, hidden_size=256, intermediate_size=704, moe_intermediate_size=128, num_hidden_layers=4,
    first_k_dense_replace=1, num_attention_heads=8, n_routed_experts=16, n_shared_experts=1,
    num_experts_per_tok=4, n_group=4, topk_group=2, kv_lora_rank=64, q_lora_rank=96, qk_nope_head_dim=32,
    qk_rope_head_dim=16, v_head_dim=32, max_position_embeddings=16384, num_nextn_predict_layers=0,
    aux_loss_alpha=0.0, initializer_range=0.05,
)  # fmt: skip


class Ours:
    """dsv3lib's model with seeded weights.

    Args:
        config: sizes. seed: of the weights and of the routing biases.
    """

    def __init__(self, config: ModelConfig, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.device("meta"):
            self.model = DeepSeekV3(config)
        allocate(self.model, torch.float32)  # as from_pretrained does
        self.model.initialize(generator)
        for router in self.model.routers():  # biases of a trained model's size, so that they decide something
            router.e_score_correction_bias.normal_(0.0, 0.05, generator=generator)

    def cache(self) -> LatentCache:
        """A new, empty cache."""
        return LatentCache(self.model.config)

    def logits(self, input_ids: Tensor, cache: LatentCache) -> Tensor:
        """Scores of all given tokens, which the cache takes in."""
        return self.model(input_ids, cache=cache).logits

    def train_step(self, input_ids: Tensor) -> Tensor:
        """Forward and backward; returns the loss, gradients are left on the parameters."""
        self.model.zero_grad(set_to_none=True)
        loss = self.model(input_ids, labels=input_ids).loss
        loss.backward()
        return loss.detach()
