"""The CPU benchmark at a size where it takes a second: what it measures, refuses and writes. No speed is asserted."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3lib import DeepSeekV3, gemm
from dsv3lib.inference.acceptance import SpeculationStatistics, expected_speedup
from dsv3lib.training.text.data import Batch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bounds  # noqa: E402
import cpu  # noqa: E402
import cpu_busy  # noqa: E402
import cpu_few  # noqa: E402
import gemm as products_by_library  # noqa: E402
import measure  # noqa: E402
import memory  # noqa: E402
import speculation  # noqa: E402
import speculation_costs  # noqa: E402
from ours import CONFIG, Ours  # noqa: E402
from peer import Peer, backends  # noqa: E402
from products import Product, alone, extent, products_of  # noqa: E402

SMALL = CONFIG.replace(
    vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=2, n_routed_experts=8, num_experts_per_tok=2, kv_lora_rank=16, q_lora_rank=24,
    qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
)  # fmt: skip


def test_a_whole_run_writes_what_it_measured(tmp_path) -> None:
    results = cpu.run(SMALL, (8, 16), (2, 8), budget_s=0.0, memory=False)
    path = tmp_path / "cpu.json"
    measure.write_json(path, results)
    read = json.loads(path.read_text())
    assert [(c["work"], c["context"]) for c in read["columns"]] == [
        ("prefill", 8), ("decode", 8), ("prefill", 16), ("decode", 16), ("train", 8),
    ]  # fmt: skip
    assert {"cpu", "threads", "torch", "transformers", "commit", "date"} <= read["machine"].keys()
    names = {str(b) for b in backends()}
    for column in read["columns"]:
        assert column["peer_backend"] in column["peer_backends_tried_ms"]
        assert set(column["peer_backends_tried_ms"]) <= names
        assert column["largest_difference"] <= cpu.TOLERANCE
        assert column["ours"]["rounds"] == column["peer"]["rounds"] >= 3
        assert column["ours"]["min_ms"] <= column["ours"]["median_ms"] <= column["ours"]["max_ms"]
        expected = column["peer"]["median_ms"] / column["ours"]["median_ms"]
        assert column["ratio"] == pytest.approx(expected, rel=1e-2)
        assert column["limit_ms"] > 0
        assert set(column["products"]) == (
            {"count", "gflop", "cached_ms", "from_memory_ms"} if column["work"] == "train" else set()
        )
    assert set(read["columns"][0]["peer_backends_tried_ms"]) == names, "every backend is tried at first"
    assert not list(tmp_path.glob("*.tmp"))

    from picture import draw

    draw(read, tmp_path / "cpu.svg")
    assert (
        "times as fast" in (tmp_path / "cpu.svg").read_text()
        or (tmp_path / "cpu.svg").stat().st_size > 10_000
    )


def test_results_are_kept_where_they_were_asked_for_and_a_quick_run_keeps_none(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()
    parser, results = measure.command_line("One line.\nMore.", "few", "less"), {"machine": {"date": "2026-01-02T03"}}
    for words, expected in (
        (["--quick"], []), (["--quick", "--out", "own.json"], ["own.json"]), ([], ["results/few-2026-01-02.json"]),
    ):  # fmt: skip
        folder = tmp_path / "-".join(["run", *words])
        folder.mkdir()
        monkeypatch.chdir(folder)
        before = {*tmp_path.rglob("*.json")}
        measure.keep(results, "few", parser.parse_args(words))
        found = {*tmp_path.rglob("*.json")} - before
        assert {path.name for path in found} == {Path(name).name for name in expected}
        assert all(json.loads(path.read_text()) == results for path in found)
    drawn = []
    monkeypatch.setitem(sys.modules, "a_picture", SimpleNamespace(draw=lambda *given: drawn.append(given)))
    measure.keep(results, "few", parser.parse_args(["--out", "drawn.json"]), picture="a_picture")
    assert drawn == [(results, Path("drawn.svg"))] and Path("drawn.json").exists()


def test_few_tokens_and_16_bits_are_measured_beside_one_token_and_fp32() -> None:
    results = json.loads(json.dumps(cpu_few.run(SMALL, (8,), (4,), (8,), budget_s=0.0)))
    columns = results["columns"]
    assert [(c["work"], c["context"], c["tokens"]) for c in columns] == [
        ("verify", 8, 2), ("verify", 8, 4), ("prompt", 0, 4), ("decode in BF16", 8, 1),
    ]  # fmt: skip
    beside = [set(c["sides"]) - {"ours", "peer"} for c in columns]
    assert beside == [{"one token"}, {"one token"}, set(), {"ours in FP32"}]
    for column in columns:
        sides, ours = column["sides"], column["sides"]["ours"]
        for name, times in column["times_as_long"].items():
            assert times == pytest.approx(sides[name]["pass_ms"] / ours["pass_ms"], rel=1e-2)
        assert ours["pass_ms"] == pytest.approx(ours["median_ms"] / column["passes"], rel=1e-2)
        largest = cpu_few.FURTHEST if "BF16" in column["work"] else cpu.TOLERANCE
        assert all(value <= largest for value in column["difference"].values())


@pytest.mark.skipif(not gemm.has_onednn(), reason="this build of torch has no oneDNN")
def test_both_libraries_products_are_measured(monkeypatch) -> None:
    """On any processor, whichever the model takes there."""
    before = gemm.by_onednn
    results = json.loads(json.dumps(products_by_library.run(quick=True)))
    kinds = {c["product"] for c in results["columns"]}
    assert kinds == set(products_by_library.KINDS) and gemm.by_onednn is before
    for c in results["columns"]:
        assert c["times_as_quick"] == pytest.approx(c["gflops"]["oneDNN"] / c["gflops"]["BLAS"], rel=2e-2)
    monkeypatch.setattr(gemm, "mm", lambda a, b: torch.mm(a, b) * 1.01)
    with pytest.raises(ValueError, match="differ"):
        products_by_library.run(quick=True)


def test_a_busy_machine_is_measured_under_each_policy_and_nothing_stays_behind() -> None:
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    results = json.loads(json.dumps(cpu_busy.run(SMALL, ["forward 8"], 0.0, ("dsv3lib's", "late"), threads=2)))
    assert [(c["policy"], c["side"]) for c in results["columns"]] == [
        ("dsv3lib's", "peer"), ("dsv3lib's", "ours"), ("late", "peer"), ("late", "ours"),
    ]  # fmt: skip
    for column in results["columns"]:
        assert column["idle"]["rounds"] == column["busy"]["rounds"] == 3
        expected = column["busy"]["median_ms"] / column["idle"]["median_ms"]
        assert column["times_as_long"] == pytest.approx(expected, rel=1e-2)
    assert {p.pid for p in psutil.Process().children(recursive=True)} <= before
    with pytest.raises(RuntimeError, match="ended with 1"):
        cpu_busy.run(SMALL, ["dance 8"], 0.0, ("late",))


def test_a_16_bit_side_that_is_too_far_off_is_refused() -> None:
    exact = torch.randn(1, 6, 9)
    spoilt = exact.clone()
    spoilt[:, :2] += 1.0  # two of six tokens may meet other experts
    assert cpu_few.near(spoilt, exact, "logits") == 0
    for wrong in (exact * 1.1, exact * float("nan")):
        with pytest.raises(cpu.LogitsDiffer, match="logits: off by"):
            cpu_few.near(wrong, exact, "logits")


@torch.inference_mode()
def test_sides_that_differ_are_not_timed() -> None:
    comparison = cpu.Comparison(SMALL, 0.0, progress=lambda name: None)
    comparison.peer.model.lm_head.weight[0, 0] += 1.0
    with pytest.raises(cpu.LogitsDiffer, match="prefill 8"):
        comparison.prefill_and_decode(8)
    assert not comparison.columns


@pytest.mark.parametrize("wrong", [1.0, float("nan"), float("inf")])
def test_a_difference_is_refused(wrong: float) -> None:
    with pytest.raises(cpu.LogitsDiffer):
        cpu.same(torch.zeros(3), torch.tensor([0.0, wrong, 0.0]), "logits")
    one, two = torch.zeros(2, 1, 2000, 5)
    one[0, 7, 2] = two[0, 9, 0] = wrong
    assert cpu.same(one, torch.full_like(one, 1e-5), "logits", ties=cpu.TIES) == pytest.approx(1e-5)  # a tie
    for more in (one + two, torch.full_like(one, wrong)):
        with pytest.raises(cpu.LogitsDiffer):
            cpu.same(more, torch.zeros_like(more), "logits", ties=cpu.TIES)


def test_both_sides_hold_the_same_weights_and_gradients_in_every_backend() -> None:
    ours = Ours(SMALL, seed=1)
    peer = Peer(ours.model)
    ids = torch.randint(SMALL.vocab_size, (2, 9))
    expected = ours.train_step(ids)
    for backend in backends():
        peer.use(backend)
        torch.testing.assert_close(peer.train_step(ids), expected)
        theirs = dict(peer.model.named_parameters())
        for name, parameter in ours.model.named_parameters():
            torch.testing.assert_close(theirs[name].grad, parameter.grad, rtol=1e-3, atol=1e-6)


def test_rounds_alternate_and_resets_are_outside() -> None:
    calls: list[str] = []
    sides = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    timings = measure.interleave(sides, 0.0, least=4, warm_up=1, reset=lambda: calls.append("-"))
    assert "".join(calls) == "-a-b" + "-a-b-b-a" * 2
    assert [len(t.seconds) for t in timings.values()] == [4, 4]


def test_bounds_follow_the_machine() -> None:
    slow, fast = bounds.Limits(1e9, 1e9), bounds.Limits(2e9, 2e9)
    model = Ours(SMALL, seed=0).model
    assert bounds.prefill_seconds(SMALL, 64, slow) == 2 * bounds.prefill_seconds(SMALL, 64, fast)
    assert bounds.decode_seconds(model, 64, slow) == 2 * bounds.decode_seconds(model, 64, fast)
    assert bounds.decode_seconds(model, 640, slow) > bounds.decode_seconds(model, 64, slow)
    assert bounds.train_seconds(SMALL, 2, 64, slow) == pytest.approx(
        6 * bounds.prefill_seconds(SMALL, 64, slow)
    )


def test_products_are_recorded_as_a_step_makes_them() -> None:
    a = torch.randn(3, 5, requires_grad=True)
    b = torch.randn(2, 5, requires_grad=True)
    c, d = torch.randn(4, 3, 7), torch.randn(4, 7, 2)

    def step() -> None:
        (a @ b.t()).sum().backward()
        c @ d

    forward, *backward, batch = products_of(step)
    assert forward == Product("aten::mm", ((3, 5), (5, 1)), ((5, 2), (1, 5)))
    assert [p.flops for p in (forward, *backward, batch)] == [60, 60, 60, 2 * 4 * 3 * 7 * 2]
    assert batch.out == ((4, 3, 2), (6, 2, 1))
    (sparse,) = products_of(lambda: torch.zeros(9, 400)[:, ::50] @ torch.zeros(8, 3))
    assert extent(sparse.left) == 8 * 400 + 7 * 50 + 1, "more than its 72 values"
    times = alone([forward, *backward, batch, sparse], 0.0)
    assert times.keys() == {"cached", "from_memory"} and min(times.values()) > 0


def test_no_product_is_missed() -> None:
    """Both forms of attention aside (blocks of rows above the diagonal), the recorded products are the formula's."""
    ours, ids = Ours(SMALL, seed=0), torch.randint(SMALL.vocab_size, (2, 64))
    recorded = sum(p.flops for p in products_of(lambda: ours.train_step(ids)))
    formula = bounds.train_seconds(SMALL, 2, 64, bounds.Limits(1.0, 1.0))
    assert formula < recorded < 1.2 * formula
    with pytest.raises(NotImplementedError, match="addmm"):
        products_of(lambda: torch.addmm(torch.ones(2), torch.ones(2, 2), torch.ones(2, 2)))


