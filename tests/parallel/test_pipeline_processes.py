"""The pipeline run by real processes: the same numbers as one process, and an end to every fault."""

import itertools
import json
import os
import queue
import time

import pipeline_work as work
import pytest
import torch

from dsv3lib.errors import ConfigError
from dsv3lib.pipeline import SCHEDULES, schedule, simulate
from dsv3lib.pipeline.dependencies import Dependencies
from dsv3lib.pipeline.runtime.layout import Layout, parts_of_ranks
from dsv3lib.pipeline.runtime.links import in_threads
from dsv3lib.pipeline.runtime.processes import launch
from dsv3lib.pipeline.runtime.trace import write_chrome_trace

# (schedule, pp, dp, micro-batches, recomputation, recipe, clipping): every pair of values occurs, see the test below.
CASES = {
    2: [
        ("gpipe", 2, 1, 3, True, "none", False), ("1f1b", 2, 1, 4, False, "none", True),
        ("interleaved", 2, 1, 4, True, "none", True), ("zb1p", 2, 1, 4, True, "tile", True),
        ("zbv", 2, 1, 4, False, "none", True), ("dualpipe", 2, 1, 4, True, "none", True),
        ("dualpipev", 2, 1, 4, False, "tile", False),
    ],
    4: [
        ("gpipe", 4, 1, 2, False, "tile", True), ("1f1b", 4, 1, 3, True, "tile", False),
        ("interleaved", 4, 1, 4, False, "tile", False), ("zb1p", 4, 1, 6, False, "none", False),
        ("zbv", 2, 2, 4, True, "tile", False), ("dualpipe", 4, 1, 8, True, "tile", False),
        ("dualpipe", 2, 2, 4, False, "none", False), ("dualpipev", 4, 1, 8, True, "none", True),
    ],
}  # fmt: skip


def matrix(world):
    """Schedule → every layout that it can take on so many processes, with and without everything."""
    found = {}
    for name, pp, dp in itertools.product(SCHEDULES, (1, 2, 4, 8), (1, 2)):
        places = len(schedule(name, 4, 8).routes[0].places) // 4 * pp
        if pp * dp == world and places <= work.config().num_hidden_layers + 1 and (pp > 1 or dp == 1):
            if name == "dualpipe" and pp == 1:
                continue
            found.setdefault(name, []).extend(
                (name, pp, dp, 2 * pp, *rest)
                for rest in itertools.product((False, True), ("none", "tile"), (False, True))
            )
    return found


RUNS = {f"{world}": (world, cases) for world, cases in CASES.items()}
if WORLDS := os.environ.get("DSV3_PIPELINE_MATRIX"):  # by hand: "2,4,8", everything with everything
    RUNS = {
        f"{world}-{name}": (int(world), cases)
        for world in WORLDS.split(",")
        for name, cases in matrix(int(world)).items()
    }
ONE_WAY = ("1f1b", "gpipe", "interleaved", "zb1p", "zbv", "dualpipev")
_HERE = os.path.dirname(work.__file__)


@pytest.fixture(autouse=True)
def path_for_processes(monkeypatch):
    """The processes import this folder's work by its full name."""
    before = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([_HERE, *([before] if before else [])]))


def test_every_pair_of_values_occurs():
    rows = [(case[0], world, *case[4:]) for world, cases in CASES.items() for case in cases]
    for one, other in itertools.combinations(range(len(rows[0])), 2):
        wanted = itertools.product({row[one] for row in rows}, {row[other] for row in rows})
        assert set(wanted) == {(row[one], row[other]) for row in rows}
    assert {row[0] for row in rows} == set(SCHEDULES)


@pytest.mark.parametrize("run", RUNS)
def test_processes_agree_with_one_process(run):
    world, cases = RUNS[run]
    patience = max(200, 60 * len(cases))
    by_rank = launch(world, f"{work.__name__}:all_cases", [cases], timeout=patience)
    # In a process of its own, too, where no annotation is checked at every call of every thread.
    [references] = launch(1, f"{work.__name__}:references", [world, cases], timeout=patience)
    assert len({results[0]["pid"] for results in by_rank} | {os.getpid()}) == world + 1
    for number, case in enumerate(cases):
        ranks = [results[number] for results in by_rank]
        reference, plain = references[number]
        for rank, (found, wanted) in enumerate(zip(ranks, reference, strict=True)):
            assert found["steps"] == wanted["steps"], (case, rank)
            assert found["weights"].keys() == wanted["weights"].keys()
            for name_, weight in found["weights"].items():
                assert torch.equal(weight, wanted["weights"][name_]), (case, rank, name_)
            assert found["bytes"] == wanted["bytes"] == _bytes_of(case, rank % case[1])
            assert found["peak"] == _peak_of(case, rank % case[1])
            assert case[0] != "dualpipe" or found["peak"] == case[1] + 1  # the paper's Table 2
        _copies_are_equal(ranks)
        if case[5] == "none":
            _agrees_with_the_plain_model(case, ranks, plain)


