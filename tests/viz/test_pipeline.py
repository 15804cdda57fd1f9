"""Pictures of schedules, the view's packets, and the game's rules."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3lib import ModelConfig
from dsv3lib.errors import ConfigError, ScheduleError
from dsv3lib.pipeline import SCHEDULES, schedule, simulate, validate
from dsv3lib.pipeline.overlap import LayerTimes, simulate_pair
from dsv3lib.viz.pipeline import BANDS, gantt, gantt_stack, live_curve
from dsv3lib.viz.pipeline_game import PipelineGame
from dsv3lib.viz.pipeline_streams import share_of_sms, streams
from dsv3lib.viz.pipeline_view import PipelineView, answer, packet

CONTROLS = {"name": "dualpipe", "stages": 4, "microbatches": 8, "F": 1, "B": 2, "W": 1, "FB": 3, "communication": 0}


def test_each_chart_says_what_it_shows():
    small = {name: simulate(schedule(name, 2, 4)) for name in ("1f1b", "dualpipe")}
    fig, alt, caption = gantt(small["dualpipe"])
    assert "DualPipe, 2 ranks, 4 micro-batches" in alt and alt != caption
    assert len(fig.axes[1].patches) == len(fig.axes[2].patches) == 2
    fig, alt, _ = gantt_stack(small, "Two")
    assert "1f1b ends at" in alt and len(fig.axes) == 2
    fig, alt, _ = live_curve(simulate(schedule("dualpipe", 4, 8)), (0, 1))
    assert "highest value 5" in alt and len(fig.axes) == 4


def test_every_kind_of_action_has_its_bands():
    for bands in BANDS.values():
        edges = [edge for _, top, bottom in bands for edge in (top, bottom)]
        assert edges[0] == 0 and edges[-1] == 1 and edges[1:-1:2] == edges[2:-1:2]


def test_streams_and_the_share_of_sms():
    times = LayerTimes.of_model(ModelConfig.preset("v3-671b"), 0.7)
    pair = simulate_pair(times, layers=2)
    fig, alt, caption = streams(pair)
    assert len(fig.axes[0].patches) >= 20 and f"{100 * pair.hidden:.0f} %" in caption and "stream" in alt
    assert "The best number is 20" in share_of_sms(times, 30)[2]


@settings(max_examples=10)
@given(name=st.sampled_from([*SCHEDULES]), stages=st.sampled_from([2, 4]))
def test_a_packet_holds_the_whole_timeline(name, stages):
    simulated = simulate(schedule(name, stages, 2 * stages))
    shown = json.loads(packet(simulated))
    assert len(shown["events"]) == len(simulated.timeline)
    assert max(event[2] for event in shown["events"]) == shown["makespan"] == simulated.makespan
    assert all(len(event) == (8 if event[3] == "FB" else 6) for event in shown["events"])
    assert shown["bubble"] == [float(idle) for idle in simulated.bubble]
    assert [max(n for _, n in curve) for curve in shown["live"]] == shown["peak"]


def test_the_view_answers_its_controls():
    shown = json.loads(answer(CONTROLS))
    assert (shown["stages"], shown["share"] > 0, shown["copies"]) == (4, True, 2)
    for changed, word in (
        ({"stages": 5}, "even number"),
        ({"microbatches": 2}, "at least 8"),
        ({"F": -1}, "F: -1.0"),
        ({"W": 5}, "at most B"),
        ({"name": "x"}, "there is no schedule"),
        ({"B": None}, "a control is empty"),
        ({"stages": 1024, "microbatches": 4096}, "at most 512"),
    ):
        assert word in json.loads(answer(CONTROLS | changed))["error"]


def test_the_widget_simulates_when_a_control_changes():
    view = PipelineView("1f1b", 2, 4)
    bundle = view._repr_mimebundle_()
    assert "<img" in bundle["text/html"] and "application/vnd.jupyter.widget-view+json" in bundle
    widget = view.widget()
    assert widget is view.widget()
    widget.settings = CONTROLS
    assert json.loads(widget.data)["title"].startswith("DualPipe, 4 ranks")
    with pytest.raises(ConfigError, match="even"):
        PipelineView("dualpipe", 3)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb1p"])
def test_a_rival_can_be_played_and_ends_as_it_does(name):
    game = PipelineGame(3, 4)
    rival = schedule(name, 3, 4)
    widget = game.widget()
    widget.moves = [[rank, str(action)] for rank, row in enumerate(rival.actions) for action in row]
    assert game.finished() and game.schedule().actions == rival.actions
    validate(game.schedule())
    assert f"it takes {simulate(rival).makespan}" in json.loads(widget.data)["score"]


@settings(max_examples=4)
@given(data=st.data())
def test_any_game_runs_or_names_its_deadlock(data):
    game = PipelineGame(2, 2)
    moves: list = []
    while not game.finished():
        rank = data.draw(st.sampled_from([r for r in range(2) if game.choices(r)]))
        moves.append((rank, str(data.draw(st.sampled_from(game.choices(rank))))))
        game.play(moves)
    shown = json.loads(game.packet())
    try:
        validate(game.schedule())
    except ScheduleError as error:
        assert "deadlock" in str(error) and shown["waiting"].startswith("deadlock")
    else:
        assert shown["score"].startswith("Done: it takes") and shown["waiting"] == ""


def test_what_is_no_move_changes_nothing():
    game = PipelineGame(2, 2)
    game.play([(0, "F0.0")])
    for move in ((0, "B0.1"), (2, "F0.0"), (1, "W0.0")):
        with pytest.raises(ScheduleError, match="is no move now"):
            game.play([(0, "F0.0"), move])
    assert game.schedule().rows() == ["F0.0", ""]
    waiting = json.loads(game.packet())
    assert waiting["waiting"] == "" and waiting["choices"] == [["F0.1", "B0.0", "I0.0"], ["F0.0"]]
    game.play([(0, "F0.0"), (0, "B0.0")])
    assert "which rank 1 has not placed yet" in json.loads(game.packet())["waiting"]


def test_the_rivals_stand_on_a_page_without_a_kernel():
    alt = PipelineGame(2, 2).figure()[1]
    assert "GPipe ends at 9" in alt and "ZB1P ends at 7" in alt
