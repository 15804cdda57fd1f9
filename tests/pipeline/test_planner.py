"""The planner: counts that add up to the model, cuts that are balanced, and the paper's choice in the table."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import configs, unchecked

from dsv3lib import DeepSeekV3, ModelConfig
from dsv3lib.cli import main
from dsv3lib.errors import ConfigError
from dsv3lib.pipeline import planner, schedule, simulate
from dsv3lib.pipeline.command import table_of, text_timeline
from dsv3lib.pipeline.stages import Layer, activation_bytes, all_to_all_bytes, layers_of, partition

V3 = ModelConfig.preset("v3-671b")


@settings(max_examples=5)
@given(config=configs(tie_word_embeddings=False))
def test_the_layers_hold_every_parameter_once(config):
    counted = sum(layer.experts + layer.others for layer in layers_of(config))
    model = DeepSeekV3(config)
    assert counted == sum(p.numel() for p in model.parameters()) - config.hidden_size  # the final norm stands apart


def test_v3s_counts():
    layers = layers_of(V3)
    assert round(sum(layer.experts + layer.others for layer in layers) / 1e9, 1) == 682.6
    kept, recomputed = activation_bytes(V3, mixture=True)
    assert recomputed == 2 * (2 * 7168 + 2112) + 1.5 * 16384 + 512 + 1.03125 * (4096 + 8 * (7168 + 4096)) + 1024
    assert kept > 3 * recomputed


def test_traffic_between_nodes_is_bounded_by_the_nodes_of_a_token():
    copy = 7168 * (1 + 4 / 128 + 2)
    assert all_to_all_bytes(V3, 64) == (4 * copy, 8 * copy)  # M = 4 nodes
    assert all_to_all_bytes(V3, 8) == (0, 8 * copy)
    assert all_to_all_bytes(V3, 16)[0] == 2 * copy
    assert all_to_all_bytes(V3, 128)[0] == 8 * copy  # a group lies on two nodes then
    assert all_to_all_bytes(V3, 1) == (0, 0)


@given(loads=st.lists(st.integers(1, 9), min_size=1, max_size=9), data=st.data())
def test_a_partition_is_the_best_there_is(loads, data):
    stages = data.draw(st.integers(1, len(loads)))
    layers = tuple(Layer(str(i), flops=float(load)) for i, load in enumerate(loads))
    cut = partition(layers, stages)
    assert [layer for stage in cut for layer in stage] == [*layers] and len(cut) == stages and all(cut)

    def best(rest, n):
        if n == 1:
            return sum(rest)
        return min(max(sum(rest[:i]), best(rest[i:], n - 1)) for i in range(1, len(rest) - n + 2))

    assert max(sum(layer.flops for layer in stage) for stage in cut) == pytest.approx(best(loads, stages))


def test_the_papers_choice_is_judged():
    chosen = planner.plan(V3)
    assert chosen.is_papers and (chosen.dp, chosen.microbatches) == (128, 120)
    assert chosen.fits == (True, False)  # it needs the recomputation
    assert chosen.activations_kept > 3 * chosen.activations
    assert 0.03 < chosen.bubble < 0.06
    straight = planner.plan(V3, "1f1b")
    assert straight.weights < chosen.weights and straight.hours > chosen.hours and straight.bubble > chosen.bubble


def test_dualpipe_doubles_the_middle_stages_weights_and_shares_the_states():
    both, one = planner.plan(V3), planner.plan(V3, "zb1p")
    assert 1.5 < both.weights / one.weights < 2.1
    assert both.gradients == pytest.approx(2 * both.weights)
    assert both.optimizer < 1.5 * one.optimizer  # twice the parameters, in twice as many shards


def test_comparing_puts_what_fits_first_and_says_what_cannot_be():
    plans, refused = planner.compare_plans(V3, ["1f1b", "gpipe", "dualpipe"], [16, 7], [64])
    assert [one.fits[0] for one in plans] == [True, True, False]
    assert plans[0].is_papers and plans[-1].schedule == "gpipe"
    assert len(refused) == 3 and all("pp: 7, expected a divisor of the 2048 GPUs" in line for line in refused)


@pytest.mark.parametrize(
    "arguments, word",
    [
        ({"ep": 96}, "ep: 96, expected a divisor of the 128 GPUs"),
        ({"pp": 0}, "pp: 0"),
        ({"work": planner.Workload(batch=100)}, "batch: 100, expected a multiple of 128"),
        ({"pp": 128, "ep": 16}, "at most the 63 layers"),
    ],
)
def test_plans_that_cannot_be(arguments, word):
    with pytest.raises(ConfigError, match=word):
        planner.plan(V3, **arguments)


@pytest.mark.parametrize(
    "make, word",
    [
        (lambda: planner.Cluster(gpus=0), "gpus: 0"),
        (lambda: planner.Cluster(tflops=float("nan")), "tflops: nan"),
        (lambda: planner.Workload(sequence=0), "sequence: 0"),
        (lambda: planner.compare_plans(V3, ["x"]), "there is no schedule 'x'"),
        (lambda: planner.compare_plans(V3, ["1f1b"], [7]), "no plan of those can be"),
    ],
)
def test_settings_that_make_no_sense(make, word):
    with unchecked(), pytest.raises(ConfigError, match=word):
        make()


def test_the_command_plans(capsys):
    assert main(["pipeline", "plan", "--gpus", "2048", "--pp", "16", "--schedule", "dualpipe", "1f1b", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(one["schedule"], one["is_papers"]) for one in found["plans"]] == [("dualpipe", True), ("1f1b", False)]
    plans = [planner.plan(V3, pp=pp) for pp in (16, 32)]
    assert [str(cell).endswith("★") for cell in table_of(plans, "").columns[0].cells] == [True, False]


def test_the_command_shows(capsys, tmp_path):
    picture = tmp_path / "pipe.svg"
    assert main(["pipeline", "show", "dualpipe", "--actions", "--save", str(picture)]) == 0
    said = capsys.readouterr().out
    assert "FFFFFFFFIWFIWFIWFXXX···XXX" in said and "[F0.7 & B1.3]" in said and "gives 6" in said
    assert picture.read_text().lstrip().startswith("<?xml")
    assert main(["pipeline", "show", "dualpipe", "--save", str(tmp_path / "pipe.png")]) == 2
    assert "ends in .svg" in capsys.readouterr().err
    assert main(["pipeline", "show", "dualpipe", "--stages", "7"]) == 2
    assert "stages: 7, expected an even number" in capsys.readouterr().err


def test_a_line_of_text_for_each_rank():
    lines = text_timeline(simulate(schedule("1f1b", 2, 2)), 80)
    assert lines == ["   0 FF··BB·BB", "   1 ·FBBFBB··"]