def test_memory_of_another_process_and_its_failure() -> None:
    peak = memory.peak_of("ours", "prefill", 64)
    assert peak["peak_mib"] >= peak["before_mib"] > 10
    with pytest.raises(RuntimeError, match="peer prefill 64"):
        memory.peak_of("peer", "prefill", 64, "no such backend")


class SomeText:
    """Held-out text of one domain, drawn."""

    def validation_batches(self, domain, n_batches, batch_size, seq_len):
        ids = torch.randint(64, (n_batches, seq_len), generator=torch.Generator().manual_seed(3)).split(1)
        return [Batch(one, one, one, one) for one in ids] if domain == "drawn" else []


def test_speculation_is_measured_and_predicted(tmp_path) -> None:
    model = DeepSeekV3(SMALL.replace(num_nextn_predict_layers=1), torch.Generator().manual_seed(0)).eval()
    plan = speculation.Plan(("drawn",), (6,), (0.0, 1.0), new=9, budget_s=0.0, least=2)
    results = json.loads(json.dumps(speculation.run(model, SomeText(), plan, elsewhere=([1.0, 1.1, 1.2], 0.1))))
    assert [(g["domain"], g["temperature"]) for g in results["by_domain"]] == [("drawn", 0.0), ("drawn", 1.0)]
    costs = results["costs"]["6"]
    assert len(costs["pass_ms"]) == 5 and min(costs["pass_ms"]) > 0 and len(costs["drafts_ms"]["1.0"]) == 4
    for group in results["by_domain"]:
        plain, *ways = group["ways"]
        assert [w["way"] for w in ways] == ["1", "2", "3", "auto", "lookup"] and plain["speedup"] == 1
        for way in ways:
            assert way["speedup"] == pytest.approx(plain["token_ms"] / way["token_ms"], rel=1e-2)
            assert way["tokens_a_pass"] == pytest.approx(1 + way["accepted_a_round"], rel=1e-3)
            if "predicted" in way:
                assert way["agrees"] == (abs(way["speedup"] / way["predicted"] - 1) <= 0.1)
        if group["temperature"] == 0:  # the same text, so the same entropy
            assert {round(w["entropy_bits"], 2) for w in ways} == {round(plain["entropy_bits"], 2)}
    given = results["with_costs_given_not_measured"]["speedup_by_drafts"]
    assert all(one["speedup"][0] == 1 and len(one["speedup"]) == 3 for one in given)
    assert "predicted" in str(speculation.table(results).columns[5].header)

    from speculation_picture import draw

    draw(results, tmp_path / "speculation.svg")
    assert (tmp_path / "speculation.svg").stat().st_size > 5_000 and not list(tmp_path.glob("*.tmp"))
    with pytest.raises(ValueError, match="nowhere: no held-out text of 6 tokens"):
        speculation.collect(model, SomeText(), replace(plan, domains=("nowhere",)), lambda name: None)


