"""Training over several ranks: the numbers of one process, save points for any layout, an end to every fault."""

import json
import os
import random
import re
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch
import training_work as work
from safetensors import safe_open

from dsv3lib import DeepSeekV3
from dsv3lib.checkpoint import entries
from dsv3lib.errors import ConfigError, TrainingError
from dsv3lib.pipeline.runtime.layout import Layout, is_expert
from dsv3lib.pipeline.runtime.links import in_threads
from dsv3lib.pipeline.runtime.measure import PieceSeconds
from dsv3lib.pipeline.runtime.processes import launch
from dsv3lib.training.run import parallel, save_point
from dsv3lib.training.run.log import read_log
from dsv3lib.training.run.parallel import Parallel, ParallelTrainer, in_words
from dsv3lib.viz.load_history import LoadHistory

_HERE = os.path.dirname(work.__file__)
_TIMED = ("seconds", "tokens_per_second")


@pytest.fixture(autouse=True, scope="module")
def path_for_processes():
    """The processes import this folder's work by its full name."""
    with pytest.MonkeyPatch.context() as patch:
        before = os.environ.get("PYTHONPATH")
        patch.setenv("PYTHONPATH", os.pathsep.join([_HERE, *([before] if before else [])]))
        yield


@pytest.fixture(scope="module")
def four(path_for_processes, tmp_path_factory):
    """A run of four ranks with its folder, one with replicas, and the first gone on with from its second step."""
    out = tmp_path_factory.mktemp("runs") / "four"
    cases = [
        {"layout": "pp=4", "schedule": "dualpipe", "out": str(out), "trace": True},
        {"layout": "pp=2,dp=2", "schedule": "1f1b", "recompute": True},
        {"layout": "pp=4", "schedule": "dualpipe", "out": str(out.with_name("again")), "interrupted": str(out)},
        {"layout": "pp=2,ep=2", "schedule": "dualpipe", "out": str(out.with_name("experts"))},
        {"layout": "ep=4,nodes=2", "schedule": "1f1b", "out": str(out.with_name("spread")), "interrupted": str(out)},
        {"layout": "pp=2,dp=2", "schedule": "1f1b", "out": str(out.with_name("unsent")), "steps": 1, "unsent": True},
    ]
    return out, launch(4, f"{work.__name__}:train", [cases], timeout=400)


@pytest.fixture(scope="module")
def others(four):
    """The run of four gone on with by two ranks, and by this process alone; and two ranks from the beginning."""
    out, _ = four
    two = [
        {"layout": "pp=2", "schedule": "zb1p", "out": str(out.with_name("two")), "interrupted": str(out)},
        {"layout": "pp=2", "schedule": "1f1b"},
    ]
    found = launch(2, f"{work.__name__}:train", [two], timeout=200)
    experts = str(out.with_name("experts"))  # a save point whose experts lay on several ranks
    work.alone({"layout": "pp=1", "schedule": "1f1b", "out": str(out.with_name("one")), "interrupted": experts})
    return found


@pytest.fixture(scope="module")
def plain():
    """The reference: a loop over the whole model."""
    return work.plain()


def assert_near(records, reference):
    for record, wanted in zip(records, reference, strict=True):
        assert abs(record["loss"] - wanted["loss"]) < 1e-12, record["step"]
        assert abs(record["gradient_norm"] - wanted["gradient_norm"]) < 1e-12
        assert record["expert_load"] == wanted["expert_load"]


def without(record, names):
    return {name: value for name, value in record.items() if name not in names}


def test_every_step_is_that_of_the_model_in_one_piece(four, others, plain):
    records, weights = plain
    assert any(record["gradient_norm"] > 0.5 for record in records)  # it was clipped
    runs = [[rank[number] for rank in four[1]] for number in range(2)] + [[rank[1] for rank in others]]
    for ranks in runs:
        assert len({found["pid"] for found in ranks} | {os.getpid()}) == len(ranks) + 1
        assert_near(ranks[0]["records"], records)
        assert ranks[0]["records"][0]["loss"] == records[0]["loss"]  # the first step's, to the bit
        for found in ranks:
            assert [without(r, ("rank_load",)) for r in found["records"]] == [
                without(r, ("rank_load",)) for r in ranks[0]["records"]
            ]
            assert found["validation"] == ranks[0]["validation"]
            for name, weight in found["weights"].items():
                assert (weight - weights[name]).abs().max() < 1e-9, name
        assert {name for found in ranks for name in found["weights"]} == weights.keys()