def _bytes_of(case, stage):
    """What a rank sends in all steps: one activation or gradient for each result that another rank waits for."""
    plan = schedule(case[0], case[1], case[3])
    graph = Dependencies.of(plan)
    singles = [single for action in plan.actions[stage] for single in action.singles()]
    sent = sum(graph.sends(stage, single) is not None for single in singles)
    return work.STEPS * sent * work.LENGTH * work.config().hidden_size * (8 if case[5] == "none" else 4)


def _peak_of(case, stage):
    """Micro-batches alive in the simulation, counted by passes through a chunk."""
    plan = schedule(case[0], case[1], case[3])
    return simulate(plan).peak_activations[stage] * len(plan.routes[0].places) // case[1]


def _copies_are_equal(ranks):
    seen = {}
    for found in ranks:
        for name, weight in found["weights"].items():
            assert torch.equal(weight, seen.setdefault(name, weight)), name
        for layer, bias in found["biases"].items():
            assert torch.equal(bias, seen.setdefault(("bias", layer), bias)), layer


def _agrees_with_the_plain_model(case, ranks, plain):
    for step, ((loss, norm, load), (loss_, norm_, load_)) in enumerate(
        zip(ranks[0]["steps"], plain["steps"], strict=True)
    ):
        assert abs(loss - loss_) < 1e-12 and abs(norm - norm_) < 1e-12, (case, step)
        assert load == load_
        if step == 0 and case[0] != "dualpipe" and case[2] == 1:
            assert loss == loss_, case
    named = {name for found in ranks for name in found["weights"]}
    assert named == plain["weights"].keys()
    for found in ranks:
        for name, weight in found["weights"].items():
            assert (weight - plain["weights"][name]).abs().max() < 1e-9, (case, name)


def test_a_forgotten_direction_is_seen():
    """Wrong on purpose: without the sum over both directions' copies the weights drift from the plain model's."""
    case = ("dualpipe", 2, 1, 4, False, "none", True)

    def forget(links):
        own = links.gather
        links.gather = lambda tensor, ranks: [own(tensor, ranks)[0]]  # the first copy's gradients alone
        return work.train(lambda _: links, case)

    with pytest.raises(AssertionError):
        _agrees_with_the_plain_model(case, in_threads(2, forget), work.plain(case))


def test_threads_that_ask_for_a_new_queue_at_once_share_one(monkeypatch):
    """With one each, what one of them sends is never seen by the other, which then waits in vain."""
    class Slow(queue.Queue):
        def __init__(self):
            time.sleep(0.05)  # the other thread comes meanwhile
            super().__init__()

    monkeypatch.setattr(queue, "Queue", Slow)
    made = in_threads(2, lambda links: links.board.queue_of(("from", "to", "tag")))
    assert made[0] is made[1]


def test_bad_layouts_are_refused_before_a_process_starts():
    with pytest.raises(ConfigError, match="stages"):
        parts_of_ranks(work.config(), schedule("1f1b", 9, 9))
    with pytest.raises(ConfigError, match="tp=2"):
        Layout.parse("pp=2,tp=2")
    with pytest.raises(ConfigError, match="world size: 3"):
        Layout.parse("pp=2,dp=2").refuse_world(3)
    with pytest.raises(ConfigError, match="processes: 99"):
        launch(99, "none:none")
    assert Layout.parse("pp=4,ep=1,dp=2").world == 8


def test_the_cut_holds_every_layer_once():
    config = work.config()
    for stages in range(1, 9):
        parts = [chunks[0] for chunks in parts_of_ranks(config, schedule("1f1b", stages, stages))]
        assert [block for part in parts for block in part.blocks] == list(range(config.num_hidden_layers))
        assert parts[0].first and parts[-1].last and sum(part.first + part.last for part in parts) == 2


def test_ranks_with_other_weights_are_refused():
    from dsv3lib.pipeline.runtime.engine import Engine

    def other(links):
        model = work.fresh()
        if links.rank == 1:
            with torch.no_grad():
                model.lm_head.weight[0, 0] += 1
        Engine(model, schedule("1f1b", 2, 2), Layout(2), links)

    with pytest.raises(ConfigError, match="another weights"):
        in_threads(2, other)


def test_the_trace_shows_every_action_of_every_rank(tmp_path):
    case = ("dualpipe", 2, 1, 4, False, "none", True)
    ranks = in_threads(2, lambda links: work.train(lambda _: links, case))
    write_chrome_trace(tmp_path / "trace.json", [found["spans"] for found in ranks])
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    for rank, row in enumerate(schedule("dualpipe", 2, 4).actions):
        mine = [event for event in events if event["pid"] == rank and event["ph"] == "X"]
        assert [event["name"] for event in mine] == [str(action) for action in row]
        for one, after in zip(mine, mine[1:], strict=False):
            assert 0 <= one["ts"] and one["ts"] + one["dur"] <= after["ts"] + 1  # one thing at a time; µs
