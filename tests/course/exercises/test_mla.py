"""The exercises of 01: solutions agree with the library, slips are named, and unusual right answers pass."""

from __future__ import annotations

import pytest
import torch

from dsv3lib.config import PRESETS, ModelConfig
from dsv3lib.course.exercises import mla
from dsv3lib.course.judge import judge
from dsv3lib.layers.attention import MultiHeadLatentAttention, Step
from dsv3lib.layers.rope import RotaryEmbedding
from dsv3lib.model.costs import attention_flops_per_cached_token, cache_bytes_per_token

BY_ID = {one.id: one for one in mla.EXERCISES}


@pytest.mark.parametrize("preset", PRESETS)
def test_counting_solutions_agree_with_the_library(preset: str) -> None:
    c = ModelConfig.preset(preset)
    layers, rank, rope = c.num_hidden_layers, c.kv_lora_rank, c.qk_rope_head_dim
    assert mla.cache_bytes(layers, rank, rope, 2) == cache_bytes_per_token(c)
    found = mla.decode_flops(c.num_attention_heads, c.qk_nope_head_dim, rope, c.v_head_dim, rank)
    assert found == tuple(attention_flops_per_cached_token(c, form) for form in ("expanded", "absorbed"))


@torch.no_grad()
def test_score_solutions_agree_with_the_library_s_attention() -> None:
    c = ModelConfig.preset("nano")
    layer = MultiHeadLatentAttention(c, 0).double()
    x = torch.randn(2, 9, c.hidden_size, dtype=torch.float64)
    step = Step(RotaryEmbedding(c).table(9, x))
    latents = layer.latents(x, step)
    q = layer.queries(x, step)[:, :, -1]
    q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
    c_kv, k_rope = latents.split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
    w_uk, w_uv = layer.kv_b_proj.weight.unflatten(0, (c.num_attention_heads, -1)).split(
        [c.qk_nope_head_dim, c.v_head_dim], 1
    )
    k_nope = torch.einsum("btc,hnc->bthn", c_kv, w_uk)
    scores = mla.attention_scores(q_nope, q_rope, k_nope, k_rope)
    absorbed = mla.absorbed_scores(q_nope, c_kv, w_uk) + torch.einsum("bhr,btr->bht", q_rope, k_rope)
    torch.testing.assert_close(absorbed * c.softmax_scale, scores)
    mixed = torch.einsum("bht,btc->bhc", scores.softmax(-1), c_kv)
    heads = torch.einsum("bhc,hvc->bhv", mixed, w_uv)
    torch.testing.assert_close(layer(x, step)[:, -1], layer.o_proj(heads.flatten(1)))


@pytest.mark.parametrize(
    ("key", "answer", "said"),
    [
        ("mla.1", lambda n, c, r, b: n * c * b, "rotary key is missing"),
        ("mla.1", lambda n, c, r, b: 2 * n * (c + r) * b, "nothing is kept twice"),
        ("mla.1", lambda n, c, r, b: (c + r) * b, "one layer"),
        ("mla.1", lambda n, c, r, b: n * (c + r), "not bytes"),
        ("mla.1", lambda n, c, r, b: str(n * (c + r) * b), "should be one number"),
        ("mla.2", mla._expanded_scores, "never builds"),
        ("mla.2", lambda q, c, w: mla.absorbed_scores(q, c, w).mT, "should have shape"),
        ("mla.2", lambda q, c, w: mla.absorbed_scores(q, c, w) * q.shape[-1] ** -0.5, "values are off"),
        ("mla.3", mla._unscaled, "scale is missing"),
        ("mla.3", lambda a, b, c, d: mla._unscaled(a, b, c, d) * a.shape[-1] ** -0.5, "only the"),
        ("mla.3", lambda a, b, c, d: mla.attention_scores(a, b, c, d).softmax(-1), "values are off"),
        ("mla.4", lambda *sizes: mla.decode_flops(*sizes)[::-1], "expanded count"),
        ("mla.4", lambda *sizes: mla.decode_flops(*sizes)[0], "eturn two numbers"),
        ("mla.4", lambda h, n, r, v, c: (2 * h * (n + r + v), 2 * h * (2 * c + r)), "expansion"),
    ],
)
def test_a_slip_is_named(key: str, answer: object, said: str) -> None:
    verdict = judge(BY_ID[key], answer)
    assert verdict.state == "wrong" and said in verdict.text, verdict.text


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        ("mla.1", lambda n, c, r, b: torch.tensor(n * (c + r) * b)),
        ("mla.2", lambda q, c, w: (q[:, :, None] @ w).squeeze(2) @ c.mT),
        ("mla.3", lambda a, b, c, d: (torch.cat([a, b], -1)[:, :, None] @ _joined(c, d)).squeeze(2)),
        ("mla.4", lambda *sizes: list(mla.decode_flops(*sizes))),
    ],
)
def test_another_way_to_the_right_answer_passes(key: str, answer: object) -> None:
    verdict = judge(BY_ID[key], answer)
    assert verdict.state == "right", verdict.text


def _joined(k_nope: torch.Tensor, k_rope: torch.Tensor) -> torch.Tensor:
    """Keys of content and position side by side, scaled, with tokens last: [B, H, N + R, T]."""
    k = torch.cat([k_nope, k_rope[:, :, None].expand(-1, -1, k_nope.shape[2], -1)], -1)
    return k.permute(0, 2, 3, 1) * k.shape[-1] ** -0.5