def test_experts_on_several_ranks_learn_what_they_learn_on_one(four, plain):
    records, weights = plain
    ranks, layout = [rank[3] for rank in four[1]], Layout.parse("pp=2,ep=2")
    assert_near(ranks[0]["records"], records)
    for number, found in enumerate(ranks):
        held = layout.experts(number, work.MODEL)
        for name, weight in found["weights"].items():
            wanted = weights[name][held.start : held.stop] if is_expert(name) else weights[name]
            assert (weight - wanted).abs().max() < 1e-9, name
    state = DeepSeekV3.from_pretrained(four[0].with_name("experts") / "model").state_dict()
    assert all((state[name] - weight).abs().max() < 1e-9 for name, weight in weights.items())


def test_each_state_lies_on_one_rank_and_the_weights_are_the_same_to_the_bit(four):
    out, results = four
    kept_by_all = work.in_threads({"layout": "pp=2,ep=2", "schedule": "dualpipe"})
    for own, found in zip(kept_by_all, (rank[3] for rank in results), strict=True):
        assert own["records"][-1]["loss"] == found["records"][-1]["loss"]
        assert all(torch.equal(weight, found["weights"][name]) for name, weight in own["weights"].items())
    every = [f"{kind}.{entry.name}" for kind in ("first", "second", "average") for entry in entries(work.model())]
    every = sorted(name for name in every if not name.endswith("correction_bias"))  # a buffer
    for number, folder in ((0, out), (1, None), (3, out.with_name("experts"))):
        ranks = [rank[number] for rank in results]
        assert sorted(name for found in ranks for name in found["states"]) == every
        assert [sum(found["states"].values()) for found in ranks] == [held for held, _ in ranks[0]["bytes"]]
        most, unsharded = (max(column) for column in zip(*ranks[0]["bytes"], strict=True))
        assert most < 0.7 * unsharded  # two copies at least; a parameter is not divided, and the embedding is large
        if folder is not None:  # each was written once, too
            written = []
            for file in (save_point.latest_savepoint(folder) / "training" / "moments").iterdir():
                with safe_open(file, framework="pt") as shard:
                    written += shard.keys()
            assert sorted(written) == every
    assert all(held == unsharded for held, unsharded in kept_by_all[0]["bytes"])


def test_an_update_that_does_not_reach_a_copy_is_refused_at_the_save_point(four):
    out, results = four
    told = {rank[5] for rank in results}  # every rank's error; all end together
    assert len(told) == 1 and told.pop().startswith("model.embed_tokens.weight: its copies on ranks 0, 1, 2, 3 differ")
    assert save_point.latest_savepoint(out.with_name("unsent")) is None


def test_a_run_goes_on_at_another_layout_with_the_same_losses(four, others):
    out = four[0]
    whole = read_log(out).steps
    for name in ("again", "two", "one", "spread"):
        steps = read_log(out.with_name(name)).steps
        assert [r["step"] for r in steps] == [1, 2, 3, 4]
        assert_near(steps, whole)
    again = read_log(out.with_name("again"))  # at the same layout, to the bit
    assert [without(r, _TIMED) for r in again.steps] == [without(r, _TIMED) for r in whole]
    assert again.validations == read_log(out).validations
    assert [len(found["records"]) for found in (four[1][0][2], others[0][0])] == [2, 2]  # and not from the beginning


def test_the_result_is_a_model_of_everybodys(four):
    out, ranks = four
    ours = DeepSeekV3.from_pretrained(out / "model")
    state = ours.state_dict()
    for found in ranks:
        for name, weight in found[0]["weights"].items():
            assert torch.equal(state[name], weight), name
    at_the_end = save_point.latest_savepoint(out)
    assert at_the_end.name == f"step-{work.STEPS:08d}"
    for name, tensor in DeepSeekV3.from_pretrained(at_the_end).state_dict().items():  # a save point is a model, too
        assert torch.equal(tensor, state[name]), name
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import DeepseekV3ForCausalLM

    ids = torch.arange(24)[None]
    with torch.no_grad():
        for folder in (out / "model", at_the_end):
            theirs = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
            torch.testing.assert_close(theirs(ids).logits, ours(ids).logits.float(), atol=1e-4, rtol=0)


