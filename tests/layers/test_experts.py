"""Experts, grouped: every token visits every expert it chose, and the same step gives the same bits."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, assert_rejects, build, configs, small, tokens

from dsv3lib import ModelConfig
from dsv3lib.backends.cpu import Cpu
from dsv3lib.layers.experts import Experts, MixtureOfExperts, combine, dispatch, sort_by_expert

CASES = {"config": configs(max_layers=1), "seed": SEEDS, "n_tokens": st.integers(1, 12)}


def draw(config: ModelConfig, seed: int, n_tokens: int, requires_grad: bool = False):
    """Experts with random weights; tokens, their experts (all different) and gate values."""
    generator = torch.Generator().manual_seed(seed)
    experts = Experts(config).double()
    for parameter in experts.parameters():
        parameter.data.normal_(generator=generator)
    x = torch.randn(n_tokens, config.hidden_size, dtype=torch.float64, generator=generator)
    shuffled = torch.rand(n_tokens, config.n_routed_experts, generator=generator).argsort(-1)
    weights = torch.rand(n_tokens, config.num_experts_per_tok, dtype=torch.float64, generator=generator)
    return experts, x.requires_grad_(), shuffled[:, : config.num_experts_per_tok], weights.requires_grad_()


def one_by_one(experts: Experts, x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor):
    """Σ g · down(silu(gate x) ⊙ up x), token by token and expert by expert."""
    rows = []
    for n in range(x.shape[0]):
        y = torch.zeros_like(x[n])
        for a, e in enumerate(indices[n].tolist()):
            gate, up = (experts.gate_up_proj[e] @ x[n]).chunk(2)
            y = y + weights[n, a] * (experts.down_proj[e] @ (F.silu(gate) * up))
        rows.append(y)
    return torch.stack(rows)


def with_capacity(experts: Experts, x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor):
    """A twin that drops tokens past 1.25 times the fair share, as older mixtures do."""
    n_experts = experts.down_proj.shape[0]
    capacity = max(1, int(1.25 * indices.numel() / n_experts))
    seen, kept = [0] * n_experts, weights.clone()
    for n, a in [(n, a) for n in range(indices.shape[0]) for a in range(indices.shape[1])]:
        e = int(indices[n, a])
        seen[e] += 1
        if seen[e] > capacity:
            kept[n, a] = 0.0
    return experts(x, indices, kept)


def up_first(experts: Experts, x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor):
    """A twin that takes the stacked matrix for [up; gate]."""
    half = experts.gate_up_proj.shape[1] // 2
    experts.gate_up_proj.data = experts.gate_up_proj.data.roll(half, 1)
    y = experts(x, indices, weights)
    experts.gate_up_proj.data = experts.gate_up_proj.data.roll(half, 1)
    return y


def unweighted(experts: Experts, x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor):
    return experts(x, indices, torch.ones_like(weights))


def check(mixture, config: ModelConfig, seed: int, n_tokens: int) -> None:
    experts, x, indices, weights = draw(config, seed, n_tokens)
    y = mixture(experts, x, indices, weights)
    expected = one_by_one(experts, x, indices, weights)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    towards = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(seed))
    inputs = (x, weights, *experts.parameters())
    got = torch.autograd.grad(y, inputs, towards)
    for a, b in zip(got, torch.autograd.grad(expected, inputs, towards), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@given(**CASES)
def test_grouped_equals_one_by_one(config: ModelConfig, seed: int, n_tokens: int) -> None:
    check(lambda experts, *call: experts(*call), config, seed, n_tokens)


@pytest.mark.parametrize("wrong", [with_capacity, up_first, unweighted])
def test_the_check_rejects(wrong) -> None:
    assert_rejects(lambda **case: check(wrong, **case), **CASES)


# ---- the permutation --------------------------------------------------------------------------------------


@given(**CASES)
def test_every_visit_is_made_once(config: ModelConfig, seed: int, n_tokens: int) -> None:
    _, _, indices, _ = draw(config, seed, n_tokens)
    visits = sort_by_expert(indices, config.n_routed_experts)
    assert visits.counts.sum() == indices.numel()
    assert torch.equal(visits.counts, torch.bincount(indices.flatten(), minlength=config.n_routed_experts))
    sorted_experts = indices.flatten()[visits.order]
    assert (sorted_experts.diff() >= 0).all()
    assert torch.equal(visits.token, visits.order // indices.shape[1])
    assert torch.equal(visits.order[visits.inverse.flatten()], torch.arange(indices.numel()))
    for start, n in zip(
        (visits.counts.cumsum(0) - visits.counts).tolist(), visits.counts.tolist(), strict=True
    ):
        assert (visits.token[start : start + n].diff() > 0).all(), "tokens of one expert are not in order"


@given(**CASES)
def test_dispatch_then_combine_with_equal_shares_is_the_identity(
    config: ModelConfig, seed: int, n_tokens: int
) -> None:
    """Nothing dropped, nothing sent twice."""
    _, x, indices, weights = draw(config, seed, n_tokens)
    visits = sort_by_expert(indices, config.n_routed_experts)
    home = combine(dispatch(x, visits), torch.full_like(weights, 1 / indices.shape[1]), visits)
    torch.testing.assert_close(home, x, rtol=1e-12, atol=1e-12)


def test_dispatch_and_combine_by_finite_differences() -> None:
    indices = torch.tensor([[0, 3], [3, 1], [1, 0]])
    visits = sort_by_expert(indices, 5)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: dispatch(a, visits), (x,))
    assert torch.autograd.gradcheck(lambda a, w: combine(a, w, visits), (y, weights))


@pytest.mark.parametrize("n_tokens", [1, 30])
def test_all_tokens_may_choose_the_same_experts(n_tokens: int) -> None:
    config = small()
    experts, x, _, weights = draw(config, 0, n_tokens)
    indices = torch.tensor([[7, 2, 0]]).expand(n_tokens, 3)
    y = experts(x, indices, weights)
    torch.testing.assert_close(y, one_by_one(experts, x, indices, weights), rtol=1e-11, atol=1e-11)
    y.sum().backward()
    assert not experts.down_proj.grad[[1, 3, 4, 5, 6]].any()


# ---- the mixture ------------------------------------------------------------------------------------------


def test_the_mixture_is_shared_plus_routed() -> None:
    config = small(n_shared_experts=2)
    moe = MixtureOfExperts(config).double()
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 5, config.hidden_size, dtype=torch.float64)
    y, routing = moe(x)
    flat = x.flatten(0, 1)
    indices, weights, scores = moe.gate(flat)
    expected = one_by_one(moe.experts, flat, indices, weights) + moe.shared_experts(flat)
    torch.testing.assert_close(y.flatten(0, 1), expected, rtol=1e-11, atol=1e-11)
    assert torch.equal(routing.indices.flatten(0, 1), indices)
    assert torch.equal(routing.scores.flatten(0, 1), scores)
    assert moe.shared_experts.up_proj.weight.shape == (2 * config.moe_intermediate_size, config.hidden_size)


def test_gate_values_carry_a_gradient_to_the_router() -> None:
    moe = MixtureOfExperts(small())
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    y, _ = moe(torch.randn(1, 6, 24))
    y.square().sum().backward()
    assert moe.gate.weight.grad.any()


def test_gradients_of_a_step_are_the_same_to_the_bit() -> None:
    config = small()
    input_ids = tokens(config, 4, 16)
    gradients = []
    for _ in range(2):
        model = build(config)
        model(input_ids, labels=input_ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_bf16_experts_stay_near_fp32() -> None:
    config = small()
    experts, x, indices, weights = draw(config, 0, 32)
    exact = experts(x, indices, weights)
    y = experts.bfloat16()(x.bfloat16(), indices, weights.float())
    assert y.dtype == torch.bfloat16
    assert (y.double() - exact).norm() / exact.norm() < 0.02


@given(**CASES)
def test_one_expert_after_the_other_equals_one_by_one(config: ModelConfig, seed: int, n_tokens: int) -> None:
    """The CPU's own form, in the stages in which a block runs it."""

    def on_cpu(experts: Experts, x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor):
        compute = Cpu()
        sent = compute.dispatch(experts, x, indices, weights)
        assert not sent.gathered
        return compute.combine(compute.experts(experts, sent), sent)

    check(on_cpu, config, seed, n_tokens)
