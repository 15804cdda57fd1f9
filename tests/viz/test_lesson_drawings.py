"""The drawings of 01 and 03 say what they were given: worked numbers, widths, who is chosen, what is cached."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from dsv3lib.config import ModelConfig
from dsv3lib.layers.attention import MultiHeadLatentAttention
from dsv3lib.layers.rope import RotaryEmbedding
from dsv3lib.layers.router import route
from dsv3lib.layers.step import Step
from dsv3lib.studies import log
from dsv3lib.viz import balance, style
from dsv3lib.viz.latent_path import absorption, latent_path, worked_token
from dsv3lib.viz.routing_path import routing_path
from dsv3lib.viz.shades import shades, spread

NANO, V3 = ModelConfig.preset("nano"), ModelConfig.preset("v3-671b")


def words(fig) -> list[str]:
    return [text.get_text() for ax in fig.axes for text in ax.texts]


def test_the_latent_path_shows_widths_and_one_token_s_numbers() -> None:
    layer = MultiHeadLatentAttention(NANO, 0).double()
    h = torch.randn(5, NANO.hidden_size, dtype=torch.float64)
    step = Step(RotaryEmbedding(NANO).table(5, h))
    token = worked_token(layer, h, step)
    assert len(token["c"]) == NANO.kv_lora_rank and len(token["q"]) == NANO.qk_nope_head_dim
    assert token["c"] + token["k_rope"] == layer.latents(h[None], step)[0, -1].tolist()
    fig, alt, caption = latent_path({"V3": V3, "nano": NANO}, token)
    shown = words(fig)
    assert "V3 512 · nano 32" in shown and f"{token['c'][0]:.2f}".replace("-", "−") in shown
    assert "cached" in alt and caption != alt


def test_absorption_draws_keys_on_one_side_alone() -> None:
    fig, alt, _ = absorption(V3, tokens=3)
    shown = words(fig)
    assert sum("k}_{" in text for text in shown) == 3 and sum("c}_" in text for text in shown) == 6
    assert "no key" in alt


def test_the_routing_path_marks_those_that_the_router_chooses() -> None:
    draw = torch.Generator().manual_seed(3)
    s, b = torch.rand(8, generator=draw), 0.3 * torch.randn(8, generator=draw)
    chosen, gates = route(s[None], b, NANO)
    fig, _, caption = routing_path(s, b, NANO)
    shown = words(fig)
    names = " and ".join(str(i) for i in sorted(chosen[0].tolist()))
    assert any(f"Experts {names} work for this token" in text for text in shown)
    assert all(f"{g:.2f}" in shown for g in gates[0].tolist())
    assert shown.count("−∞") == 4 and ("other experts" in caption or "same experts" in caption)


def test_shades_go_from_dark_to_light_and_names_do_not_touch() -> None:
    light = [sum(to_rgb(colour)) for colour in shades("bias", 8)]
    assert light == sorted(light) and len(set(light)) == 8
    assert shades("bias", 3)[1] == style.colour("bias")
    placed = spread([0.0, 0.01, 0.02, 1.0], 0.1)
    assert min(np.diff(placed)) > 0.1 - 1e-3 and placed[-1] == pytest.approx(1.0, abs=0.05)


def test_figures_of_balance_have_a_panel_for_each_question() -> None:
    figures = {
        "gamma": balance.steps_of_gamma({0: [2.0] * 5, 0.1: [1.0] * 5}),
        "drift": balance.drift(np.cumsum(np.ones((9, 8)) * np.arange(8) * 0.01, 0), "layer 2"),
        "ways": balance.ways_compared(log.read("balance_ways")),
    }
    for fig, alt, caption in figures.values():
        assert style.png(fig).startswith(b"\x89PNG") and alt != caption
    left, right = figures["drift"][0].axes
    assert right.lines[-1].get_ydata() == pytest.approx(np.zeros(9), abs=1e-12)
    assert left.lines[-1].get_ydata()[-1] > 0
