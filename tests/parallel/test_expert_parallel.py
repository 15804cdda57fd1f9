"""Experts spread over real processes: the numbers of one process, the traffic that was predicted, and real overlap."""

import os
import sys
from collections import Counter

import expert_work as work
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3lib.errors import ConfigError, InputError
from dsv3lib.layers.experts import Experts
from dsv3lib.parallel.expert_all_to_all import (
    ACROSS,
    BACKWARD,
    COMBINE,
    DISPATCH,
    WITHIN,
    ExpertAllToAll,
    ExpertGroup,
)
from dsv3lib.parallel.expert_parallel import ExpertParallel
from dsv3lib.parallel.traffic import Cluster, count_traffic
from dsv3lib.parallel.wires import Wires
from dsv3lib.pipeline.runtime import engine
from dsv3lib.pipeline.runtime.layout import Layout, is_expert
from dsv3lib.pipeline.runtime.links import Board, ThreadLinks, in_threads
from dsv3lib.pipeline.runtime.processes import launch
from dsv3lib.pipeline.runtime.trace import chrome_trace

# (schedule, layout, micro-batches, recomputation, recipe)
CASES = {
    2: [("1f1b", "ep=2,nodes=2", 3, True, "none"), ("1f1b", "ep=2", 2, False, "tile")],
    4: [
        ("dualpipe", "pp=2,ep=2", 4, False, "none"), ("zb1p", "pp=2,ep=2,nodes=2", 4, True, "none"),
        ("1f1b", "pp=2,ep=2", 4, False, "none"), ("1f1b", "ep=4,nodes=2", 2, False, "none"),
        ("1f1b", "ep=2,dp=2", 2, True, "none"), ("dualpipe", "pp=2,ep=2,nodes=2", 4, False, "tile"),
    ],
}  # fmt: skip
if os.environ.get("DSV3_EXPERT_MATRIX"):  # by hand
    CASES = {
        world: [
            (name, layout, 4 if "pp=2" in layout else 8, recompute, recipe)
            for layout in layouts
            for name in (("1f1b",) if "pp" not in layout else ("1f1b", "zb1p", "dualpipe"))
            for recompute in (False, True)
            for recipe in ("none", "tile")
        ]
        for world, layouts in {
            2: ("ep=2", "ep=2,nodes=2"),
            4: ("ep=4", "ep=4,nodes=2", "ep=4,nodes=4", "ep=2,dp=2", "pp=2,ep=2", "pp=2,ep=2,nodes=2"),
            8: ("pp=2,ep=2,dp=2", "pp=2,ep=4,nodes=2", "pp=4,ep=2"),
        }.items()
    }
OUTWARD = (DISPATCH, COMBINE + BACKWARD)
_HERE = os.path.dirname(work.__file__)


@pytest.fixture(autouse=True)
def path_for_processes(monkeypatch):
    before = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([_HERE, *([before] if before else [])]))


@pytest.mark.parametrize("world", CASES)
def test_processes_agree_with_one_process(world):
    by_rank = launch(world, f"{work.__name__}:all_cases", [CASES[world]], timeout=120 + 60 * len(CASES[world]))
    for number, case in enumerate(CASES[world]):
        layout, ranks = Layout.parse(case[1]), [results[number] for results in by_rank]
        reference = in_threads(world, lambda links, case=case: work.train(lambda _: links, case, at_once=True))
        for rank, (found, wanted) in enumerate(zip(ranks, reference, strict=True)):
            assert found["steps"] == wanted["steps"], (case, rank)
            assert found["weights"].keys() == wanted["weights"].keys()
            for name, weight in found["weights"].items():
                assert torch.equal(weight, wanted["weights"][name]), (case, rank, name)
            assert found["experts"].rows == wanted["experts"].rows and found["bytes"] == wanted["bytes"] > 0
            assert {name: x.tolist() for name, x in found["experts"].visits.items()} == {
                name: x.tolist() for name, x in wanted["experts"].visits.items()
            }
            assert case[0] != "dualpipe" or found["peak"] == layout.pp + 1
            assert found["place"] == (layout.ranks == rank).nonzero()[0].tolist()  # in torch's DeviceMesh
        copies_are_equal(layout, ranks)
        loads_add_up(layout, ranks)
        if case[4] == "none":
            agrees_with_the_plain_model(case, ranks)
        traffic_is_as_predicted(case, ranks)
        if case[0] == "dualpipe":
            for found, at_once in zip(ranks, reference, strict=True):
                overlaps_are_real(found)
                with pytest.raises(AssertionError):
                    overlaps_are_real(at_once)