def test_log_and_view_read_as_those_of_one_process(four):
    out, _ = four
    log = read_log(out)
    assert log.header["parallel"] == {
        "layout": "pp=4,dp=1", "schedule": "dualpipe", "microbatches": work.MICROBATCHES, "recompute": False,
        "cut": "operations", "costs": None,
    }  # fmt: skip
    assert log.end["reason"] == "finished"
    history = LoadHistory.of_run(out)
    assert history.layers == ["layer 1", "layer 2", "layer 3", "MTP 1"]
    tokens = work.MICROBATCHES * work.LENGTH * work.MODEL.num_experts_per_tok
    assert (history.load[:, :3].sum(-1) == tokens).all()
    for record in log.steps:
        by_domain = torch.tensor(list(record["domain_load"].values()))
        assert by_domain.sum(0).tolist() == record["expert_load"] and (by_domain.sum((1, 2)) > 0).all()
        total = torch.zeros(len(history.layers), work.MODEL.n_routed_experts, dtype=torch.int64)
        for of_rank in record["rank_load"]:
            for layer, load in of_rank.items():
                total[work.MODEL.moe_layers.index(int(layer))] += torch.tensor(load)
        assert total.tolist() == record["expert_load"]  # each rank's beside the whole
    assert history.ranks == 4 and (history.by_rank.sum(1) == history.load).all()
    number_of = dict(zip(history.layers, "1234", strict=True))
    for record, by_rank in zip(log.steps, history.by_rank, strict=True):
        for of_rank, rows in zip(record["rank_load"], by_rank.tolist(), strict=True):
            assert {number_of[name]: row for name, row in zip(history.layers, rows, strict=True) if any(row)} == of_rank
    events = json.loads((out / "trace.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events if event["ph"] == "X"} == {0, 1, 2, 3}


def test_bad_numbers_are_refused_before_anything_starts():
    refuse = Parallel(Layout(2), "1f1b", 8).refuse
    refuse(work.MODEL, work.settings(), 16)
    with pytest.raises(ConfigError, match="stages"):
        Parallel(Layout(8), "1f1b", 8).refuse(work.MODEL, work.settings(), 16)
    with pytest.raises(ConfigError, match="microbatches: 7"):
        Parallel(Layout(2), "dualpipe", 7).refuse(work.MODEL, work.settings(), 16)
    with pytest.raises(ConfigError, match="batch size of step 1: 2"):
        refuse(work.MODEL, work.settings(batch_size_start=2), 16)
    with pytest.raises(ConfigError, match="multiple of ep x dp = 1 x 3"):
        Parallel(Layout(2, 3), "1f1b", 8).refuse(work.MODEL, work.settings(), 16)
    with pytest.raises(ConfigError, match="ep: 3"):
        Parallel(Layout.parse("pp=2,ep=3"), "1f1b", 9).refuse(work.MODEL, work.settings(), 16)


def of_thread(links):
    """A rank that is a thread of this process."""
    member = work.Rank(links.rank, links.world)
    member.links, member.gather_objects = lambda groups: links, links.gather_objects
    return member


def test_pieces_are_measured_by_one_rank_and_cut_alike_by_all(plain, monkeypatch):
    measures = iter([[1.0, 1, 1, 9, 1], [9.0, 1, 1, 1, 1]])  # a second measure would differ, as it does

    def measured(model, batch, repeats):
        assert batch.input_ids.shape == (1, work.LENGTH) and batch.document_ids is not None
        return [PieceSeconds("piece", cost, 0.0, 0.0) for cost in next(measures)]

    monkeypatch.setattr(parallel, "piece_seconds", measured)
    wanted = Parallel(Layout(2), "1f1b", work.MICROBATCHES, cut="measured")

    def one(links):
        made = ParallelTrainer(work.model(), work.stream(), work.settings(), wanted, of_thread(links))
        return made, made.step()

    (first, record), (second, _) = in_threads(2, one)
    assert first.parallel == second.parallel == Parallel.from_dict(json.loads(json.dumps(first.parallel.to_dict())))
    assert first.parallel.costs == (1.0, 1, 1, 9, 1) and next(measures)[0] == 9.0
    assert [made.engine.parts[0].blocks for made in (first, second)] == [(0, 1, 2), (3,)]
    assert abs(record["loss"] - plain[0][0]["loss"]) < 1e-12
    with pytest.raises(ConfigError, match="costs: 2, expected 5: one a block"):
        replace(wanted, costs=(1.0, 2.0)).refuse(work.MODEL, work.settings(), work.LENGTH)
    with pytest.raises(ConfigError, match="cut: 'best', expected one of operations, measured"):
        Parallel(Layout(2), "1f1b", work.MICROBATCHES, cut="best")
    with pytest.raises(ConfigError, match="costs: .* expected none where operations are counted"):
        Parallel(Layout(2), "1f1b", work.MICROBATCHES, costs=(1.0,) * 5)


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("settings", "training.learning_rate"), ("text", "stream.seed"), ("weights", "initial_weights"),
        ("a file", "other text"),
    ],  # fmt: skip
)
def test_ranks_that_differ_are_refused(what, named):
    with pytest.raises((ConfigError, TrainingError), match=named):
        in_threads(2, lambda links: work.differing(of_thread(links), what))