@given(a=st.floats(0, 1), m=st.integers(0, 4), wider=st.floats(0, 1), draft=st.floats(0, 1))
def test_the_prediction_is_leviathans_where_every_draft_is_as_likely(a, m, wider, draft) -> None:
    passes = [2.0 * (1 + wider * k) for k in range(5)]
    found = speculation_costs.speedup_at([a] * 4, passes, draft)[m]
    assert found == pytest.approx(expected_speedup(a, m, 1 + wider * m, draft))
    drafts = tuple(2.0 * draft * k for k in range(5))
    rounds = tuple(d + p for d, p in zip(drafts, passes, strict=True))  # and nothing else
    costs = speculation_costs.Costs({0.0: 2.0}, tuple(passes), {0.0: drafts}, {0.0: rounds}, 0.1)
    assert costs.speedup([a] * m, 0.0) == pytest.approx(found)


def test_repeated_8_grams_are_those_that_stood_before() -> None:
    assert speculation.repeated_grams(list(range(20))) == 0 == speculation.repeated_grams([1] * 7)
    assert speculation.repeated_grams([5, 6] * 10) == pytest.approx(1 - 2 / 13)
    counts = SpeculationStatistics(drafted=[10, 10], accepted=[8, 6])
    assert speculation_costs.conditional(counts) == pytest.approx([0.8, 0.75])
