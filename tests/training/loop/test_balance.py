"""The bias update and the measures of imbalance: by hand, by property, and on a router that is pulled apart."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3lib import DeepSeekV3, ModelConfig
from dsv3lib.errors import ConfigError, InputError
from dsv3lib.layers.router import Router, balance_loss, route
from dsv3lib.training.loop.balance import (
    balance_settings,
    domain_load,
    load_entropy,
    max_violation,
    update_bias,
)
from dsv3lib.training.loop.settings import TrainingConfig

loads = st.lists(st.integers(0, 10_000), min_size=1, max_size=12)


def test_overloaded_goes_down_underloaded_up_and_the_mean_stays():
    bias = torch.tensor([0.5, 0.5, 0.5, 0.5])
    update_bias(bias, torch.tensor([9, 5, 5, 1]), 0.25)
    assert bias.tolist() == [0.25, 0.5, 0.5, 0.75]


def test_only_the_sign_of_the_violation_counts():
    gentle, flooded = torch.zeros(3), torch.zeros(3)
    update_bias(gentle, torch.tensor([4, 3, 2]), 0.001)
    update_bias(flooded, torch.tensor([4000, 2, 1]), 0.001)
    assert gentle.sign().tolist() == [-1, 0, 1]
    assert torch.equal(flooded, torch.tensor([-0.001, 0.001, 0.001]))


def test_changes_the_routers_own_buffer_in_place_and_without_gradient():
    router = Router(ModelConfig.preset("nano"))
    buffer = router.e_score_correction_bias
    address = buffer.data_ptr()
    update_bias(router, torch.arange(8), 0.01)
    assert router.e_score_correction_bias is buffer and buffer.data_ptr() == address
    assert not buffer.requires_grad and buffer.grad_fn is None and buffer.dtype == torch.float32
    assert buffer[0] > 0 > buffer[-1]


@given(loads, st.floats(0, 1, allow_nan=False))
def test_update_agrees_with_exact_arithmetic(load, speed):
    bias = torch.zeros(len(load))
    update_bias(bias, torch.tensor(load), speed)
    mean = Fraction(sum(load), len(load))
    step = torch.tensor(speed, dtype=torch.float32).item()
    assert bias.tolist() == [step * ((mean > n) - (mean < n)) for n in load]


def test_refuses_what_would_drive_the_load_apart_or_make_no_sense():
    bias, load = torch.zeros(4), torch.ones(4, dtype=torch.int64)
    for speed in (-0.001, float("nan"), float("inf")):
        with pytest.raises(InputError, match="speed"):
            update_bias(bias, load, speed)
    with pytest.raises(InputError, match=r"load: shape \(3,\), expected \(4,\)"):
        update_bias(bias, torch.ones(3, dtype=torch.int64), 0.1)
    with pytest.raises(InputError, match="float32"):
        update_bias(bias.to(torch.bfloat16), load, 0.1)
    assert torch.equal(bias, torch.zeros(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_of_either_precision_is_balanced(dtype):
    router = Router(ModelConfig.preset("nano")).to(dtype)
    update_bias(router, torch.arange(8), 0.25)
    assert router.e_score_correction_bias.tolist() == [0.25] * 4 + [-0.25] * 4
    assert router.e_score_correction_bias.dtype == dtype


GRID = 2.0**-12  # everything below is a multiple of it and sums to few bits: no rounding anywhere


@given(
    seed=st.integers(0, 2**31 - 1),
    groups=st.sampled_from([(1, 1), (4, 2), (2, 1), (8, 4)]),
    steps=st.integers(1, 40),
)
def test_no_choice_of_experts_depends_on_whether_biases_are_centred(seed, groups, steps):
    """Two runs from the same scores, one centred after each update: the same experts and weights at every step."""
    config = ModelConfig.preset("tiny").replace(
        n_group=groups[0], topk_group=groups[1], num_experts_per_tok=4
    )
    plain, centred = apart_by_centring(config, seed, steps, route)
    torch.testing.assert_close(plain - plain.mean(), centred - centred.mean(), rtol=0, atol=0)
    assert centred.mean() == 0


def apart_by_centring(config, seed, steps, choose):
    """Biases of a plain and of a centred run, after choices that are asserted equal at each step."""
    generator, experts = torch.Generator().manual_seed(seed), config.n_routed_experts
    skew = torch.randint(-1000, 1000, (experts,), generator=generator)
    plain, centred = torch.zeros(experts), torch.zeros(experts)
    for _ in range(steps):
        scores = (
            (torch.randint(1000, 3000, (64, experts), generator=generator) + skew).clamp(0, 4095)
        ) * GRID
        (indices, weights), (others, other_weights) = (
            choose(scores, plain, config),
            choose(scores, centred, config),
        )
        assert torch.equal(indices, others) and torch.equal(weights, other_weights)
        load = torch.bincount(indices.flatten(), minlength=experts)
        update_bias(plain, load, 64 * GRID)
        update_bias(centred, load, 64 * GRID, centre=True)
    return plain, centred


def test_that_check_rejects_a_mask_of_zero():
    """With dropped groups at 0 instead of −inf the choice does depend on where the biases stand as a whole."""

    def masked_with_zero(scores, bias, config):
        steered = (scores + bias - 1).unflatten(-1, (config.n_group, -1))  # biases mostly below zero
        kept = steered.topk(2).values.sum(-1).topk(config.topk_group).indices
        mask = torch.zeros(steered.shape[:2]).scatter_(-1, kept, 1.0)
        chosen = (steered * mask[..., None]).flatten(-2).sort(dim=-1, descending=True, stable=True).indices
        indices = chosen[..., : config.num_experts_per_tok]
        return indices, scores.gather(-1, indices)

    with pytest.raises(AssertionError):
        apart_by_centring(ModelConfig.preset("tiny"), 0, 40, masked_with_zero)


def test_biases_drift_as_a_whole_unless_they_are_centred():
    """One expert that takes all: fifteen biases rise and one falls, at every step."""
    load = torch.tensor([100] + [1] * 15)
    drifting, centred = torch.zeros(16), torch.zeros(16)
    for _ in range(10):
        update_bias(drifting, load, 2.0**-6)
        update_bias(centred, load, 2.0**-6, centre=True)
    assert drifting.mean() == 10 * 2.0**-6 * 14 / 16 and centred.mean() == 0
    before = centred.clone()
    update_bias(centred + 5, torch.zeros(16).long(), 0.1, centre=True)  # a module that did not run
    assert torch.equal(before, centred)


def test_a_skewed_router_is_balanced_by_the_bias_and_not_without():
    """The control is γ = 0: the same scores, the same number of steps, no balance."""
    config = ModelConfig.preset("nano").replace(n_group=1, topk_group=1)
    skew = torch.linspace(-1.0, 1.0, config.n_routed_experts)

    def balance_after(speed):
        generator, bias = torch.Generator().manual_seed(0), torch.zeros(config.n_routed_experts)
        for _ in range(300):
            scores = torch.sigmoid(torch.randn(256, config.n_routed_experts, generator=generator) + skew)
            indices, _ = route(scores, bias, config)
            load = torch.bincount(indices.flatten(), minlength=config.n_routed_experts)
            update_bias(bias, load, speed)
        return max_violation(load).item()

    assert balance_after(0.0) > 0.8
    assert balance_after(0.002) < 0.25


def test_max_violation_by_hand():
    load = torch.tensor([[4, 4, 4, 4], [8, 4, 4, 0], [16, 0, 0, 0], [0, 0, 0, 0]])
    assert max_violation(load).tolist() == [0.0, 1.0, 3.0, 0.0]


def test_batches_may_be_lopsided_where_the_whole_is_balanced():
    one, other = torch.tensor([6, 2]), torch.tensor([2, 6])
    assert max_violation(one).item() == max_violation(other).item() == 0.5
    assert max_violation(one + other).item() == 0.0


@given(loads.filter(sum), st.integers(1, 50))
def test_measures_do_not_depend_on_scale_or_order(load, times):
    load = torch.tensor(load)
    violation, entropy = max_violation(load), load_entropy(load)
    assert 0 <= violation <= len(load) - 1 + 1e-9
    assert -1e-9 <= entropy <= 1 + 1e-9
    torch.testing.assert_close(max_violation(load.flip(0) * times), violation)
    torch.testing.assert_close(load_entropy(load.flip(0) * times), entropy)


def test_entropy_by_hand():
    load = torch.tensor([[5, 5, 5, 5], [10, 10, 0, 0], [20, 0, 0, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(load_entropy(load), torch.tensor([1.0, 0.5, 0.0, 0.0], dtype=torch.float64))
    assert load_entropy(torch.tensor([3])).item() == 1.0


def test_shares_are_no_load():
    for measure in (max_violation, load_entropy):
        with pytest.raises(InputError, match="expected one count"):
            measure(torch.zeros(3, 0, dtype=torch.int64))


def test_load_by_domain_adds_up_and_knows_who_went_where():
    indices = torch.tensor([[[0, 1], [0, 2], [3, 1]]])  # one row, three tokens, two experts each
    shorter = indices[:, :2]
    domains = torch.tensor([[0, 0, 1]])
    load = domain_load([indices, None, shorter], domains, 2, 4)
    assert load[:, 0].tolist() == [[2, 1, 1, 0], [0, 1, 0, 1]]
    assert load[:, 1].tolist() == [[0] * 4, [0] * 4]
    assert load[:, 2].tolist() == [[2, 1, 1, 0], [0, 0, 0, 0]]
    assert torch.equal(load.sum(0)[0], torch.bincount(indices.flatten(), minlength=4))


@pytest.mark.parametrize(
    ("way", "speed", "alpha", "over"),
    [("none", 0.0, 0.0, "sequence"), ("sequence", 0.0, 1e-3, "sequence"), ("batch", 0.0, 1e-3, "batch"),
     ("bias", 1e-2, 0.0, "sequence")],
)  # fmt: skip
def test_each_way_balances_by_one_means_alone(way, speed, alpha, over):
    settings = TrainingConfig(steps=1, **balance_settings(way))
    assert (settings.bias_speed, settings.aux_loss_alpha, settings.aux_loss_over) == (speed, alpha, over)


def test_a_number_that_a_way_has_no_use_for_is_refused():
    assert balance_settings("bias", 0.5, 0.25) == {
        "bias_speed": 0.5, "aux_loss_alpha": 0.25, "aux_loss_over": "sequence"
    }  # fmt: skip
    for way, speed, alpha in (("none", 0.1, None), ("none", None, 0.1), ("sequence", 0.1, None)):
        with pytest.raises(ConfigError, match="has no use for it"):
            balance_settings(way, speed, alpha)
    with pytest.raises(ConfigError, match="balance: 'prayer', expected one of none, sequence, batch, bias"):
        balance_settings("prayer")
    with pytest.raises(ConfigError, match="bias_speed: -1"):
        TrainingConfig(steps=1, **balance_settings("bias", speed=-1.0))
    with pytest.raises(ConfigError, match="aux_loss_over: 'layer', expected sequence or batch"):
        TrainingConfig(steps=1, aux_loss_over="layer")


def test_a_batch_of_one_sided_sequences_is_unbalanced_by_sequence_and_balanced_by_batch():
    """Two sequences that each want other experts: only the sequence-wise loss minds."""
    scores = torch.full((2, 4, 4), 0.1)
    scores[0, :, :2], scores[1, :, 2:] = 0.9, 0.9
    by_sequence, by_batch = (balance_loss(scores, 2, 1.0, over).item() for over in ("sequence", "batch"))
    assert by_batch == pytest.approx(1.0)
    assert by_sequence == pytest.approx(1.8)  # f = 2 on two experts that hold 0.45 of the affinity each


@pytest.mark.parametrize("over", ["sequence", "batch"])
def test_gradient_of_the_auxiliary_loss_in_fp64(over):
    """f is a count, so it has no gradient: finite differences see P alone while no choice changes."""
    scores = torch.rand(3, 5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: balance_loss(s, 2, 0.5, over), (scores,), eps=1e-7)


def test_recomputation_does_not_count_the_load_twice():
    config = ModelConfig.preset("nano")
    ids = torch.arange(12).view(2, 6)
    loads = []
    for recompute in (False, True):
        model = DeepSeekV3(config, torch.Generator().manual_seed(0), recompute=recompute)
        seen = _visits_routed(model)
        out = model(ids, labels=ids)
        out.loss.backward()
        loads.append(out.expert_load)
        assert sum(seen) == int(out.expert_load.sum()), "backward must not route again"
    assert torch.equal(*loads)
    assert loads[0].sum(1).tolist() == [2 * 6 * 2, 2 * 6 * 2, 2 * 5 * 2]  # the MTP module sees one token less


def _visits_routed(model):
    """A list that grows by the number of visits whenever a router is called."""
    seen = []
    for router in model.routers():
        router.register_forward_hook(lambda _module, _inputs, out: seen.append(out[0].numel()))
    return seen


def test_nan_affinities_are_refused_before_they_win_every_choice():
    config = ModelConfig.preset("nano")
    scores = torch.rand(5, config.n_routed_experts)
    scores[2, 3] = float("nan")
    with pytest.raises(InputError, match=r"scores: 1 of 40 are NaN, expected affinities in \[0, 1\]"):
        route(scores, torch.zeros(config.n_routed_experts), config)
    model = DeepSeekV3(config, torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.model.embed_tokens.weight[7, 0] = float("nan")
    with pytest.raises(InputError, match="the hidden state or the router's weight is spoilt"):
        model(torch.tensor([[6, 7, 8]]))
