"""The gate's kernel against its plain form: any number of experts and groups, ties, NaN, both gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, assert_rejects

from dsv3lib.errors import KernelError
from dsv3lib.kernels.moe.gate_kernel import choose, gate, gate_ref

V3 = {"experts": 256, "n_group": 8, "topk_group": 4, "top_k": 8, "norm": True, "scale": 2.5}


@st.composite
def gates(draw: st.DrawFn) -> dict:
    """Any gate: sizes that are no powers of two, one group, all groups kept."""
    n_group = draw(st.sampled_from([1, 1, 2, 3, 4, 8]))
    group = draw(st.integers(1 if n_group == 1 else 2, 40))
    kept = draw(st.integers(1, n_group))
    return {
        "experts": n_group * group,
        "n_group": n_group,
        "topk_group": kept,
        "top_k": draw(st.integers(1, min(9, kept * group))),
        "norm": draw(st.booleans()),
        "scale": draw(st.sampled_from([1.0, 2.5])),
    }


CASES = {"how": gates() | st.just(V3), "tokens": st.integers(0, 9), "seed": SEEDS}


def draw(how: dict, tokens: int, seed: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Logits in steps of 1/2 (many are equal), rows cut out of a wider NaN-filled tensor, a mostly negative bias."""
    how = dict(how)
    generator = torch.Generator().manual_seed(seed)
    experts = how.pop("experts")
    logits = torch.full((tokens, experts + 3), float("nan"))
    logits[:, :experts] = torch.randn(tokens, experts, generator=generator).mul(4).round() / 2
    bias = torch.randn(experts, generator=generator).round() / 4 - 0.5
    return logits.to(device)[:, :experts], bias.to(device), how


def check(candidate, device, how, tokens, seed) -> None:
    """The affinities by value; then the choice must follow from them to the last bit."""
    logits, bias, how = draw(how, tokens, seed, device)
    indices, weights, scores = candidate(logits, bias, **how)
    torch.testing.assert_close(scores, logits.sigmoid(), rtol=1e-6, atol=1e-30)
    expected_indices, expected_weights = choose(scores, bias, **how)
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-6, atol=0)
    again = candidate(logits, bias, **how)
    assert torch.equal(again[0], indices) and torch.equal(again[1], weights)


@given(**CASES)
def test_gate(device, how, tokens, seed):
    check(gate, device, how, tokens, seed)


def one_group_only(logits, bias, **how):
    return gate(logits, bias, **how | {"n_group": 1, "topk_group": 1})


def without_bias(logits, bias, **how):
    return gate(logits, torch.zeros_like(bias), **how)


def another_scale(logits, bias, **how):
    return gate(logits, bias, **how | {"scale": how["scale"] * 1.0001})


@pytest.mark.parametrize("wrong", [one_group_only, without_bias, another_scale])
def test_a_wrong_gate_is_seen(device, wrong):
    assert_rejects(lambda **case: check(wrong, device, **case), **CASES)


@given(how=gates(), seed=SEEDS)
def test_without_scores_the_same_choice(device, how, seed):
    logits, bias, how = draw(how, 5, seed, device)
    whole, lean = gate(logits, bias, **how), gate(logits, bias, **how, with_scores=False)
    assert torch.equal(whole[0], lean[0]) and torch.equal(whole[1], lean[1]) and lean[2] is None


@given(
    how=gates() | st.just(V3),
    seed=SEEDS,
    uses=st.sampled_from(["weights", "scores", "both"]),
    kept=st.booleans(),
)
def test_gradients(device, how, seed, uses, kept):
    """Through the weights, the affinities (the balance loss) or both; from kept affinities and from logits."""
    logits, bias, how = draw(how, 6, seed, device)
    kept = kept or uses != "weights"
    towards = torch.randn(2, 6, logits.shape[1], generator=torch.Generator().manual_seed(seed)).to(device)

    def gradient(run, x, **more):
        x = x.detach().requires_grad_()
        _, weights, scores = run(x, bias.to(x.dtype), **how, **more)
        loss = 0.0
        if uses != "scores":
            loss = loss + (weights * towards[0, :, : how["top_k"]]).sum()
        if uses != "weights":
            loss = loss + (scores * towards[1]).sum()
        return torch.autograd.grad(loss, x)[0]

    expected = gradient(gate_ref, logits.double())
    torch.testing.assert_close(
        gradient(gate, logits, with_scores=kept).double(), expected, rtol=1e-5, atol=1e-6
    )


def test_equal_affinities_go_to_the_lower_index(device):
    indices, weights, _ = gate(
        torch.zeros(3, 256, device=device), torch.zeros(256, device=device), top_k=8, n_group=8, topk_group=4
    )
    assert indices.tolist() == [list(range(8))] * 3
    assert torch.equal(weights.cpu(), torch.full((3, 8), 0.125))


def test_saturated_and_infinite(device):
    """Affinities of exactly 0 and 1, a bias of −inf: what is chosen follows the plain rule."""
    logits = torch.tensor([[-200.0, 200.0, -200.0, 0.0, float("inf"), float("-inf")]], device=device)
    bias = torch.tensor([0.0, -1.0, 0.0, float("-inf"), 0.0, 0.0], device=device)
    for groups, kept in ((1, 1), (3, 2), (3, 3)):
        how = {"top_k": 4, "n_group": groups, "topk_group": kept, "norm": True, "scale": 1.0}
        indices, weights, scores = gate(logits, bias, **how)
        assert torch.equal(scores.cpu()[0, [1, 4]], torch.ones(2))
        expected = choose(scores.cpu(), bias.cpu(), **how)
        assert torch.equal(indices.cpu(), expected[0])
        torch.testing.assert_close(weights.cpu(), expected[1])


@pytest.mark.parametrize("sign", [1, -1])
def test_nan_goes_through_and_harms_no_other_token(device, sign):
    """A GPU is not asked: the NaN is chosen first, its token's weights are NaN, indices stay in range."""
    logits = torch.randn(5, 12, device=device)
    spoilt = logits.clone()
    spoilt[2, 7] = torch.tensor(float("nan")) * sign
    how = {"top_k": 3, "n_group": 3, "topk_group": 2, "norm": True, "scale": 1.0}
    clean, dirty = (
        gate(logits, torch.zeros(12, device=device), **how),
        gate(spoilt, torch.zeros(12, device=device), **how),
    )
    assert dirty[0][2, 0] == 7 and dirty[1][2].isnan().all()
    assert ((dirty[0] >= 0) & (dirty[0] < 12)).all() and dirty[0][2].unique().numel() == 3
    others = [0, 1, 3, 4]
    assert torch.equal(clean[0][others], dirty[0][others]) and torch.equal(clean[1][others], dirty[1][others])
    all_nan = gate(torch.full((1, 12), float("nan"), device=device), torch.zeros(12, device=device), **how)
    assert all_nan[0].tolist() == [[0, 1, 2]]


def test_more_than_256_experts(device):
    check(
        gate, device,
        {"experts": 384, "n_group": 1, "topk_group": 1, "top_k": 16, "norm": True, "scale": 1.0}, 5, 1,
    )  # fmt: skip


def test_a_bf16_logit_is_refused(device):
    with pytest.raises(KernelError, match="logits is bfloat16"):
        gate(torch.zeros(2, 4, dtype=torch.bfloat16, device=device), torch.zeros(4, device=device), top_k=1)
