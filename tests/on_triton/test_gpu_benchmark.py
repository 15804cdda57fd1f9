"""The GPU benchmark, rehearsed at tiny shapes: every case is right, a wrong one is seen, nothing is made up."""

import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu  # noqa: E402
import gpu_cases  # noqa: E402
import gpu_peers  # noqa: E402
import gpu_picture  # noqa: E402
import gpu_tune  # noqa: E402
from gpu_timing import Ceilings, Stopwatch, Twice  # noqa: E402

from dsv3lib import ModelConfig, kernels  # noqa: E402
from dsv3lib.kernels.toolchain import tuning  # noqa: E402

SMALL = {case.name: case for case in gpu_cases.cases(small=True)}
LIMITS = Ceilings(copy=1e12, bf16=1e15, fp8=2e15)


@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)
def test_every_case_is_right_at_a_small_shape_and_counts_its_work(case, device):
    found = gpu.measure_case(case, Stopwatch(device), None)
    assert found["right"], found
    work = case.prepare(device, **case.shape)
    assert work.moved > 0 and (work.flops > 0) == bool(work.matrix)


def test_every_operation_that_is_public_is_measured():
    measured = {case.operation.split()[0] for case in gpu_cases.cases()}
    assert {
        "quantize_tiles",
        "gemm_fp8",
        "grouped_gemm",
        "mla_decode",
        "mla_prefill",
        "gate",
        "permute",
    } <= measured
    assert len({case.name for case in gpu_cases.cases()}) == sum(1 for _ in gpu_cases.cases())


@pytest.mark.parametrize(
    "fault", [lambda y: y * 1.01, lambda y: y.fill_(float("nan")), lambda y: torch.zeros_like(y)]
)
def test_a_wrong_kernel_is_not_timed(monkeypatch, device, fault):
    right = kernels.gemm_fp8
    monkeypatch.setattr(kernels, "gemm_fp8", lambda *a, **b: fault(right(*a, **b)))
    case = next(c for c in SMALL.values() if c.operation == "gemm_fp8")
    found = gpu.measure_case(case, Stopwatch(device), LIMITS)
    assert not found["right"] and "us" not in found


def test_a_timed_case_holds_rates_peers_and_goals(device):
    case = next(c for c in SMALL.values() if c.operation == "gate")
    found = gpu.measure_case(case, Stopwatch(device), LIMITS)
    assert len(found["us"]) == 2 and min(found["us"]) > 0
    least = LIMITS.seconds(0.0, case.prepare(device, **case.shape).moved, "")
    assert found["share_of_limit"] == pytest.approx(least / (1e-6 * min(found["us"])), abs=1e-3)
    goal = found["goals"]["times torch"]
    assert goal["reached"] == pytest.approx(found["peers"]["torch"]["times"], rel=1e-2)
    assert goal["met"] == (goal["reached"] >= goal["asked"])


def test_layers_and_a_model_agree_on_both_paths(device):
    runs = [
        gpu.measure_run(one, Stopwatch(device), timed=False)
        for one in gpu.layers_and_model(device, small=True)
    ]
    assert [one["name"] for one in runs if not one["right"]] == []
    assert {"MLA forward and backward", "MoE forward and backward"} <= {one["name"] for one in runs}


def test_the_small_model_holds_what_it_is_measured_with():
    config = ModelConfig(**gpu.SMALL_MODEL)
    _, tokens, context = gpu.SMALL_MODEL_SIZES
    assert max(tokens, context + 1) <= config.max_position_embeddings
    assert gpu.LAYER_TOKENS <= ModelConfig.preset("v3-671b").max_position_embeddings


def test_a_peer_is_only_measured_when_it_agrees():
    expected = torch.randn(4, 4)

    def missing():
        raise ImportError("not there")

    calls = [
        ("absent", missing),
        ("wrong", lambda: lambda: expected + 1),
        ("right", lambda: lambda: expected.clone()),
    ]
    assert torch.equal(gpu_peers.first_that_agrees(calls, expected)(), expected)
    with pytest.raises(gpu_peers.NotMeasured, match=r"absent: ImportError: not there; wrong: differs by"):
        gpu_peers.first_that_agrees(calls[:2], expected)


def test_difference_is_zero_for_equals_and_nan_for_nan():
    x = torch.randn(8)
    assert gpu_peers.difference(x, x) == 0 and gpu_peers.difference(torch.zeros(2), torch.zeros(2)) == 0
    assert gpu_peers.difference(x, -x) == pytest.approx(2)
    assert not gpu_peers.difference(x, torch.full_like(x, float("nan"))) <= 1


def test_tuning_climbs_to_what_is_fast_and_right_and_keeps_the_shipped_rows(monkeypatch, device, tmp_path):
    x = torch.randn(4)
    seconds = {(4, 2): 3.0, (4, 3): 2.0, (4, 4): 0.1, (8, 3): 1.0}  # stages 4 is fastest, and wrong
    shipped = [{"when": {}, "num_warps": 4, "num_stages": 2}]

    def call(settings):
        asked.append((settings["num_warps"], settings["num_stages"]))
        if asked[-1] not in seconds:
            raise RuntimeError("does not fit")
        return x + 1 if settings["num_stages"] == 4 else x

    asked = []
    trials = [gpu_tune.Trial("op", {"M": bounds}, {}, call, x) for bounds in ([1, 2], [3, 4])]
    monkeypatch.setattr(gpu_tune, "trials", lambda device, small: iter(trials))
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning.write(tmp_path / "sm_90.json", "for a test", "sm_90", {"op": shipped})
    watch = Stopwatch(device)
    watch.twice = lambda run: run() is None or Twice(*[seconds[asked[-1]]] * 2, 1)
    rows = gpu_tune.tune(watch, "sm_90", budget_s=60)["op"]
    best = {"num_warps": 8, "num_stages": 3}
    assert rows == [{"when": {"M": [1, 2]}, **best}, {"when": {"M": [3, 4]}, **best}, *shipped]


def test_neighbours_change_one_setting():
    row = {"BLOCK_M": 64, "num_warps": 4, "num_stages": 3, "OTHER": 1}
    for settings in gpu_tune.neighbours(row):
        assert sum(settings[name] != row[name] for name in row) == 1 and settings.keys() == row.keys()


def test_settings_can_be_tried_in_a_rehearsal(device):
    table = gpu_tune.tune(Stopwatch(device), "sm_90", budget_s=0.0, small=True)
    assert set(table) >= {"gemm_fp8", "grouped_gemm", "mla_decode"}
    assert all(rows[-1]["when"] == {} and rows[0]["when"] for rows in table.values())


def test_the_results_become_a_figure_and_a_table(tmp_path, device):
    case = next(c for c in SMALL.values() if c.operation == "gate")
    results = {
        "machine": gpu.machine(device), "cases": [gpu.measure_case(case, Stopwatch(device), LIMITS)], "layers": [],
    }  # fmt: skip
    gpu_picture.draw(results, tmp_path / "gpu.svg")
    assert (tmp_path / "gpu.svg").stat().st_size > 5_000 and not list(tmp_path.glob("*.tmp"))
    assert gpu.table(results).row_count == 1
    json.dumps(results)


def test_without_a_gpu_nothing_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "nothing can be measured" in capsys.readouterr().err
    assert gpu.main(["--tune"]) == 2