def copies_are_equal(layout, ranks):
    seen = {}
    for rank, found in enumerate(ranks):
        for name, weight in found["weights"].items():
            share = rank % layout.ep if is_expert(name) else 0
            assert torch.equal(weight, seen.setdefault((name, share), weight)), (name, rank)
        for layer, bias in found["biases"].items():
            assert torch.equal(bias, seen.setdefault(("bias", layer), bias)), layer


def loads_add_up(layout, ranks):
    """The visits that ranks received, put side by side, are the global load; so are the loads of their own tokens."""
    globally = ranks[0]["steps"][-1][2]
    received = {layer: torch.zeros(len(load), dtype=torch.int64) for layer, load in globally.items()}
    sent = {layer: torch.zeros_like(load) for layer, load in received.items()}
    for rank, found in enumerate(ranks):
        held = layout.experts(rank, work.config(2))
        for layer, visits in found["experts"].visits.items():
            received[layer][held.start : held.stop] += visits
        for layer, load in found["load"].items():
            sent[layer] += load
    for layer, load in globally.items():
        assert received[layer].tolist() == sent[layer].tolist() == load, layer


def agrees_with_the_plain_model(case, ranks):
    plain, layout = work.plain(case), Layout.parse(case[1])
    for (loss, norm, load), (loss_, norm_, load_) in zip(ranks[0]["steps"], plain["steps"], strict=True):
        assert abs(loss - loss_) < 1e-12 and abs(norm - norm_) < 1e-12 and load == load_, case
    assert {name for found in ranks for name in found["weights"]} == plain["weights"].keys()
    for rank, found in enumerate(ranks):
        held = layout.experts(rank, work.config(2))
        for name, weight in found["weights"].items():
            wanted = plain["weights"][name]
            wanted = wanted[held.start : held.stop] if is_expert(name) else wanted
            assert (weight - wanted).abs().max() < 1e-12, (case, name)


@pytest.mark.parametrize("where", ["clip", "_holders"])
def test_experts_that_are_taken_for_replicated_weights_are_seen(where, monkeypatch):
    """Wrong on purpose: clipping counts one rank's share alone, or the shares' gradients are added up."""
    case = ("1f1b", "ep=2", 2, False, "none")

    def forgetful(name):
        frame, asked_by = sys._getframe(), set()
        for _ in range(4):
            frame = frame.f_back
            asked_by.add(frame.f_code.co_name)
        return is_expert(name) and where not in asked_by

    monkeypatch.setattr(engine, "is_expert", forgetful)
    with pytest.raises(AssertionError):
        agrees_with_the_plain_model(case, in_threads(2, lambda links: work.train(lambda _: links, case, at_once=True)))


# ---- traffic -----------------------------------------------------------------------------------------------


def predicted(layout, ranks, cluster):
    """What ``count_traffic`` says of the choices that the routers made in the last step, all layers together."""
    across, within = Counter(), Counter()
    for first in range(0, layout.world, layout.ep):
        group = layout.expert_group(first)
        for indices in zip(*(ranks[rank]["chosen"] for rank in group.ranks), strict=True):
            home = [group.place(rank)[0] for rank, own in zip(group.ranks, indices, strict=True) for _ in own]
            traffic = count_traffic(torch.tensor(sum(indices, [])), cluster, torch.tensor(home))
            for i in range(cluster.nodes):
                across.update({(first, i, j): int(n) for j, n in enumerate(traffic.infiniband[i])})
                within.update({(first, i, j): int(n) for j, n in enumerate(traffic.nvlink[i])})
    return across, within


def counted(layout, rows, purpose):
    """What ranks handed one another, by node and node, and by node and place there."""
    across, within = Counter(), Counter()
    for (why, hop, sender, receiver), n in rows.items():
        group = layout.expert_group(sender)
        (i, _), (j, place), first = group.place(sender), group.place(receiver), group.ranks[0]
        if why == purpose and hop == ACROSS and i != j:
            across[first, i, j] += n
        if why == purpose and hop == WITHIN:
            # On the way home the sender is the one whose experts answered.
            within[first, i, place if purpose in OUTWARD else group.place(sender)[1]] += n
    return across, within


