"""The choice of experts in NumPy and plain Python against the router's."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3lib import ModelConfig
from dsv3lib.backends import few_routing
from dsv3lib.errors import InputError
from dsv3lib.layers.experts import sort_by_expert
from dsv3lib.layers.router import route

NANO = ModelConfig.preset("nano")
EIGHTHS = st.integers(0, 8).map(lambda n: n / 8)


@given(data=st.data(), n=st.integers(1, 2 * few_routing.ONE_BY_ONE))
def test_routes_as_the_router_does(data, n) -> None:
    groups = data.draw(st.sampled_from([1, 2, 4]))
    config = NANO.replace(
        n_routed_experts=8, n_group=groups, topk_group=data.draw(st.integers(1, groups)),
        num_experts_per_tok=data.draw(st.integers(1, 2)), norm_topk_prob=data.draw(st.booleans()),
    )  # fmt: skip
    # Multiples of 1/8 are exact in FP32 as in Python, and often equal: ties must be settled alike.
    row = st.lists(EIGHTHS, min_size=8, max_size=8)
    scores = np.array(data.draw(st.lists(row, min_size=n, max_size=n)), np.float32)
    bias = np.array(data.draw(st.lists(st.integers(-16, 16).map(lambda n: n / 8), min_size=8, max_size=8)), np.float32)
    indices, weights = route(torch.from_numpy(scores), torch.from_numpy(bias), config)
    for form in (few_routing.route_rows, few_routing.route_together):
        chosen, gates = form(scores, bias, config)
        assert chosen.tolist() == indices.tolist() and gates.dtype == scores.dtype
        torch.testing.assert_close(torch.from_numpy(gates), weights)


@pytest.mark.parametrize("n", [1, few_routing.ONE_BY_ONE + 1])
def test_a_spoilt_model_is_refused(n) -> None:
    scores = np.full((n, 8), 0.5, np.float32)
    scores[-1, 3] = np.nan
    with pytest.raises(InputError, match="1 of "):
        few_routing.route_rows(scores, np.zeros(8, np.float32), NANO.replace(n_routed_experts=8))


@given(n=st.integers(1, 9), each=st.integers(1, 4), experts=st.integers(4, 9), seed=st.integers(0, 99))
def test_visits_are_sorted_as_the_layers_sort_them(n, each, experts, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.stack([torch.randperm(experts, generator=generator)[:each] for _ in range(n)])
    found, expected = few_routing.sort_visits(indices.numpy()), sort_by_expert(indices, experts)
    flat = indices.flatten().numpy()
    covered = []
    for expert, part in found.parts:
        assert part.stop > part.start and (flat[found.order[part]] == expert).all()
        covered += range(part.start, part.stop)
    assert covered == list(range(n * each))
    assert (found.order[found.inverse] == np.arange(n * each)).all() and (found.order // each == found.token).all()
    if n > 1:
        assert found.order.tolist() == expected.order.tolist() and found.token.tolist() == expected.token.tolist()
        assert found.inverse.tolist() == expected.inverse.flatten().tolist()
