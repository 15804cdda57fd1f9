"""A real run to look at: its trace held against the schedule, its numbers against one process, and its room."""

import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3lib.cli import main
from dsv3lib.errors import ConfigError, ScheduleError
from dsv3lib.pipeline import SCHEDULES, schedule, simulate
from dsv3lib.pipeline.runtime.engine import Engine
from dsv3lib.pipeline.runtime.layout import Layout
from dsv3lib.pipeline.runtime.links import in_threads
from dsv3lib.pipeline.runtime.measure import piece_seconds
from dsv3lib.pipeline.runtime.room import PROCESS_BYTES, VARIABLE, free_bytes, processes_here, require_room
from dsv3lib.pipeline.runtime.timeline import costs_of, idle_shares, simulate_at, timeline
from dsv3lib.pipeline.runtime.trial import micro_batches, rehearse, small_model, trial, whole
from dsv3lib.viz.pipeline_trace import traces

sizes = st.tuples(st.sampled_from([*SCHEDULES]), st.sampled_from([2, 4]), st.integers(0, 2))


def made_of(drawn):
    """A schedule of drawn sizes."""
    name, stages, more = drawn
    return schedule(name, stages, 2 * stages + 2 * more)


def spans_of(simulated, begin=0.0):
    return [[(str(e.action), begin + e.start, begin + e.end) for e in row] for row in simulated.by_rank]


@settings(max_examples=20)
@given(drawn=sizes, delay=st.floats(0, 3), begin=st.floats(0, 1e6))
def test_a_trace_in_order_is_the_timeline_that_made_it(drawn, delay, begin):
    plan = made_of(drawn)
    made = simulate(plan, communication=delay)
    found = timeline(plan, spans_of(made, begin))
    assert [str(e.action) for row in found.by_rank for e in row] == [str(a) for row in plan.actions for a in row]
    assert found.makespan == pytest.approx(made.makespan) and found.peak_activations == made.peak_activations


@settings(max_examples=20)
@given(drawn=sizes, data=st.data())
def test_a_swapped_pair_a_missing_and_a_doubled_action_are_rejected(drawn, data):
    plan = made_of(drawn)
    spans = spans_of(simulate(plan))
    rank = data.draw(st.integers(0, plan.stages - 1))
    at = data.draw(st.integers(0, len(spans[rank]) - 2))
    row = spans[rank]
    (one, *times), (other, *later) = row[at : at + 2]
    swapped = [*row[:at], (other, *times), (one, *later), *row[at + 2 :]]
    with pytest.raises(ScheduleError, match=f"rank {rank}, action {at}: the run did"):
        timeline(plan, [*spans[:rank], swapped, *spans[rank + 1 :]])
    with pytest.raises(ScheduleError, match=f"rank {rank}, action {len(row) - 1}: the run did nothing"):
        timeline(plan, [*spans[:rank], row[:-1], *spans[rank + 1 :]])
    with pytest.raises(ScheduleError, match=f"after the schedule's {len(row)} actions"):
        timeline(plan, [*spans[:rank], [*row, row[-1]], *spans[rank + 1 :]])


def test_an_effect_before_its_cause_is_rejected():
    plan = schedule("1f1b", 2, 4)
    spans = spans_of(simulate(plan))
    early = [[(name, start - 1.5, end - 1.5) for name, start, end in spans[1]]]
    with pytest.raises(ScheduleError, match=r"rank 1 began F0\.0 .* before rank 0 began F0\.0"):
        timeline(plan, [spans[0], *early])


@settings(max_examples=20)
@given(drawn=sizes, delay=st.floats(0, 1))
def test_costs_that_were_measured_alike_simulate_as_costs_that_were_given(drawn, delay):
    plan = made_of(drawn)
    given_ = simulate(plan, F=1, B=2.5, W=0.75, FB=3.25, communication=delay)
    cpu = [[float(e.end - e.start) for e in row] for row in given_.by_rank]
    found = simulate_at(plan, costs_of(plan, cpu), float(delay))
    assert found.makespan == pytest.approx(given_.makespan)
    assert found.bubble == pytest.approx(given_.bubble)
    assert idle_shares(found) == pytest.approx([idle / given_.makespan for idle in given_.bubble])
    with pytest.raises(ScheduleError, match="one an action"):
        costs_of(plan, [cpu[0][1:], *cpu[1:]])


def test_a_slow_stage_shows_in_the_idle_time_of_the_others():
    plan = schedule("1f1b", 2, 6)
    costs = {(rank, 0, kind): (1 + 2 * rank) * time for rank in range(2) for kind, time in (("F", 1.0), ("B", 2.0))}
    shares = idle_shares(simulate_at(plan, costs))
    assert shares[0] > 0.6 > 0.1 > shares[1]


