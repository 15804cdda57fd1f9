"""The solutions of 01's exercises give what the library gives."""

from __future__ import annotations

import pytest
import torch

from dsv3lib.config import PRESETS, ModelConfig
from dsv3lib.course.exercises.mla.attention import attend_absorbed, attend_expanded
from dsv3lib.course.exercises.mla.compress import compress
from dsv3lib.course.exercises.mla.costs import break_even, fp8_cache_bytes
from dsv3lib.layers.attention import MultiHeadLatentAttention, Step
from dsv3lib.layers.rope import RotaryEmbedding, apply_rope
from dsv3lib.model.costs import attention_flops_per_cached_token


@torch.no_grad()
def test_compress_and_both_attentions_are_the_library_s() -> None:
    c = ModelConfig.preset("nano")
    layer = MultiHeadLatentAttention(c, 0).double()
    x = torch.randn(1, 9, c.hidden_size, dtype=torch.float64)
    angles = RotaryEmbedding(c).table(9, x)
    latents = layer.latents(x, Step(angles))
    down, position = layer.kv_a_proj_with_mqa.weight.split([c.kv_lora_rank, c.qk_rope_head_dim])
    mine = compress(x[0], down, position, layer.kv_a_layernorm, lambda k: apply_rope(k, angles))
    torch.testing.assert_close(mine, latents[0])
    q, q_rope = layer.queries(x, Step(angles))[0, :, -1].split(
        [c.qk_nope_head_dim, c.qk_rope_head_dim], -1
    )
    up = layer.kv_b_proj.weight.unflatten(0, (c.num_attention_heads, -1))
    w_uk, w_uv = up.split([c.qk_nope_head_dim, c.v_head_dim], 1)
    inputs = (q, q_rope, *mine.split([c.kv_lora_rank, c.qk_rope_head_dim], -1), w_uk, w_uv)
    whole = layer(x, Step(angles))[0, -1]
    for attend in (attend_expanded, attend_absorbed):
        torch.testing.assert_close(layer.o_proj(attend(*inputs).flatten()), whole)


def test_the_fp8_cache_is_656_bytes_at_v3_s_sizes() -> None:
    assert fp8_cache_bytes(512, 64, 128) == 656


@pytest.mark.parametrize("preset", PRESETS)
def test_break_even_is_where_the_library_s_counts_cross(preset: str) -> None:
    c = ModelConfig.preset(preset)
    rank, width = c.kv_lora_rank, c.qk_nope_head_dim + c.v_head_dim
    unpack = 2 * rank * c.num_attention_heads * width
    one = {form: attention_flops_per_cached_token(c, form) for form in ("expanded", "absorbed")}
    queries = break_even(c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, rank)
    for n, expanded_is_cheaper in ((queries, True), (queries - 1, False)):
        assert (unpack + n * (one["expanded"] - unpack) < n * one["absorbed"]) is expanded_is_cheaper