def traffic_is_as_predicted(case, ranks):
    layout, found = Layout.parse(case[1]), ranks[0]["experts"]
    cluster = layout.cluster(work.config(2))
    across, within = predicted(layout, ranks, cluster)
    assert sum(across.values()) > 0 or layout.nodes == 1
    for purpose in OUTWARD:
        assert counted(layout, found.rows, purpose) == (across, within), (case, purpose)
    turned = Counter({(first, j, i): n for (first, i, j), n in across.items()})
    for purpose in (COMBINE, DISPATCH + BACKWARD):
        assert counted(layout, found.rows, purpose)[0] == turned, (case, purpose)
        assert counted(layout, found.rows, purpose)[1] == within, (case, purpose)
    d, item = work.config(2).hidden_size, 8 if case[4] == "none" else 4
    copies = sum(across.values()) + sum(within.values())
    for purpose, width in ((DISPATCH, d + 4 if case[4] == "tile" else item * d), (COMBINE, item * d)):
        bytes_ = (n for (why, hop, i, j), n in found.bytes.items() if why == purpose and is_counted(layout, hop, i, j))
        assert sum(bytes_) == copies * width


def is_counted(layout, hop, sender, receiver):
    group = layout.expert_group(sender)
    return hop == WITHIN or group.place(sender)[0] != group.place(receiver)[0]


class CopyPerExpert(ExpertAllToAll):
    """Wrong on purpose: right sums, but each expert gets a copy of its own."""

    def route(self, indices):
        self.chosen = indices.shape[1]
        return super().route(indices.reshape(-1, 1))

    def outward(self, rows, route, purpose=DISPATCH):
        return super().outward(rows.repeat_interleave(self.chosen, 0), route, purpose)

    def homeward(self, rows, route, purpose=COMBINE):
        return super().homeward(rows, route, purpose).unflatten(0, (-1, self.chosen)).sum(1)


@settings(max_examples=25)
@given(st.data())
def test_any_routing_comes_home_at_the_predicted_cost(data):
    """Each expert adds its own number to what it is sent; uneven and empty ranks, any choice."""
    nodes, per_node, each = (data.draw(st.integers(1, 3)) for _ in range(3))
    world, experts = nodes * per_node, nodes * per_node * each
    k = data.draw(st.integers(1, experts))
    rows = st.lists(st.permutations(range(experts)), max_size=5)
    chosen = [torch.tensor(data.draw(rows), dtype=torch.int64).view(-1, experts)[:, :k] for _ in range(world)]
    group, cluster = ExpertGroup(tuple(range(world)), nodes), Cluster(experts, nodes, per_node)
    home = torch.tensor([group.place(rank)[0] for rank, own in enumerate(chosen) for _ in own], dtype=torch.int64)
    traffic = count_traffic(torch.cat(chosen), cluster, home)

    def exchanged(kind):
        def work_of(links):
            exchange, indices = kind(links, group, experts), chosen[links.rank]
            x = 100.0 * links.rank + torch.arange(len(indices), dtype=torch.float64)[:, None].expand(-1, 3)
            route = exchange.route(indices)
            here = exchange.outward(x, route, DISPATCH)
            number = torch.repeat_interleave(torch.arange(each) + exchange.first, route.counts)
            answers = here[route.row] + number[:, None].double()
            summed = torch.zeros_like(here).index_add_(0, route.row, answers)
            y = exchange.homeward(summed, route, COMBINE)
            assert torch.equal(y, k * x + indices.sum(1, keepdim=True))
            return exchange.rows

        infiniband, nvlink = torch.zeros(nodes, nodes), torch.zeros(nodes, per_node)
        for sender, sent in enumerate(in_threads(world, work_of)):
            for (purpose, hop, receiver), n in sent.items():
                (i, _), (j, place) = group.place(sender), group.place(receiver)
                if purpose == DISPATCH and hop == ACROSS and i != j:
                    infiniband[i, j] += n
                if purpose == DISPATCH and hop == WITHIN:
                    nvlink[i, place] += n
        return infiniband.long().tolist(), nvlink.long().tolist()

    assert exchanged(ExpertAllToAll) == (traffic.infiniband.tolist(), traffic.nvlink.tolist())
    wasteful = exchanged(CopyPerExpert)
    assert wasteful[0] == traffic.visits.tolist()
    if not torch.equal(traffic.visits, traffic.infiniband):
        assert wasteful[0] != traffic.infiniband.tolist()