def test_what_a_rank_does_is_said_in_words():
    assert in_words("F0.2") == "forward of micro-batch 2, direction 0 (F0.2)"
    assert "forward of micro-batch 1, direction 0 and backward of micro-batch 0" in in_words("[F0.1 & B1.0]")
    assert in_words("saving") == "saving"


def struck(kind, number, moments, out, tmp_path):
    """A run that meets its fault, and what came of it."""
    who, begun, wait = moments.randrange(2), tmp_path / f"begun-{number}", moments.uniform(0.0, 0.3)
    at, pids = [], []

    def on_start(started):
        pids.extend(started)

        def strike():
            while not begun.exists():  # the moment has come, however busy the machine is
                time.sleep(0.02)
            time.sleep(wait)
            at.append(time.monotonic())
            os.kill(started[who], signal.SIGKILL if kind == "kill" else signal.SIGSTOP)

        if kind != "raise":
            threading.Thread(target=strike, daemon=True).start()

    arguments = [kind, who, moments.randrange(1, 120), str(out), str(begun)]
    with pytest.raises(TrainingError, match=rf"rank {who} .*during step \d+: \w+") as caught:
        launch(2, f"{work.__name__}:fault", arguments, timeout=100, on_start=on_start)
    assert not at or time.monotonic() - at[0] < 15
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    return str(caught.value)


def test_faults_end_the_run_and_the_resumed_run_gives_the_same_losses(tmp_path):
    moments = random.Random(os.environ.get("DSV3_FAULT_SEED", "training"))
    times, folders, stood = int(os.environ.get("DSV3_FAULTS", 1)), [], []
    for kind in ("kill", "stop", "raise"):
        for number in range(times):
            folders.append(tmp_path / f"{kind}-{number}")
            told = struck(kind, f"{kind}-{number}", moments, folders[-1], tmp_path)
            found = save_point.latest_savepoint(folders[-1])
            stood.append(0 if found is None else int(re.search(r"\d+$", found.name)[0]))
            if found is not None:
                DeepSeekV3.from_pretrained(found)  # whole
            print(kind, "after save point", stood[-1], told)
    steps = max(stood) + 3
    whole = [*folders, tmp_path / "never struck"]
    results = launch(2, f"{work.__name__}:go_on", [[str(f) for f in whole], steps], timeout=600)[0]
    reference = [without(record, _TIMED) for record in results[-1][1]]
    for (begun_at, records), expected in zip(results, [*stood, 0], strict=True):
        assert begun_at == expected and len(records) == steps - expected
        assert [without(record, _TIMED) for record in records] == reference[begun_at:]
