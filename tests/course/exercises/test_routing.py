"""The solutions of 03's exercises give what the library gives."""

from __future__ import annotations

import torch

from dsv3lib.config import ModelConfig
from dsv3lib.course.exercises.routing.balance import sequence_loss, update
from dsv3lib.course.exercises.routing.choice import choose, close_groups
from dsv3lib.course.exercises.routing.load import nodes_used, waiting
from dsv3lib.layers.router import route, sequence_balance_loss
from dsv3lib.training.loop.balance import max_violation, update_bias

CONFIG = ModelConfig.preset("v3-671b")


def test_choice_groups_and_nodes_are_the_router_s() -> None:
    s, b = torch.rand(60, CONFIG.n_routed_experts), 0.3 * torch.randn(CONFIG.n_routed_experts)
    indices, weights = route(s, b, CONFIG)
    open_ = close_groups(s + b, CONFIG.n_group, CONFIG.topk_group)
    assert torch.equal(open_.topk(8, dim=-1).indices, indices)
    free, gates = route(s, b, CONFIG.replace(n_group=1, topk_group=1))
    mine = choose(s, b, 8, CONFIG.routed_scaling_factor)
    assert torch.equal(mine[0], free) and torch.allclose(mine[1], gates)
    assert int(nodes_used(indices, CONFIG.n_routed_experts, CONFIG.n_group).max()) <= CONFIG.topk_group
    assert torch.allclose(weights.sum(-1), torch.tensor(CONFIG.routed_scaling_factor))


def test_the_update_is_the_trainer_s() -> None:
    load, bias = torch.randint(0, 50, (16,)), torch.randn(16)
    expected = bias.clone()
    update_bias(expected, load, 0.01)
    assert torch.allclose(update(bias, load, 0.01), expected)


def test_the_loss_is_the_model_s_and_its_least_value_is_alpha() -> None:
    s = torch.rand(12, 16, dtype=torch.float64)
    torch.testing.assert_close(sequence_loss(s, 4, 0.3), sequence_balance_loss(s[None], 4, 0.3))
    level = torch.eye(8, dtype=torch.float64).repeat(2, 1) * 0.5 + 0.1
    torch.testing.assert_close(sequence_loss(level, 1, 0.3), torch.tensor(0.3, dtype=torch.float64))


def test_waiting_follows_from_max_violation() -> None:
    load = torch.randint(1, 90, (32,))
    worst = float(max_violation(load.view(8, 4).sum(-1)))
    assert abs(waiting(load, 8) - worst / (1 + worst)) < 1e-9
