"""MLA: two forms of one function, held to the textbook and to each other."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, assert_rejects, build, configs, randomize, small, tokens

from dsv3lib import ModelConfig
from dsv3lib.layers.attention import MultiHeadLatentAttention, Step, absorbed_is_cheaper
from dsv3lib.layers.rope import RotaryEmbedding
from dsv3lib.rope_settings import yarn_temperature

CASES = {
    "config": configs(max_layers=1, mtp=0),
    "seed": SEEDS,
    "batch": st.integers(1, 2),
    "length": st.integers(1, 9),
}


def attention(config: ModelConfig, seed: int, dtype: torch.dtype = torch.float64) -> MultiHeadLatentAttention:
    module = MultiHeadLatentAttention(config, layer=0)
    randomize(module, torch.Generator().manual_seed(seed))
    return module.to(dtype)


def inputs(config: ModelConfig, seed: int, batch: int, length: int, dtype: torch.dtype = torch.float64):
    x = torch.randn(batch, length, config.hidden_size, generator=torch.Generator().manual_seed(seed)).to(
        dtype
    )
    return x, Step(RotaryEmbedding(config).table(length, x))


# ---- the textbook -----------------------------------------------------------------------------------------


def turned_pairs(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Each pair of neighbours times [[cos, -sin], [sin, cos]]."""
    rotation = torch.stack([turns.real, -turns.imag, turns.imag, turns.real], -1).unflatten(-1, (2, 2))
    return (rotation @ x.unflatten(-1, (-1, 2))[..., None]).flatten(-3)


def textbook(
    attn: MultiHeadLatentAttention,
    x: torch.Tensor,
    turns: torch.Tensor,
    hidden_score: float = -math.inf,
    scale: float | None = None,
    turned_latent: bool = False,
    turned_query: bool = True,
    causal: bool = True,
    own_keys: bool = False,
    latent_norm: bool = True,
) -> torch.Tensor:
    """Equations 1 to 11, head by head and query by query; the switches make wrong twins."""
    cfg = attn.config
    nope, rope, rank = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.kv_lora_rank
    scale = cfg.softmax_scale if scale is None else scale
    rows = []
    for row in x:
        c_q = row if cfg.q_lora_rank is None else attn.q_a_layernorm(attn.q_a_proj(row))
        q = (attn.q_proj if cfg.q_lora_rank is None else attn.q_b_proj)(c_q)
        c_kv, k_rope = attn.kv_a_proj_with_mqa(row).split([rank, rope], -1)
        c_kv = attn.kv_a_layernorm(c_kv) if latent_norm else c_kv
        if turned_latent:
            wide = c_kv.clone()
            wide[:, : rope // 2 * 2] = turned_pairs(c_kv[:, :rope], turns)
            c_kv = wide
        kv = attn.kv_b_proj(c_kv)
        k_rope = turned_pairs(k_rope, turns)
        heads = []
        for h in range(cfg.num_attention_heads):
            q_h = q[:, h * (nope + rope) : (h + 1) * (nope + rope)]
            turned = turned_pairs(q_h[:, nope:], turns) if turned_query else q_h[:, nope:]
            q_h = torch.cat([q_h[:, :nope], turned], -1)
            kv_h = kv[:, h * (nope + cfg.v_head_dim) : (h + 1) * (nope + cfg.v_head_dim)]
            k_h = torch.cat([kv_h[:, :nope], k_rope * (1 + h) if own_keys else k_rope], -1)
            v_h = kv_h[:, nope:]
            out = []
            for t in range(row.shape[0]):
                scores = (k_h @ q_h[t]) * scale
                if causal:
                    scores[t + 1 :] = hidden_score
                weights = (scores - scores.max()).exp()
                out.append((weights / weights.sum()) @ v_h)
            heads.append(torch.stack(out))
        rows.append(attn.o_proj(torch.cat(heads, -1)))
    return torch.stack(rows)


def check_textbook(config: ModelConfig, seed: int, batch: int, length: int, **twin) -> None:
    attn = attention(config, seed)
    x, step = inputs(config, seed, batch, length)
    with torch.no_grad():
        expected = textbook(attn, x, step.rotations, **twin)
        torch.testing.assert_close(attn(x, step), expected, rtol=1e-11, atol=1e-11)


@given(**CASES)
def test_it_is_the_textbook(config: ModelConfig, seed: int, batch: int, length: int) -> None:
    check_textbook(config, seed, batch, length)


@pytest.mark.parametrize(
    "twin",
    [
        {"hidden_score": 0.0},
        {"causal": False},
        {"turned_query": False},
        {"own_keys": True},
        {"latent_norm": False},
        {"scale": 0.1234},
    ],
    ids=lambda twin: next(iter(twin)),
)
def test_the_textbook_check_rejects(twin: dict) -> None:
    assert_rejects(lambda **case: check_textbook(**case, **twin), **CASES)


def test_the_textbook_check_rejects_rope_on_the_latent() -> None:
    cases = CASES | {"config": configs(max_layers=1, mtp=0, kv_lora_rank=12, qk_rope_head_dim=4)}
    assert_rejects(lambda **case: check_textbook(**case, turned_latent=True), **cases)


def test_yarn_s_second_correction_is_in_the_scale() -> None:
    """Without the squared temperature the scores are 1.87 times too flat at factor 40."""

    def without(config: ModelConfig, **case) -> None:
        yarn = config.rope_scaling
        temperature = yarn_temperature(yarn.factor, yarn.mscale_all_dim)
        check_textbook(config, **case, scale=config.softmax_scale / temperature**2)

    assert_rejects(without, **(CASES | {"config": configs(yarn=True, max_layers=1, mtp=0)}))


# ---- two forms --------------------------------------------------------------------------------------------


def check_forms(
    config: ModelConfig, seed: int, batch: int, length: int, new: int, masked: bool, dtype: torch.dtype,
    tolerance: float, spoil: bool = False,
) -> None:  # fmt: skip
    """The last ``new`` of ``length`` positions, expanded and absorbed."""
    attn = attention(config, seed, dtype)
    x, step = inputs(config, seed, batch, length, dtype)
    new = min(new, length)
    mask = None
    if masked:
        generator = torch.Generator().manual_seed(seed)
        ends = torch.randint(0, length, (batch, new, 1), generator=generator)
        mask = (torch.arange(length) <= ends)[:, None]
    with torch.no_grad():
        latents = attn.latents(x, step)
        q = attn.queries(x, step)[:, :, -new:].contiguous()
        expanded = attn.expanded(q, latents, mask)
        if spoil:
            latents = latents.clone()
            latents[..., -1] = 0.0
        absorbed = attn.absorbed(q, latents, mask)
    assert absorbed.shape == (batch, new, config.num_attention_heads, config.v_head_dim)
    torch.testing.assert_close(absorbed, expanded, rtol=tolerance, atol=tolerance)


FORMS = CASES | {"new": st.integers(1, 9), "masked": st.booleans()}


@given(**FORMS)
def test_absorbed_equals_expanded_in_fp64(
    config: ModelConfig, seed: int, batch: int, length: int, new: int, masked: bool
) -> None:
    check_forms(config, seed, batch, length, new, masked, torch.float64, 1e-12)


@given(**FORMS)
def test_absorbed_equals_expanded_in_fp32(
    config: ModelConfig, seed: int, batch: int, length: int, new: int, masked: bool
) -> None:
    check_forms(config, seed, batch, length, new, masked, torch.float32, 1e-5)


def test_the_two_forms_check_rejects_a_lost_rotary_dimension() -> None:
    assert_rejects(
        lambda **case: check_forms(**case, dtype=torch.float64, tolerance=1e-12, spoil=True), **FORMS
    )


def test_both_forms_agree_in_bf16() -> None:
    config = small(kv_lora_rank=64, hidden_size=64)
    attn = attention(config, 0)
    x, step = inputs(config, 0, 2, 40)
    with torch.no_grad():
        exact = attn.expanded(attn.queries(x, step), attn.latents(x, step))
        attn, x = attn.bfloat16(), x.bfloat16()
        step = Step(RotaryEmbedding(config).table(40, x))
        q, latents = attn.queries(x, step), attn.latents(x, step)
        for form in (attn.expanded, attn.absorbed):
            y = form(q, latents)
            assert y.dtype == torch.bfloat16
            assert (y.double() - exact).norm() / exact.norm() < 0.02


@given(**CASES)
def test_gradients_of_the_training_form_are_the_textbook_s(
    config: ModelConfig, seed: int, batch: int, length: int
) -> None:
    attn = attention(config, seed)
    x, step = inputs(config, seed, batch, length)
    x.requires_grad_()
    towards = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(seed))
    wanted = (x, *attn.parameters())
    got = torch.autograd.grad(attn(x, step), wanted, towards)
    expected = torch.autograd.grad(textbook(attn, x, step.rotations), wanted, towards)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# ---- the choice -------------------------------------------------------------------------------------------