# ---- overlap -----------------------------------------------------------------------------------------------


def overlaps(found):
    """Read off the trace: exchanges of one micro-batch under way while another's attention or experts computed.

    An exchange counts where the computation lies between its launch and its wait, and where its communication, from
    when it began to when it had arrived, falls into that computation. Returns (exchange, computation) by direction.
    """
    events = chrome_trace([found["spans"]], [found["stages"]], [found["experts"].flights])["traceEvents"]
    exchanges = [event for event in events if event.get("cat") == "exchange"]
    ways = {"forward": [], "backward": []}
    for one in exchanges:
        launch_, wait = one["args"]["launch"], one["args"]["wait"]
        for stage in (event for event in events if event.get("cat") == "stage"):
            micro, what = stage["name"].split()
            start, end = stage["ts"], stage["ts"] + stage["dur"]
            for own in (event for event in exchanges if event["name"].split()[0] == micro):
                if start <= own["args"]["taken"] <= end:  # what the stage itself waited for is no computation
                    start = max(start, own["args"]["taken"])
            of_other = one["name"].split()[0] != micro and what.rstrip(BACKWARD) in ("attention", "experts")
            inside = launch_ <= start < end <= wait and one["ts"] < end and one["ts"] + one["dur"] > start
            backward = one["name"].endswith(BACKWARD)
            if of_other and inside and backward != what.endswith(BACKWARD):
                ways["backward" if backward else "forward"].append((one["name"], stage["name"]))
    return ways


def overlaps_are_real(found):
    """Both directions, by attention (whose own stage waits for nothing)."""
    ways = overlaps(found)
    assert ways["forward"] and ways["backward"], ways


# ---- errors ------------------------------------------------------------------------------------------------


def test_layouts_that_do_not_fit_are_refused():
    config = work.config(2)
    with pytest.raises(ConfigError, match=r"ep: 3, expected a divisor of n_routed_experts \(8\)"):
        Layout(ep=3).cluster(config)
    with pytest.raises(ConfigError, match=r"nodes: 8, expected a divisor of n_group \(4\)"):
        Layout(ep=8, nodes=8).cluster(config)
    with pytest.raises(ConfigError, match=r"nodes: 3, expected a divisor of ep \(4\)"):
        Layout(ep=4, nodes=3)
    with pytest.raises(ConfigError, match="world size: 4, expected 8, which is pp=2 x ep=2 x dp=2"):
        Layout.parse("pp=2, ep=2, dp=2").refuse_world(4)
    for text in ("ep=2,ep=2", "pp=2,tp=2", "ep=two", "ep", ""):
        with pytest.raises(ConfigError, match="--parallel"):
            Layout.parse(text)
    with pytest.raises(ConfigError, match="ep: 0"):
        Layout.parse("ep=0")
    with pytest.raises(ConfigError, match="ep: 3"):
        in_threads(3, lambda links: work.train(lambda _: links, ("1f1b", "ep=3", 2, False, "none")))


def test_changed_experts_are_refused():
    class Other(Experts):
        pass

    alone = ExpertAllToAll(ThreadLinks(Board(1), 0), ExpertGroup((0,)), 8)
    backend = ExpertParallel(alone, Wires(at_once=True))
    with pytest.raises(InputError, match="Other was changed or hooked"):
        backend.dispatch(Other(work.config(2)), torch.zeros(1, 64), torch.zeros(1, 2).long(), torch.zeros(1, 2))


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2))
def test_every_rank_has_a_place_of_its_own(pp, dp, per_node, nodes):
    layout = Layout(pp, dp, per_node * nodes, nodes)
    assert Layout.parse(str(layout)) == layout
    assert sorted(layout.ranks.flatten().tolist()) == list(range(layout.world))
    for rank in range(layout.world):
        stage, replica = layout.stage(rank), layout.replica(rank)
        assert layout.rank(stage, replica) == rank and 0 <= replica < layout.replicas
        group = layout.expert_group(rank)
        assert rank in group.ranks and all(layout.stage(other) == stage for other in group.ranks)
        assert set(group.across(rank)) & set(group.within(rank)) == {rank}
        assert len(group.across(rank)) == nodes and len(group.within(rank)) == per_node
