"""Traffic by hand, against a count with Python sets, and the paper's figures out of the count."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3lib import ModelConfig
from dsv3lib.errors import ConfigError, InputError
from dsv3lib.layers.experts import combine, dispatch, sort_by_expert
from dsv3lib.layers.router import route
from dsv3lib.parallel.traffic import Cluster, count_traffic

V3 = ModelConfig.preset("v3-671b")


def routed(config, tokens=512, seed=0):
    scores = torch.rand(tokens, config.n_routed_experts, generator=torch.Generator().manual_seed(seed))
    return route(scores, torch.zeros(config.n_routed_experts), config)[0]


def test_by_hand():
    """Two nodes of two GPUs of two experts; the first token at home on node 0, the second on node 1."""
    indices = torch.tensor([[0, 1, 4], [4, 5, 7]])
    traffic = count_traffic(indices, Cluster(8, 2, 2), home=torch.tensor([0, 1]))
    assert traffic.infiniband.tolist() == [[0, 1], [0, 0]]
    assert traffic.visits.tolist() == [[0, 1], [0, 0]]
    assert traffic.nvlink.tolist() == [[1, 0], [2, 1]]
    assert traffic.nodes_per_token.tolist() == [2, 1]
    away = count_traffic(indices, Cluster(8, 2, 2))
    assert away.infiniband.tolist() == [[1, 2], [0, 0]] and away.visits.tolist() == [[2, 4], [0, 0]]


@given(st.data())
def test_against_sets(data):
    nodes, gpus, each = (data.draw(st.integers(1, 3)) for _ in range(3))
    experts = nodes * gpus * each
    rows = data.draw(
        st.lists(
            st.tuples(st.integers(0, nodes - 1), st.permutations(range(experts))), min_size=1, max_size=6
        )
    )
    k = data.draw(st.integers(1, experts))
    home = torch.tensor([row[0] for row in rows])
    indices = torch.tensor([row[1][:k] for row in rows])
    traffic = count_traffic(indices, Cluster(experts, nodes, gpus), home)
    once = {(n, h, e // (gpus * each)) for n, (h, chosen) in enumerate(rows) for e in chosen[:k]}
    remote = [(h, node) for _, h, node in once if h != node]
    for i in range(nodes):
        for j in range(nodes):
            assert traffic.infiniband[i, j] == remote.count((i, j))
    handed = {(n, e // each) for n, (_, chosen) in enumerate(rows) for e in chosen[:k]}
    assert int(traffic.nvlink.sum()) == len(handed)
    assert traffic.dropped == 0
    assert (traffic.infiniband <= traffic.visits).all()


def test_four_nodes_at_most_and_more_without_the_limit():
    limited = count_traffic(routed(V3), Cluster.of(V3, 8)).nodes_per_token
    free = count_traffic(routed(V3.replace(topk_group=8)), Cluster.of(V3, 8)).nodes_per_token
    assert limited.max() == 4 and free.max() > 4
    assert free.double().mean() > limited.double().mean() + 1


def test_thirteen_experts_at_the_cost_of_four_nodes():
    """One expert a GPU: NVLink hands over a copy per expert, and 160/50 = 3.2 of them pass in the time of one."""
    hidden = {}
    for k in range(8, 16):
        traffic = count_traffic(routed(V3.replace(num_experts_per_tok=k)), Cluster.of(V3, 32))
        assert int(traffic.nvlink.sum()) == 512 * k
        hidden[k] = traffic.nvlink_is_hidden()
        if k == 12:  # by now all four nodes are used by every token
            bound = 3.2 * int(traffic.infiniband.sum()) / 512
    assert bound == pytest.approx(12.8, abs=0.05) and round(bound) == 13
    assert [k for k, is_hidden in hidden.items() if is_hidden] == [8, 9, 10, 11, 12]


def test_bytes_of_one_copy():
    traffic = count_traffic(torch.tensor([[0]]), Cluster.of(V3))
    assert traffic.dispatch_bytes(7168) == 7168 + 56 * 4
    assert traffic.combine_bytes(7168) == 2 * 7168


def test_no_token_is_dropped_even_where_all_want_the_same_experts():
    indices = torch.tensor([[3, 5]]).expand(1000, 2)
    visits = sort_by_expert(indices, 8)
    assert visits.counts.tolist() == [0, 0, 0, 1000, 0, 1000, 0, 0]
    x, weights = torch.randn(1000, 4), torch.full((1000, 2), 0.5)
    torch.testing.assert_close(combine(dispatch(x, visits), weights, visits), x)
    assert count_traffic(indices, Cluster(8, 4)).dropped == 0


def test_refuses_in_words():
    with pytest.raises(
        ConfigError, match="nodes x gpus_per_node: 3 x 1, expected a divisor of the 8 experts"
    ):
        Cluster(8, 3)
    with pytest.raises(ConfigError, match="nodes: 0"):
        Cluster(8, 0)
    with pytest.raises(InputError, match="indices: 9 found"):
        count_traffic(torch.tensor([[9]]), Cluster(8, 2))
    with pytest.raises(InputError, match="home: 2 found"):
        count_traffic(torch.tensor([[1]]), Cluster(8, 2), torch.tensor([2]))