def test_v3_decodes_absorbed_and_prefills_expanded() -> None:
    config = ModelConfig.preset("v3-671b")
    for context in (128, 4096, 100_000):
        assert absorbed_is_cheaper(config, 1, context)
        assert not absorbed_is_cheaper(config, context, context)


@settings(max_examples=15)
@given(config=configs(mtp=0), seed=SEEDS, length=st.integers(2, 10), data=st.data())
@torch.no_grad()
def test_the_future_is_not_seen(config: ModelConfig, seed: int, length: int, data: st.DataObject) -> None:
    model = build(config, seed, torch.float64)
    t = data.draw(st.integers(0, length - 1))
    input_ids = tokens(config, 2, length, seed)
    changed = input_ids.clone()
    changed[:, t] = (changed[:, t] + 1) % config.vocab_size
    before, after = model(input_ids).logits, model(changed).logits
    torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-12)
    assert (after[:, t] - before[:, t]).abs().max() > 1e-6


@torch.no_grad()
def test_the_order_of_the_past_is_seen() -> None:
    """RoPE is all that tells a position; without it, swapping two earlier tokens would change nothing."""
    model = build(small(num_hidden_layers=1, first_k_dense_replace=0), dtype=torch.float64)
    input_ids = torch.tensor([[3, 14, 15, 9]])
    swapped = torch.tensor([[14, 3, 15, 9]])
    difference = (model(input_ids).logits[0, -1] - model(swapped).logits[0, -1]).abs().max()
    assert difference > 1e-4
    model.rope.config = model.config.replace(rope_theta=1e300, qk_rope_head_dim=4)
    model.rope._table = torch.ones(64, 2, dtype=torch.complex128)
    difference = (model(input_ids).logits[0, -1] - model(swapped).logits[0, -1]).abs().max()
    assert difference < 1e-12
