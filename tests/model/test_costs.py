"""Counted costs are held against what torch counts while the model runs, and against published figures."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from dsv3lib import DeepSeekV3, LatentCache, ModelConfig
from dsv3lib.model.costs import (
    attention_flops_per_cached_token,
    cache_bytes_per_token,
    forward_flops,
    training_flops,
)

NANO = ModelConfig.preset("nano")
V3 = ModelConfig.preset("v3-671b")


def counted_by_torch(config: ModelConfig, tokens: int) -> int:
    """Operations of the matrix products of one forward pass, attention's core left out."""
    model = DeepSeekV3(config.replace(num_nextn_predict_layers=0)).eval()
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids)
    by_op = counter.get_flop_counts()["Global"]
    return sum(flops for op, flops in by_op.items() if "attention" not in str(op) and "bmm" not in str(op))


@given(
    heads=st.integers(1, 4),
    q_rank=st.sampled_from([None, 24]),
    dense=st.integers(0, 3),
    active=st.integers(1, 4),
    tokens=st.sampled_from([3, 8]),
)
def test_forward_flops_are_what_torch_counts(heads, q_rank, dense, active, tokens):
    config = NANO.replace(
        num_attention_heads=heads, q_lora_rank=q_rank, first_k_dense_replace=dense, num_experts_per_tok=active,
        vocab_size=64, pad_token_id=None,
    )  # fmt: skip
    parts = forward_flops(config, context=1)
    products = sum(flops for part, flops in parts.items() if part != "attention_core")
    assert products * tokens == counted_by_torch(config, tokens)


def test_a_wrong_count_is_seen():
    parts = forward_flops(NANO, context=1)
    assert sum(parts.values()) * 8 != counted_by_torch(NANO, 8)  # the core is not among torch's products here


def test_figures_of_the_671b_model():
    expanded = attention_flops_per_cached_token(V3, "expanded")
    absorbed = attention_flops_per_cached_token(V3, "absorbed")
    assert round(expanded / 1e6, 1) == 33.6
    assert round(absorbed / 1e6, 3) == 0.279
    assert round(expanded / absorbed) == 121
    assert cache_bytes_per_token(V3) == 70_272
    # 2 operations for each of the 36.6B parameters that a token meets (biases of the router are not products).
    products = sum(flops for part, flops in forward_flops(V3, 1).items() if part != "attention_core")
    with torch.device("meta"):
        active = DeepSeekV3(V3).parameter_counts()["active"]
    assert products / (2 * active) == pytest.approx(1.0, abs=1e-3)


def test_cached_bytes_are_those_of_a_real_cache():
    model, cache = DeepSeekV3(NANO).eval(), LatentCache(NANO)
    with torch.no_grad():
        model(torch.zeros(2, 5, dtype=torch.int64), cache=cache)
    assert cache.nbytes == 2 * 5 * cache_bytes_per_token(NANO, bytes_per_value=4)


def test_training_is_three_forwards():
    assert training_flops(NANO, tokens=10, context=7) == 30 * sum(forward_flops(NANO, 7).values())