def test_threads_agree_with_the_whole_model_and_a_forgotten_direction_does_not():
    def forgetful(links):
        links.gather = lambda tensor, ranks: [tensor]
        return links

    right, wrong = (rehearse("dualpipe", 2, 4, steps=2, **kind) for kind in ({}, {"links": forgetful}))
    assert abs(right.losses[0] - whole(2, 4)) < 1e-12 and right.losses[1] < right.losses[0]
    assert right.drift == 0 and right.peaks == [3, 3]
    assert wrong.losses[0] == right.losses[0] and abs(wrong.losses[1] - right.losses[1]) > 1e-6
    assert wrong.drift > 1e-6
    fig, alt, caption = traces(right.timeline, right.simulated)
    assert "DualPipe, 2 ranks, 4 micro-batches" in alt and alt != caption and len(fig.axes) == 4


def test_the_command_runs_two_processes_and_writes_what_they_did(tmp_path, capsys):
    drawing, trace = tmp_path / "run.svg", tmp_path / "run.json"
    words = ["pipeline", "run", "dualpipe", "--stages", "2", "--microbatches", "4", "--steps", "2"]
    assert main([*words, "--save", str(drawing), "--trace", str(trace)]) == 0
    shown = capsys.readouterr().out
    assert "head, loss and MTP" in shown and "block 2 (experts)" in shown
    assert "in the schedule's order on every rank" in shown and "differ by at most 0" in shown
    assert "<svg" in drawing.read_text()
    events = json.loads(trace.read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1}
    assert main([*words, "--save", "run.png"]) == 2 and "ends in .svg" in capsys.readouterr().err


def test_a_piece_s_measure_leaves_the_model_as_it_was():
    model = small_model(1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    recipe, grad = model.recipe, torch.ones_like(model.lm_head.weight)
    model.lm_head.weight.grad = grad
    block, end = piece_seconds(model, micro_batches(1)[0], repeats=1)
    assert block.name == "embedding and block 0 (dense)" and end.name == "head, loss and MTP"
    assert min(*block[1:], *end[1:]) > 0 and end.total > block.total  # the end holds a block and more
    assert model.lm_head.weight.grad is grad and model.model.norm.weight.grad is None
    assert model.lm_head.recipe.later is None and model.recipe is recipe
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_another_cut_gives_the_same_step_and_ranks_that_cut_otherwise_are_refused():
    costs = [9.0, 1, 1, 1]
    wanted, found = rehearse("dualpipe", 2, 4, steps=1), rehearse("dualpipe", 2, 4, steps=1, costs=costs)
    held = [{name.split(".")[2] for name in one.weights[0] if ".layers." in name} for one in (wanted, found)]
    assert held[0] and abs(found.losses[0] - wanted.losses[0]) < 1e-12 and found.drift == 0
    plan, layout = schedule("1f1b", 2, 4), Layout(2)

    def other(links):
        Engine(small_model(2), plan, layout, links, costs=costs if links.rank else None)

    with pytest.raises(ConfigError, match="another cut"):
        in_threads(2, other)


def test_processes_and_threads_give_the_same_bits():
    seen = []
    made = trial("1f1b", 2, 3, steps=1, on_action=seen.append)
    wanted = rehearse("1f1b", 2, 3, steps=1)
    assert made.losses == wanted.losses and made.sent_bytes == wanted.sent_bytes
    assert len({*made.pids, os.getpid()}) == 3
    for mine, theirs in zip(made.weights, wanted.weights, strict=True):
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert sum(seen) == 12 and min(seen) >= 0
    assert made.timeline.schedule.actions == schedule("1f1b", 2, 3).actions


@given(wanted=st.integers(2, 64), gigabytes=st.floats(0, 40), allowed=st.sampled_from(["", "1", "2", "3", "8"]))
def test_no_more_processes_than_there_is_room_for(wanted, gigabytes, allowed):
    free = int(gigabytes * 1e9)
    most = min(free // PROCESS_BYTES, int(allowed or wanted))
    if most >= wanted:
        require_room(wanted, free, allowed)
        assert processes_here(wanted, free, allowed) == wanted
        return
    with pytest.raises(ConfigError, match=f"processes: {wanted}, expected at most {most}"):
        require_room(wanted, free, allowed)
    if most < 2:
        with pytest.raises(ConfigError, match="processes: 2"):
            processes_here(wanted, free, allowed)
    else:
        found = processes_here(wanted, free, allowed)
        assert found % 2 == 0 and found <= most < found + 2


def test_a_container_s_limit_counts(tmp_path, monkeypatch):
    groups = tmp_path / "new"
    groups.mkdir()
    for name, text in (
        ("memory.max", "1500000000\n"), ("memory.current", "900000000\n"),
        ("memory.stat", "anon 1\ninactive_file 300000000\n"),
    ):  # fmt: skip
        (groups / name).write_text(text)
    assert free_bytes(groups) == 900_000_000
    (groups / "memory.max").write_text("max\n")
    assert free_bytes(groups) > 900_000_000
    assert free_bytes(tmp_path / "none") > 0
    monkeypatch.setenv(VARIABLE, "two")
    with pytest.raises(ConfigError, match="'two', expected a number"):
        processes_here(4)
    monkeypatch.setenv(VARIABLE, "2")
    with pytest.raises(ConfigError, match="allows 2"):
        trial("1f1b", 4, 4)
