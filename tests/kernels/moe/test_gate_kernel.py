"""The gate's plain form: the paper's words in plain Python, exact gradients, and what it refuses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, assert_rejects, unchecked

from dsv3lib.errors import InputError, KernelError
from dsv3lib.kernels.moe.gate_kernel import choose, gate, gate_ref


@st.composite
def gates(draw: st.DrawFn) -> dict:
    """Any gate: sizes that are no powers of two, one group, all groups kept."""
    n_group = draw(st.sampled_from([1, 1, 2, 3, 4, 8]))
    group = draw(st.integers(1 if n_group == 1 else 2, 9))
    kept = draw(st.integers(1, n_group))
    return {
        "experts": n_group * group,
        "n_group": n_group,
        "topk_group": kept,
        "top_k": draw(st.integers(1, min(8, kept * group))),
        "norm": draw(st.booleans()),
        "scale": draw(st.sampled_from([1.0, 2.5])),
    }


CASES = {"how": gates(), "tokens": st.integers(0, 9), "seed": SEEDS}


def draw(how: dict, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Logits in steps of 1/2, so that many are equal, and a bias that puts most biased affinities below zero."""
    how = dict(how)
    generator = torch.Generator().manual_seed(seed)
    logits = (
        torch.randn(tokens, how.pop("experts"), generator=generator, dtype=torch.float64).mul(4).round() / 2
    )
    bias = torch.randn(logits.shape[1], generator=generator, dtype=torch.float64).round() / 4 - 0.5
    return logits, bias, how


def in_plain_python(logits, bias, *, top_k, n_group, topk_group, norm, scale):
    """Token by token: sort by (affinity down, index up)."""
    all_indices, all_weights = [], []
    for s in logits.sigmoid().tolist():
        steered = [a + b for a, b in zip(s, bias.tolist(), strict=True)]
        size = len(s) // n_group
        groups = range(n_group)
        totals = [sum(sorted(steered[g * size : (g + 1) * size], reverse=True)[:2]) for g in groups]
        kept = sorted(groups, key=lambda g: (-totals[g], g))[:topk_group]
        allowed = [e for e in range(len(s)) if e // size in kept]
        chosen = sorted(allowed, key=lambda e: (-steered[e], e))[:top_k]
        total = sum(s[e] for e in chosen) if norm else 1.0
        all_indices.append(chosen)
        all_weights.append([s[e] / total * scale for e in chosen])
    shape = (len(logits), top_k)
    return (
        torch.tensor(all_indices, dtype=torch.int64).view(shape),
        torch.tensor(all_weights, dtype=torch.float64).view(shape),
    )


def check(candidate, how: dict, tokens: int, seed: int) -> None:
    logits, bias, how = draw(how, tokens, seed)
    indices, weights, scores = candidate(logits, bias, **how)
    expected_indices, expected_weights = in_plain_python(logits, bias, **how)
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-12, atol=0)
    assert torch.equal(scores, logits.sigmoid())


@given(**CASES)
def test_gate_is_the_papers_rule(how, tokens, seed):
    check(gate_ref, how, tokens, seed)
    check(gate, how, tokens, seed)


def weighs_with_the_bias(logits, bias, **how):
    indices, _, scores = gate_ref(logits, bias, **how)
    weights = (scores + bias).gather(-1, indices)
    if how["norm"]:
        weights = weights / weights.sum(-1, keepdim=True)
    return indices, weights * how["scale"], scores


def the_higher_index_first(logits, bias, **how):
    indices, weights, scores = gate_ref(logits.flip(-1), bias.flip(-1), **how)
    return logits.shape[-1] - 1 - indices, weights, scores.flip(-1)


@pytest.mark.parametrize("wrong", [weighs_with_the_bias, the_higher_index_first])
def test_a_wrong_gate_is_seen(wrong):
    assert_rejects(lambda how, tokens, seed: check(wrong, how, tokens, seed), **CASES)


@given(how=gates(), seed=SEEDS)
def test_gradients_are_exact(how, seed):
    logits, bias, how = draw(how, 3, seed)
    logits = (logits + torch.rand_like(logits) * 0.1).requires_grad_()  # no ties: a choice must not jump

    def weights_and_scores(x):
        return gate(x, bias, **how)[1:]

    assert torch.autograd.gradcheck(weights_and_scores, (logits,), eps=1e-7, atol=1e-6)


def test_the_bias_gets_no_gradient_and_changes_no_weight_of_the_same_choice():
    logits, bias = torch.randn(5, 6), torch.full((6,), 0.25)
    same = gate(logits, bias, top_k=2)
    assert all(torch.equal(a, b) for a, b in zip(same, gate(logits, torch.zeros(6), top_k=2), strict=True))


def test_scores_are_left_out_when_nobody_asks():
    assert gate(torch.randn(2, 4), torch.zeros(4), top_k=1, with_scores=False)[2] is None


def test_nan_is_refused_where_looking_costs_nothing():
    logits = torch.zeros(3, 4)
    logits[1, 2] = float("nan")
    with pytest.raises(InputError, match="scores: 1 of 12 are NaN"):
        gate(logits, torch.zeros(4), top_k=1)
    with pytest.raises(InputError, match="NaN"):
        choose(
            logits, torch.zeros(4), top_k=1, n_group=1, topk_group=1, norm=True, scale=1.0
        )  # fmt: skip


@pytest.mark.parametrize(
    "change, told",
    [
        (
            {"logits": torch.zeros(2, 8, dtype=torch.bfloat16)},
            "logits is bfloat16, expected float32 or float64",
        ),
        ({"bias": torch.zeros(7)}, r"bias has shape \[7\], expected \[8\]"),
        ({"bias": torch.zeros(8, dtype=torch.float16)}, "bias is float16"),
        ({"logits": torch.zeros(8, 2).t()}, "last dimension side by side"),
        ({"n_group": 3}, "n_group is 3, expected a divisor of the 8 experts"),
        ({"n_group": 8}, "two or more to a group"),
        ({"n_group": 2, "topk_group": 3}, r"topk_group is 3, expected 1 to n_group \(2\)"),
        ({"n_group": 4, "topk_group": 1, "top_k": 3}, "top_k is 3, expected 1 to 2"),
        ({"top_k": 0}, "top_k is 0, expected 1 to 8"),
    ],
)
def test_bad_operands_are_refused_before_any_work(change, told):
    call = {"logits": torch.zeros(2, 8), "bias": torch.zeros(8), "top_k": 2} | change
    with unchecked(), pytest.raises(KernelError, match=told):
        gate(call.pop("logits"), call.pop("bias"), **call)
