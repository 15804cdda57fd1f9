"""Each *Differs from …* note of layers and quantisers, with the experiment that shows the difference."""

import math

import pytest
import torch
from strategies import build, small

from dsv3lib import ModelConfig
from dsv3lib.config import PRESETS
from dsv3lib.kernels import dequantize, quantize_tiles
from dsv3lib.layers.rope import RotaryEmbedding, rope_frequencies
from dsv3lib.layers.router import Router, route


def drawn(config: ModelConfig, rows: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(rows, config.n_routed_experts, generator=generator).sigmoid()
    return scores, torch.randn(config.n_routed_experts, generator=generator) * 0.1


def routed_as_the_paper_says(scores: torch.Tensor, bias: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Groups scored by their K_r/M best (§2.1.2, "Node-Limited Routing")."""
    grouped = (scores + bias).unflatten(-1, (config.n_group, -1))
    group_scores = grouped.topk(config.num_experts_per_tok // config.topk_group).values.sum(-1)
    mask = torch.full_like(group_scores, -math.inf).scatter(
        -1, group_scores.topk(config.topk_group).indices, 0.0
    )
    return (grouped + mask[..., None]).flatten(-2).topk(config.num_experts_per_tok).indices


@pytest.mark.parametrize("name", PRESETS)
def test_a_group_s_score_is_the_paper_s_where_two_experts_come_from_a_group(name: str) -> None:
    config = ModelConfig.preset(name)
    scores, bias = drawn(config)
    ours = route(scores, bias, config)[0].sort(-1).values
    otherwise = (
        (ours != routed_as_the_paper_says(scores, bias, config).sort(-1).values).any(-1).float().mean()
    )
    if config.num_experts_per_tok == 2 * config.topk_group:
        assert otherwise == 0
    else:
        assert name in ("nano", "tiny-v3") and 0.1 < otherwise < 0.6


def test_affinities_rounded_to_bf16_choose_other_experts() -> None:
    config = ModelConfig.preset("v3-671b")
    scores, bias = drawn(config)
    exact = route(scores, bias, config)[0].sort(-1).values
    rounded = route(scores.bfloat16().float(), bias, config)[0].sort(-1).values
    assert (exact != rounded).any(-1).float().mean() > 0.02
    router = Router(small()).bfloat16()
    torch.nn.init.normal_(router.weight)
    assert router.scores(torch.randn(3, 24).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("power_of_two", [False, True])
def test_a_small_tile_keeps_its_digits_without_a_floor(power_of_two: bool) -> None:
    x = torch.randn(4, 128) * 1e-9
    error = (dequantize(*quantize_tiles(x, power_of_two=power_of_two)) - x).norm() / x.norm()
    floored = (x / (1e-4 / 448)).to(torch.float8_e4m3fn).float() * (1e-4 / 448)
    assert error < 0.05 < (floored - x).norm() / x.norm()


def test_power_of_two_scales_are_exact_where_logarithms_are_not() -> None:
    """Largest values a few steps of FP32 above 448·2^k: the next power of two is needed, and log2 does not see it."""
    amax = torch.tensor([448.0 * 2.0**k for k in range(-20, 21)])
    for _ in range(3):
        amax = torch.nextafter(amax, torch.tensor(math.inf))
    x = torch.zeros(len(amax), 128)
    x[:, 0] = amax
    _, scales = quantize_tiles(x, power_of_two=True)
    assert bool((amax.double() <= 448 * scales.double().flatten()).all())
    by_logarithm = torch.exp2(torch.ceil(torch.log2(amax / 448)))
    assert bool((amax.double() > 448 * by_logarithm.double()).any())


def test_angles_far_out_are_those_of_fp64() -> None:
    config = ModelConfig.preset("v3-671b")
    position = 160_000
    frequencies, magnitude = rope_frequencies(config)
    exact = torch.polar(torch.full_like(frequencies, magnitude), position * frequencies)
    ours = RotaryEmbedding(config).table(position + 1, torch.zeros(1))[position]
    single = torch.polar(torch.ones(len(frequencies)), position * frequencies.float())
    assert (ours - exact).abs().max() < 1e-6 < 1e-3 < (single - exact).abs().max()


def test_the_padding_token_has_an_embedding_like_any_other() -> None:
    model = build(small(pad_token_id=3))
    ids = torch.tensor([[1, 3, 2]])
    model(ids, labels=ids).loss.backward()
    embedding = model.model.embed_tokens
    assert (
        embedding.padding_idx is None
        and bool(embedding.weight[3].any())
        and bool(embedding.weight.grad[3].any())
    )
