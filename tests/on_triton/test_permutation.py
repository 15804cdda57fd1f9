"""The permutation's kernels against their plain form: order, counts, sums, gradients, visits that go nowhere."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, assert_rejects

from dsv3lib.kernels.moe.permutation import permute, permute_ref, unpermute, unpermute_ref
from dsv3lib.kernels.moe.placement import place_visits, place_visits_ref

CASES = {
    "tokens": st.sampled_from([0, 1, 2, 7, 33]),
    "visits": st.integers(1, 5),
    "experts": st.sampled_from([1, 2, 5, 16, 17]),
    "width": st.sampled_from([1, 5, 64, 130]),
    "seed": SEEDS,
}
SMALL = {
    "CHUNK": 32,
    "TILE": 16,
    "BLOCKS": 2,
    "num_warps": 1,
    "num_stages": 1,
}  # many blocks out of few visits


def draw(tokens, visits, experts, width, seed, device, dtype=torch.float32):
    """Rows cut out of a wider tensor of NaN, experts of which some get nobody, weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.full((tokens, width + 5), float("nan"))
    x[:, :width] = torch.randn(tokens, width, generator=generator)
    indices = (torch.rand(tokens, visits, generator=generator).square() * experts).long()
    weights = torch.rand(tokens, visits, generator=generator)
    return x.to(device, dtype)[:, :width], indices.to(device), weights.to(device)


@given(visits=st.integers(0, 300), experts=st.sampled_from([1, 3, 16, 100]), seed=SEEDS)
def test_places_over_many_blocks(device, visits, experts, seed):
    indices = draw(visits, 1, experts, 1, seed, device)[1]
    for settings in (None, SMALL):
        positions, counts = place_visits(indices, experts, settings)
        _, expected_positions, expected_counts = place_visits_ref(indices, experts)
        assert torch.equal(positions, expected_positions) and torch.equal(counts, expected_counts)


def test_places_at_the_size_that_ships(device):
    """More than two blocks of the settings that ship, all experts of V3."""
    indices = torch.randint(0, 256, (321, 8), device=device)
    positions, counts = place_visits(indices, 256)
    _, expected_positions, expected_counts = place_visits_ref(indices, 256)
    assert torch.equal(positions, expected_positions) and torch.equal(counts, expected_counts)


@given(**CASES)
def test_permute_to_the_bit(device, tokens, visits, experts, width, seed):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x, indices, _ = draw(tokens, visits, experts, width, seed, device, dtype)
        for got, expected in zip(permute(x, indices, experts), permute_ref(x, indices, experts), strict=True):
            assert torch.equal(got, expected)


def test_e4m3_is_carried_as_it_is(device):
    x = torch.randn(9, 128, device=device).to(torch.float8_e4m3fn)
    indices = torch.randint(0, 4, (9, 3), device=device)
    rows, expected = permute(x, indices, 4)[0], permute_ref(x.view(torch.uint8), indices, 4)[0]
    assert torch.equal(rows.view(torch.uint8), expected)


def check_home(candidate, device, dtype, tokens, visits, experts, width, seed):
    y, indices, weights = draw(tokens * visits, 1, experts, width, seed, device, dtype)
    weights = weights.view(tokens, visits)
    positions = place_visits(indices.view(tokens, visits), experts)[0]
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
    for w in (weights, None):
        torch.testing.assert_close(candidate(y, positions, w), unpermute_ref(y, positions, w), **tolerance)


@given(**CASES)
def test_unpermute(device, tokens, visits, experts, width, seed):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        check_home(unpermute, device, dtype, tokens, visits, experts, width, seed)


def test_a_sum_that_forgets_a_visit_is_seen(device):
    def forgetful(y, positions, weights):
        return unpermute(y, torch.where(positions == 1, -1, positions), weights)

    assert_rejects(lambda **case: check_home(forgetful, device, torch.float32, **case), **CASES)


@given(**CASES)
def test_gradients(device, tokens, visits, experts, width, seed):
    """Out, through something that is no identity, and home: the gradients of rows and weights."""
    x, indices, weights = draw(tokens, visits, experts, width, seed, device)
    towards = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)).to(device)

    def gradients(out, home, x, w):
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        rows, _, positions = out(x, indices, experts)
        y = home(rows.sin(), positions, w) + home(rows, positions, None)
        return torch.autograd.grad(y, (x, w), towards.to(y.dtype))

    got = gradients(permute, unpermute, x, weights)
    expected = gradients(permute_ref, unpermute_ref, x.double(), weights.double())
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_gradients_in_half_precision_and_from_a_gradient_that_is_expanded(device):
    x, indices, weights = draw(6, 3, 4, 40, 0, device, torch.float16)
    x, weights = x.requires_grad_(), weights.requires_grad_()
    rows, _, positions = permute(x, indices, 4)
    unpermute(rows, positions, weights).sum().backward()
    torch.testing.assert_close(
        x.grad, weights.detach().sum(1, keepdim=True).expand(-1, 40).half(), rtol=2e-3, atol=1e-3
    )
    torch.testing.assert_close(
        weights.grad, x.detach().float().sum(1, keepdim=True).expand(-1, 3), rtol=1e-3, atol=1e-3
    )


def test_the_same_bits_every_time(device):
    x, indices, weights = draw(33, 4, 5, 64, 3, device)
    rows, _, positions = permute(x, indices, 5)
    first = unpermute(rows, positions, weights)
    assert all(torch.equal(first, unpermute(rows, positions, weights)) for _ in range(3))


@pytest.mark.parametrize("settings", [None, SMALL])
def test_a_visit_to_nobody_is_left_out(device, settings):
    """Nobody looks at indices on a GPU: one outside the experts moves no other, writes nowhere, counts as zero."""
    indices = torch.randint(0, 4, (40, 2), device=device)
    wild = indices.clone()
    wild[3, 1], wild[17, 0], wild[30, 1] = -1, 4, 2**40
    inside = (wild >= 0) & (wild < 4)
    positions, counts = place_visits(wild, 4, settings)
    assert torch.equal(counts, torch.bincount(wild[inside], minlength=4))
    assert (positions[~inside] == -1).all()
    assert torch.equal(positions[inside], place_visits_ref(wild[inside][:, None], 4)[1].flatten())
    y = torch.randn(80, 8, device=device)
    weights = torch.ones(40, 2, device=device, requires_grad=True)
    home = unpermute(y, positions, weights)
    torch.testing.assert_close(home, (y[positions.clamp(min=0)] * inside[..., None]).sum(1))
    home.sum().backward()
    assert (weights.grad[~inside] == 0).all()
