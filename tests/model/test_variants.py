"""MHA, GQA and MQA as measuring sticks: right attention, right decoding, right bytes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from dsv3lib.config import ModelConfig
from dsv3lib.errors import ConfigError
from dsv3lib.layers.rope import RotaryEmbedding, apply_rope
from dsv3lib.model.costs import cache_bytes_per_token
from dsv3lib.model.variants import GroupedQueryAttention, KeyValueCache, cached_layer_bytes

CONFIG = ModelConfig.preset("nano")


def one(kv_heads: int, tokens: int = 7) -> tuple[GroupedQueryAttention, torch.Tensor, torch.Tensor]:
    layer = GroupedQueryAttention(CONFIG, kv_heads).double()
    x = torch.randn(2, tokens, CONFIG.hidden_size, dtype=torch.float64)
    return layer, x, RotaryEmbedding(CONFIG).table(tokens, x)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@torch.no_grad()
def test_equals_attention_written_out_head_by_head(kv_heads: int) -> None:
    layer, x, turns = one(kv_heads)
    nope, width, value = CONFIG.qk_nope_head_dim, CONFIG.qk_head_dim, CONFIG.v_head_dim
    seen = torch.ones(7, 7, dtype=torch.bool).tril()
    heads = []
    for i in range(CONFIG.num_attention_heads):
        g = i * kv_heads // CONFIG.num_attention_heads
        q = F.linear(x, layer.q_proj.weight[i * width : (i + 1) * width])
        k = F.linear(x, layer.k_proj.weight[g * width : (g + 1) * width])
        v = F.linear(x, layer.v_proj.weight[g * value : (g + 1) * value])
        q, k = (torch.cat([r[..., :nope], apply_rope(r[..., nope:], turns)], -1) for r in (q, k))
        scores = (q @ k.mT * CONFIG.softmax_scale).masked_fill(~seen, float("-inf"))
        heads.append(scores.softmax(-1) @ v)
    torch.testing.assert_close(layer(x, turns), layer.o_proj(torch.cat(heads, -1)))


@given(kv_heads=st.sampled_from([1, 2, 4]), first=st.integers(1, 6))
@torch.no_grad()
def test_decoding_with_the_cache_equals_one_pass(kv_heads: int, first: int) -> None:
    layer, x, turns = one(kv_heads)
    cache = KeyValueCache()
    parts = [layer(x[:, :first], turns[:first], cache)]
    parts += [layer(x[:, t : t + 1], turns[t : t + 1], cache) for t in range(first, 7)]
    torch.testing.assert_close(torch.cat(parts, 1), layer(x, turns))
    assert len(cache) == 7


def test_an_empty_cache_holds_nothing() -> None:
    assert (len(KeyValueCache()), KeyValueCache().nbytes) == (0, 0)


@pytest.mark.parametrize("kv_heads", [0, 3, 8, -1])
def test_heads_that_cannot_be_shared_evenly_are_refused(kv_heads: int) -> None:
    with pytest.raises(ConfigError, match=rf"kv_heads: {kv_heads}, expected a divisor .*\(4\)"):
        GroupedQueryAttention(CONFIG, kv_heads)


def test_bytes_of_v3_are_those_of_the_paper_s_table() -> None:
    v3 = ModelConfig.preset("v3-671b")
    found = cached_layer_bytes(v3, tokens=3)
    key_and_value = v3.qk_head_dim + v3.v_head_dim
    assert found["MHA"] == 3 * 128 * key_and_value * 2
    assert found["GQA-8"] == 3 * 8 * key_and_value * 2
    assert found["MQA"] == 3 * key_and_value * 2
    assert found["MLA"] * 61 == 3 * cache_bytes_per_token(v3) == 3 * 70_272
    assert found["MHA"] / found["MLA"] == pytest.approx(71.1, abs=0.05)


def test_bytes_grow_with_the_tokens_and_the_width_of_a_value() -> None:
    few, many = (cached_layer_bytes(CONFIG, tokens=n) for n in (2, 10))
    wide = cached_layer_bytes(CONFIG, tokens=2, dtype=torch.float32)
    assert many == {name: 5 * size for name, size in few.items()}
    assert wide == {name: 2 * size for name, size in few.items()}


def test_a_grouping_that_does_not_divide_the_heads_is_left_out() -> None:
    assert list(cached_layer_bytes(CONFIG, tokens=1)) == ["MHA", "MQA", "MLA"]
