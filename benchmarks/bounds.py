"""What the machine's limits allow: the least work of each column over the matrix peak and the bandwidth."""

from __future__ import annotations

from dataclasses import dataclass

from dsv3lib import DeepSeekV3, ModelConfig
from dsv3lib.model.costs import attention_flops_per_cached_token, forward_flops, training_flops

FP32_BYTES = 4


@dataclass(frozen=True)
class Limits:
    """The machine: FP32 matrix peak in FLOP/s, copy bandwidth in bytes/s (read and written)."""

    flops: float
    bandwidth: float


def prefill_seconds(config: ModelConfig, tokens: int, limits: Limits) -> float:
    """All matrix products of the forward pass at the peak; attention is causal, half of the square."""
    return tokens * sum(forward_flops(config, (tokens + 1) // 2).values()) / limits.flops


def train_seconds(config: ModelConfig, batch: int, tokens: int, limits: Limits) -> float:
    """All matrix products of forward and backward at the peak."""
    return training_flops(config, batch * tokens, (tokens + 1) // 2) / limits.flops


def decode_seconds(model: DeepSeekV3, context: int, limits: Limits) -> float:
    """The larger of two: the active weights and the cache, each read once; attention's products at the peak."""
    cfg = model.config
    weights = model.parameter_counts()["active"]
    cached = context * cfg.num_hidden_layers * cfg.latent_dim
    reading = (weights + cached) * FP32_BYTES / limits.bandwidth
    per_cached = attention_flops_per_cached_token(cfg, "absorbed") * cfg.num_hidden_layers
    return max(reading, (2 * weights + context * per_cached) / limits.flops)
