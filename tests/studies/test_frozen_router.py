"""Experiments on a frozen router, against cases whose answer is known."""

from __future__ import annotations

import torch

from dsv3lib.config import ModelConfig
from dsv3lib.layers.router import route
from dsv3lib.studies.frozen_router import find_bias, forbidden_visits, made_up_affinities

NANO = ModelConfig.preset("nano")


def test_the_bias_that_is_found_levels_what_was_uneven() -> None:
    s = made_up_affinities(torch.sigmoid, NANO, tokens=512)
    bias, violations = find_bias(s, NANO, 0.005, updates=200)
    assert violations[-20:].mean() < 0.3 < violations[0]
    kept, same = find_bias(s, NANO, 0.0, updates=3)
    assert not kept.any() and len(set(same.tolist())) == 1
    assert bias.std() > 0.01


def test_a_mask_of_zero_lets_tokens_through_where_affinities_are_negative() -> None:
    s = torch.rand(400, 8, generator=torch.Generator().manual_seed(1))
    assert forbidden_visits(-torch.inf, s - 1, NANO) == 0
    assert forbidden_visits(0.0, s, NANO) == 0
    assert forbidden_visits(0.0, s - 1, NANO) == 1


def test_a_constant_added_to_all_biases_changes_no_choice() -> None:
    draw = torch.Generator().manual_seed(2)
    s, b = torch.rand(300, 8, generator=draw), 0.1 * torch.randn(8, generator=draw)
    assert torch.equal(route(s, b, NANO)[0].sort(-1).values, route(s, b - b.mean(), NANO)[0].sort(-1).values)
