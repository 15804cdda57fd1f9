"""The router's promises, each shown to a router that breaks it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, assert_rejects, build, configs, small, tokens

from dsv3lib import ModelConfig
from dsv3lib.layers.router import Router, balance_loss, best, route, sequence_balance_loss

CASES = {"config": configs(max_layers=1), "seed": SEEDS}


def draw(config: ModelConfig, seed: int, low: float = -1.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Affinities in (0, 1) of 20 tokens, and a bias that puts most biased scores below zero."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(20, config.n_routed_experts, generator=generator).mul(2).sigmoid()
    bias = torch.empty(config.n_routed_experts).uniform_(low, 0.3, generator=generator)
    return scores, bias


def groups_of(indices: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    return indices // (config.n_routed_experts // config.n_group)


# ---- wrong twins ------------------------------------------------------------------------------------------


def zero_mask(scores: torch.Tensor, bias: torch.Tensor, config: ModelConfig):
    """Masks dropped groups with 0, which beats every biased score below zero."""
    chosen_by = scores + bias
    grouped = chosen_by.unflatten(-1, (config.n_group, -1))
    kept = best(grouped.topk(2, -1).values.sum(-1), config.topk_group)
    mask = torch.zeros(grouped.shape[:-1]).scatter_(-1, kept, 1.0)[..., None]
    indices = best((grouped * mask).flatten(-2), config.num_experts_per_tok)
    return indices, weigh(scores.gather(-1, indices), config)


def biased_gates(scores: torch.Tensor, bias: torch.Tensor, config: ModelConfig):
    """Lets the bias scale the gate value."""
    indices, _ = route(scores, bias, config)
    return indices, weigh((scores + bias).gather(-1, indices), config)


def no_groups(scores: torch.Tensor, bias: torch.Tensor, config: ModelConfig):
    """Chooses among all experts."""
    indices = best(scores + bias, config.num_experts_per_tok)
    return indices, weigh(scores.gather(-1, indices), config)


def no_bias(scores: torch.Tensor, bias: torch.Tensor, config: ModelConfig):
    """Chooses by the plain affinities."""
    return route(scores, torch.zeros_like(bias), config)


def best_of_group(scores: torch.Tensor, bias: torch.Tensor, config: ModelConfig):
    """Scores a group by its one best expert, as V2 did, instead of the sum of two."""
    grouped = (scores + bias).unflatten(-1, (config.n_group, -1))
    kept = best(grouped.amax(-1), config.topk_group)
    dropped = torch.ones(grouped.shape[:-1], dtype=torch.bool).scatter_(-1, kept, False)[..., None]
    indices = best(grouped.masked_fill(dropped, float("-inf")).flatten(-2), config.num_experts_per_tok)
    return indices, weigh(scores.gather(-1, indices), config)


def normalised_over_all(scores: torch.Tensor, bias: torch.Tensor, config: ModelConfig):
    """Divides by the affinities of all experts instead of the chosen ones."""
    indices, _ = route(scores, bias, config)
    return indices, (scores / scores.sum(-1, keepdim=True)).gather(-1, indices) * config.routed_scaling_factor


def weigh(chosen: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    if config.norm_topk_prob:
        chosen = chosen / (chosen.sum(-1, keepdim=True) + 1e-20)
    return chosen * config.routed_scaling_factor


def one_by_one(scores: torch.Tensor, bias: torch.Tensor, config: ModelConfig):
    """The paper's words in plain Python, token by token."""
    all_indices, all_weights = [], []
    size = config.n_routed_experts // config.n_group
    for s in scores.tolist():
        biased = [a + b for a, b in zip(s, bias.tolist(), strict=True)]
        group_score = []
        for g in range(config.n_group):
            two = sorted(biased[g * size : (g + 1) * size], reverse=True)[:2]
            group_score.append(sum(two))
        kept = sorted(range(config.n_group), key=lambda g: -group_score[g])[: config.topk_group]
        allowed = [e for e in range(config.n_routed_experts) if e // size in kept]
        chosen = sorted(allowed, key=lambda e: -biased[e])[: config.num_experts_per_tok]
        total = sum(s[e] for e in chosen) if config.norm_topk_prob else 1.0
        all_indices.append(chosen)
        all_weights.append([s[e] / total * config.routed_scaling_factor for e in chosen])
    return torch.tensor(all_indices), torch.tensor(all_weights)


# ---- properties -------------------------------------------------------------------------------------------


def check_plain(router, config: ModelConfig, seed: int) -> None:
    scores, bias = draw(config, seed)
    indices, weights = router(scores, bias, config)
    expected_indices, expected_weights = one_by_one(scores.double(), bias.double(), config)
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(weights.double(), expected_weights.double(), rtol=1e-5, atol=1e-6)


def check_group_limit(router, config: ModelConfig, seed: int) -> None:
    indices, _ = router(*draw(config, seed), config)
    for row in groups_of(indices, config):
        assert row.unique().numel() <= config.topk_group
    assert indices.sort(-1).values.diff().gt(0).all(), "an expert was chosen twice"


def check_masked_stay_out(router, config: ModelConfig, seed: int) -> None:
    """With every biased score below zero, the chosen ones still come from the best groups."""
    scores, bias = draw(config, seed)
    bias = bias - 2.0
    assert (scores + bias < 0).all()
    indices, _ = router(scores, bias, config)
    group_scores = (scores + bias).unflatten(-1, (config.n_group, -1)).topk(2, -1).values.sum(-1)
    worst_kept = group_scores.sort(-1, descending=True).values[:, config.topk_group - 1]
    chosen = group_scores.gather(-1, groups_of(indices, config))
    assert (chosen >= worst_kept[:, None]).all()


def check_weights_ignore_bias(router, config: ModelConfig, seed: int) -> None:
    """Whatever the bias chose, the gate values are those of the unbiased formula."""
    scores, bias = draw(config, seed)
    indices, weights = router(scores, bias, config)
    torch.testing.assert_close(weights, weigh(scores.gather(-1, indices), config))


def check_sum(router, config: ModelConfig, seed: int) -> None:
    config = config.replace(norm_topk_prob=True)
    _, weights = router(*draw(config, seed), config)
    wanted = torch.full((20,), config.routed_scaling_factor)
    torch.testing.assert_close(weights.sum(-1), wanted, rtol=1e-5, atol=0)


def check_bias_steers(router, config: ModelConfig, seed: int) -> None:
    """An expert pushed up far enough is everybody's first choice; one pushed down is nobody's."""
    scores, bias = draw(config, seed)
    favourite = seed % config.n_routed_experts
    bias[favourite] = 10.0
    assert (router(scores, bias, config)[0] == favourite).any(-1).all()
    bias[favourite] = -10.0
    if config.topk_group * (config.n_routed_experts // config.n_group) > config.num_experts_per_tok:
        assert not (router(scores, bias, config)[0] == favourite).any()


def check_permutation(router, config: ModelConfig, seed: int) -> None:
    """Renaming experts within their groups, and the groups, renames the result and changes nothing else."""
    scores, bias = draw(config, seed)
    generator = torch.Generator().manual_seed(seed)
    size = config.n_routed_experts // config.n_group
    group_order = torch.randperm(config.n_group, generator=generator)
    within = [torch.randperm(size, generator=generator) for _ in range(config.n_group)]
    order = torch.cat([g * size + w for g, w in zip(group_order.tolist(), within, strict=True)])
    indices, weights = router(scores, bias, config)
    renamed, same_weights = router(scores[:, order], bias[order], config)
    assert torch.equal(order[renamed], indices)
    torch.testing.assert_close(same_weights, weights)


def favours_low_numbers(scores: torch.Tensor, bias: torch.Tensor, config: ModelConfig):
    return route(scores - 0.3 * torch.arange(config.n_routed_experts) / config.n_routed_experts, bias, config)


PROPERTIES = {
    check_plain: (zero_mask, biased_gates, no_groups, no_bias, best_of_group, normalised_over_all),
    check_group_limit: (no_groups, zero_mask),
    check_masked_stay_out: (zero_mask, no_groups),
    check_weights_ignore_bias: (biased_gates, normalised_over_all),
    check_sum: (normalised_over_all,),
    check_bias_steers: (no_bias,),
    check_permutation: (favours_low_numbers,),
}


@pytest.mark.parametrize("check", PROPERTIES, ids=lambda c: c.__name__)
@given(**CASES)
def test_the_router_keeps(check, config: ModelConfig, seed: int) -> None:
    check(route, config, seed)


@pytest.mark.parametrize(
    ("check", "wrong"),
    [(check, wrong) for check, twins in PROPERTIES.items() for wrong in twins],
    ids=lambda f: f.__name__,
)
def test_the_property_rejects(check, wrong) -> None:
    assert_rejects(lambda config, seed: check(wrong, config, seed), **CASES)


# ---- ties -------------------------------------------------------------------------------------------------


def test_ties_go_to_the_lower_index() -> None:
    config = small(n_routed_experts=16, num_experts_per_tok=3, n_group=4, topk_group=2)
    indices, weights = route(torch.full((5, 16), 0.25), torch.zeros(16), config)
    assert torch.equal(indices, torch.tensor([[0, 1, 2]]).expand(5, 3))
    torch.testing.assert_close(weights, torch.full((5, 3), 2.5 / 3))


def test_ties_between_groups_go_to_the_lower_group() -> None:
    config = small(n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=1)
    scores = torch.tensor([[0.1, 0.2, 0.4, 0.3, 0.3, 0.4, 0.1, 0.1]])
    assert route(scores, torch.zeros(8), config)[0].tolist() == [[2, 3]]


@given(values=st.lists(st.integers(0, 3), min_size=1, max_size=40), k=st.integers(1, 40))
def test_best_sorts_by_value_then_index(values: list[int], k: int) -> None:
    k = min(k, len(values))
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    assert best(torch.tensor(values, dtype=torch.float32), k).tolist() == expected


# ---- the module -------------------------------------------------------------------------------------------


def test_the_gate_works_in_fp32_whatever_the_model_s_dtype() -> None:
    router = Router(small())
    torch.nn.init.normal_(router.weight)
    router.bfloat16()
    x = torch.randn(9, 24).bfloat16()
    indices, weights, scores = router(x)
    assert weights.dtype == scores.dtype == torch.float32
    expected = (x.float() @ router.weight.float().t()).sigmoid()
    torch.testing.assert_close(scores, expected)
    rounded = (x @ router.weight.t()).sigmoid().float()
    assert (scores - rounded).abs().max() > 1e-4, "BF16 would have shown"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_bias_stays_fp32_to_the_bit(dtype: torch.dtype) -> None:
    model = build(small())
    before = [r.e_score_correction_bias.clone() for r in model.routers()]
    model.to(dtype)
    for router, bias in zip(model.routers(), before, strict=True):
        assert router.weight.dtype == dtype
        assert router.e_score_correction_bias.dtype == torch.float32
        assert torch.equal(router.e_score_correction_bias, bias)
    assert (
        model.routers()[0].e_score_correction_bias
        is dict(model.named_buffers())["model.layers.1.mlp.gate.e_score_correction_bias"]
    )


def test_the_bias_is_saved_and_gets_no_gradient() -> None:
    router = Router(small())
    torch.nn.init.normal_(router.weight)
    assert "e_score_correction_bias" in router.state_dict()
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    _, weights, _ = router(torch.randn(4, 24))
    weights.square().sum().backward()
    assert router.weight.grad is not None and router.e_score_correction_bias.grad is None


@settings(max_examples=10)
@given(config=configs(mtp=(0, 2)), seed=SEEDS, batch=st.integers(1, 3), length=st.integers(3, 8))
def test_loads_sum_to_tokens_times_top_k(config: ModelConfig, seed: int, batch: int, length: int) -> None:
    out = build(config, seed)(tokens(config, batch, length, seed), return_mtp=True)
    layers, main = len(config.moe_layers), config.num_hidden_layers - config.first_k_dense_replace
    assert out.expert_load.shape == (layers, config.n_routed_experts)
    for row, load in enumerate(out.expert_load):
        depth = max(row - main + 1, 0)
        assert load.sum() == batch * (length - depth) * config.num_experts_per_tok


def test_loads_of_modules_that_did_not_run_are_zero() -> None:
    config = small(num_nextn_predict_layers=2)
    out = build(config)(tokens(config, 2, 6))
    assert out.expert_load[0].sum() == 2 * 6 * 3 and not out.expert_load[1:].any()
    assert out.expert_indices[1:] == [None, None]


# ---- the sequence-wise balance loss -----------------------------------------------------------------------


def loss_by_loop(scores: torch.Tensor, k: int, alpha: float) -> torch.Tensor:
    """Equations 17 to 20, sum by sum."""
    total = scores.new_zeros(())
    batch, n_tokens, n_experts = scores.shape
    for b in range(batch):
        for i in range(n_experts):
            f = sum(
                1.0 for t in range(n_tokens) if i in scores[b, t].detach().sort(descending=True).indices[:k]
            )
            p = sum(scores[b, t, i] / scores[b, t].sum() for t in range(n_tokens)) / n_tokens
            total = total + alpha * f * n_experts / (k * n_tokens) * p
    return total / batch


def batch_wise(scores: torch.Tensor, k: int, alpha: float) -> torch.Tensor:
    """Balances the batch, not each sequence."""
    return sequence_balance_loss(scores.flatten(0, 1)[None], k, alpha)


def softmaxed(scores: torch.Tensor, k: int, alpha: float) -> torch.Tensor:
    return sequence_balance_loss(scores.softmax(-1), k, alpha)


BALANCE = {
    "batch": st.integers(1, 3),
    "n_tokens": st.integers(1, 5),
    "n_experts": st.integers(2, 6),
    "seed": SEEDS,
}


def check_balance(loss, batch: int, n_tokens: int, n_experts: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, n_tokens, n_experts, dtype=torch.float64, generator=generator)
    scores = logits.sigmoid().requires_grad_()
    k = 1 + seed % n_experts
    got, expected = loss(scores, k, 0.3), loss_by_loop(scores, k, 0.3)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    (got_grad,) = torch.autograd.grad(got, scores)
    (expected_grad,) = torch.autograd.grad(expected, scores)
    torch.testing.assert_close(got_grad, expected_grad, rtol=0, atol=1e-12)


@given(**BALANCE)
def test_the_balance_loss_and_its_gradient_are_the_paper_s(
    batch: int, n_tokens: int, n_experts: int, seed: int
) -> None:
    check_balance(sequence_balance_loss, batch, n_tokens, n_experts, seed)


@pytest.mark.parametrize("wrong", [batch_wise, softmaxed])
def test_the_balance_check_rejects(wrong) -> None:
    assert_rejects(lambda **case: check_balance(wrong, **case), **BALANCE)


@given(batch=st.integers(1, 4), n_tokens=st.integers(1, 6), seed=SEEDS)
def test_the_balance_loss_leaves_padding_out(batch: int, n_tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(batch, n_tokens, 5, dtype=torch.float64, generator=generator)
    lengths = torch.randint(0, n_tokens + 1, (batch,), generator=generator)
    valid = torch.arange(n_tokens) < lengths[:, None]
    cut = [row[None, :n] for row, n in zip(scores, lengths.tolist(), strict=True) if n]
    by_sequence, by_batch = (balance_loss(scores, 2, 0.3, over, valid) for over in ("sequence", "batch"))
    if not cut:
        assert by_sequence == by_batch == 0
        return
    expected = torch.stack([loss_by_loop(row, 2, 0.3) for row in cut]).mean()
    torch.testing.assert_close(by_sequence, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(by_batch, loss_by_loop(torch.cat(cut, 1), 2, 0.3), rtol=0, atol=1e-12)


def test_the_balance_loss_by_finite_differences() -> None:
    scores = torch.randn(2, 3, 5, dtype=torch.float64).sigmoid().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: sequence_balance_loss(s, 2, 0.5), (scores,))


def test_perfect_balance_costs_alpha() -> None:
    """Uniform affinities and each expert chosen equally often: f_i = 1, Σ P_i = 1."""
    eye = torch.eye(4)[None] * 1e-4 + 0.5
    torch.testing.assert_close(sequence_balance_loss(eye, 1, 0.01), torch.tensor(0.01))


def test_descending_the_loss_evens_the_affinities() -> None:
    logits = torch.randn(1, 64, 8, generator=torch.Generator().manual_seed(1))
    logits[..., 0] += 1.5
    logits.requires_grad_()
    start = sequence_balance_loss(logits.sigmoid(), 2, 1.0).item()
    for _ in range(50):
        (grad,) = torch.autograd.grad(sequence_balance_loss(logits.sigmoid(), 2, 1.0), logits)
        logits.data -= 20 * grad
    assert sequence_balance_loss(logits.sigmoid(), 2, 1.0).item() < start - 0.05


@given(seed=SEEDS, inside=st.sampled_from([torch.bfloat16, torch.float16]), dtype=st.sampled_from(
    [torch.float32, torch.bfloat16, torch.float16]), tokens=st.integers(1, 40))  # fmt: skip
def test_autocast_changes_no_gate(seed: int, inside: torch.dtype, dtype: torch.dtype, tokens: int) -> None:
    """Affinities, experts and gate values to the bit, forward; and the gradient has the precision it had."""
    generator = torch.Generator().manual_seed(seed)
    router = Router(small())
    router.weight.data.normal_(0, 0.3, generator=generator)
    router.to(dtype)
    x = torch.randn(tokens, small().hidden_size, generator=generator).to(dtype).requires_grad_()
    outside = router(x)
    with torch.autocast("cpu", inside):
        within = router(x)
    for a, b in zip(outside, within, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert within[2].dtype == torch.float32
    gradients = [torch.autograd.grad(out[1].sum() + out[2].square().sum(), x)[0] for out in (outside, within)]
    assert torch.equal(*gradients)
