"""Tokens to experts and back, plainly: every visit arrives once, in order, and comes home weighted."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, assert_rejects, unchecked

from dsv3lib.errors import KernelError
from dsv3lib.kernels.moe.permutation import permute, permute_ref, unpermute, unpermute_ref
from dsv3lib.kernels.moe.placement import place_visits

CASES = {
    "tokens": st.integers(0, 12), "visits": st.integers(1, 4), "experts": st.integers(1, 9), "seed": SEEDS,
}  # fmt: skip


def draw(
    tokens: int, visits: int, experts: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, their experts (some without a visitor, one perhaps twice), weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 5, dtype=torch.float64, generator=generator)
    indices = torch.randint(0, experts, (tokens, visits), generator=generator)
    return x, indices, torch.rand(tokens, visits, dtype=torch.float64, generator=generator)


def check_order(candidate, tokens, visits, experts, seed):
    x, indices, _ = draw(tokens, visits, experts, seed)
    rows, counts, positions = candidate(x, indices, experts)
    going = [(e, t, k) for t, choice in enumerate(indices.tolist()) for k, e in enumerate(choice)]
    assert counts.tolist() == [sum(e == i for e, _, _ in going) for i in range(experts)]
    for row, (_, t, k) in enumerate(sorted(going)):
        assert positions[t, k] == row
        assert torch.equal(rows[row], x[t])
    assert rows.shape == (tokens * visits, 5)


@given(**CASES)
def test_visits_are_sorted_by_expert_then_token(tokens, visits, experts, seed):
    check_order(permute_ref, tokens, visits, experts, seed)
    check_order(permute, tokens, visits, experts, seed)


def test_an_order_that_is_not_stable_is_seen():
    def latest_first(x, indices, experts):
        rows, counts, positions = permute_ref(x.flip(0), indices.flip(0, 1), experts)
        return rows, counts, positions.flip(0, 1)

    assert_rejects(lambda **case: check_order(latest_first, **case), **CASES)


@given(**CASES)
def test_home_again(tokens, visits, experts, seed):
    """Out and home with no change is the token times the sum of its weights."""
    x, indices, weights = draw(tokens, visits, experts, seed)
    rows, _, positions = permute(x, indices, experts)
    torch.testing.assert_close(unpermute(rows, positions, weights), x * weights.sum(1, keepdim=True))
    torch.testing.assert_close(unpermute(rows, positions), x * visits)
    low = unpermute(rows.to(torch.bfloat16), positions, weights.float())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), x * weights.sum(1, keepdim=True), rtol=2e-2, atol=2e-2)


def test_gradients_are_exact():
    x, indices, weights = draw(4, 3, 5, 0)

    def there_and_back(x, weights):
        rows, _, positions = permute(x, indices, 5)
        return unpermute(rows.sin(), positions, weights)

    assert torch.autograd.gradcheck(there_and_back, (x.requires_grad_(), weights.requires_grad_()))


def test_e4m3_is_carried_as_it_is():
    x = torch.randn(3, 4).to(torch.float8_e4m3fn)
    rows, _, positions = permute(x, torch.tensor([[1, 0], [0, 1], [1, 2]]), 3)
    assert rows.dtype == torch.float8_e4m3fn
    assert torch.equal(rows.view(torch.uint8)[positions[:, 1]], x.view(torch.uint8))


@pytest.mark.parametrize(
    "call, told",
    [
        (lambda: permute(torch.zeros(2, 4), torch.tensor([[0], [3]]), 3), r"hold 0 to 3, expected experts in \[0, 3\)"),
        (lambda: permute(torch.zeros(2, 4), torch.tensor([[-1], [0]]), 3), "hold -1 to 0"),
        (lambda: place_visits(torch.tensor([[5]]), 3), "hold 5 to 5"),
        (lambda: permute(torch.zeros(2, 4), torch.tensor([[0]]), 3), r"indices has shape \[1, 1\], expected \[2, "),
        (lambda: permute(torch.zeros(2, 4).int(), torch.tensor([[0], [1]]), 3), "x is int32"),
        (lambda: permute(torch.zeros(4, 2).t(), torch.tensor([[0], [1]]), 3), "last dimension side by side"),
        (lambda: unpermute(torch.zeros(3, 4), torch.tensor([[0], [1]])), r"y has shape \[3, 4\], expected \[2, any\]"),
        (
            lambda: unpermute(torch.zeros(2, 4), torch.tensor([[0], [1]]), torch.ones(2, 2)),
            r"weights has shape \[2, 2\], expected \[2, 1\]",
        ),
        (
            lambda: unpermute(torch.zeros(2, 4), torch.tensor([[0], [1]]), torch.ones(2, 1).half()),
            "weights is float16, expected float32",
        ),
        (lambda: unpermute(torch.zeros(2, 4).to(torch.float8_e4m3fn), torch.tensor([[0], [1]])), "y is float8_e4m3fn"),
    ],
)  # fmt: skip
def test_bad_operands_are_refused(call, told):
    with unchecked(), pytest.raises(KernelError, match=told):
        call()


def test_the_reference_adds_in_fp32():
    """A thousand times 1 and one 2048: in BF16 the ones would vanish beside it."""
    y = torch.ones(1025, 1, dtype=torch.bfloat16)
    y[0] = 2048.0
    assert unpermute_ref(y, torch.arange(1025)[None]).item() == 3072.0
