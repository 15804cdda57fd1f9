"""The comparison of the four ways: all else is equal, the numbers are the log's, and a difference is refused."""

import json

import pytest
import torch

from dsv3lib import DeepSeekV3, ModelConfig
from dsv3lib.cli import main
from dsv3lib.errors import ConfigError, TrainingError
from dsv3lib.training.loop.balance import DEFAULT_SPEED, WAYS
from dsv3lib.training.loop.comparison import compare, comparison_table
from dsv3lib.training.loop.settings import TrainingConfig
from dsv3lib.training.run.log import read_log
from dsv3lib.training.text.data import PackedStream
from dsv3lib.training.text.domains import ArithmeticDomain
from dsv3lib.training.text.tokenizer import default_tokenizer

SIZE = ModelConfig.preset("nano").replace(
    num_hidden_layers=2, hidden_size=32, num_nextn_predict_layers=0, vocab_size=default_tokenizer().vocab_size
)
SETTINGS = TrainingConfig(steps=3, batch_size=2, batch_size_start=2, validation_batches=1, ema_decay=0.0)


def fresh(seed: int = 0):
    stream = PackedStream([ArithmeticDomain()], default_tokenizer(), 32, seed=0)
    return DeepSeekV3(SIZE, torch.Generator().manual_seed(seed)), stream, {"data": None, "without": []}


@pytest.fixture(scope="module")
def outcomes():
    seen = []
    found = compare(
        fresh, SETTINGS, speed=0.01, alpha=0.1, on_step=lambda way, r: seen.append((way, r["step"]))
    )
    assert seen == [(way, step) for way in WAYS for step in (1, 2, 3)]
    return found


def test_all_four_begin_alike_and_part_by_their_balancing_alone(outcomes):
    assert [o.way for o in outcomes] == list(WAYS)
    assert len({o.start for o in outcomes}) == 1
    assert len({o.records[0]["losses"]["main"] for o in outcomes}) == 1, "the first batch is the same"
    assert all(torch.equal(o.load[0], outcomes[0].load[0]) for o in outcomes)
    none, sequence, batch, bias = outcomes
    assert "balance" in sequence.records[0]["losses"] and "balance" in batch.records[0]["losses"]
    assert "balance" not in none.records[0]["losses"] and "balance" not in bias.records[0]["losses"]
    assert sequence.records[0]["losses"]["balance"] != batch.records[0]["losses"]["balance"]
    moved = [max(r.e_score_correction_bias.abs().max().item() for r in o.model.routers()) for o in outcomes]
    assert moved[:3] == [0, 0, 0] and moved[3] > 0


def test_no_token_is_dropped_and_the_measures_are_the_loads(outcomes):
    for outcome in outcomes:
        for record, load in zip(outcome.records, outcome.load, strict=True):
            tokens = record["batch_size"] * 32
            assert load.sum(1).tolist() == [tokens * SIZE.num_experts_per_tok] * len(SIZE.moe_layers)
        assert outcome.batch_violation.tolist() == [r["max_violation"] for r in outcome.records]
        summary = outcome.summary()
        assert 0 <= summary["global_violation"] <= summary["batch_violation"] + 1e-9, "sums even out"
        assert summary["validation_loss"] == pytest.approx(outcome.validation.loss)
    assert comparison_table(outcomes).row_count == len(WAYS)


def test_unequal_starts_are_refused():
    seeds = iter((0, 1))
    with pytest.raises(TrainingError, match="weights: 'none' and 'bias' did not start from the same"):
        compare(lambda: fresh(next(seeds)), SETTINGS, ["none", "bias"])


def test_a_negative_speed_is_refused_before_any_step():
    with pytest.raises(ConfigError, match="bias_speed: -0.5"):
        compare(fresh, SETTINGS, ["bias"], speed=-0.5)


def test_the_command_trains_one_way_or_compares_several(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")  # a table is folded to the terminal's width
    config = tmp_path / "config.json"
    config.write_text(json.dumps(SIZE.to_dict()))
    text = ["code", "docs", "chinese", "german", "french", "spanish"]
    common = [
        "--config",
        str(config),
        "--seq-len",
        "32",
        "--batch-size",
        "2",
        "--steps",
        "2",
        "--threads",
        "1",
    ]
    common += ["--text", "small", "--without", *text]
    assert main(["train", *common, "--balance", "batch", "--out", str(tmp_path / "one")]) == 0
    training = read_log(tmp_path / "one").header["training"]
    assert training["aux_loss_over"] == "batch" and training["bias_speed"] == 0
    assert main(["train", *common, "--balance", "none", "bias", "--out", str(tmp_path / "two")]) == 0
    assert "bias, no auxiliary loss" in capsys.readouterr().out
    headers = [read_log(tmp_path / "two" / way).header for way in ("none", "bias")]
    assert headers[0]["initial_weights"] == headers[1]["initial_weights"]
    assert [h["training"]["bias_speed"] for h in headers] == [0.0, DEFAULT_SPEED]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--balance", "none", "--bias-speed", "0.1"], "has no use for it"),
        (["--balance", "none", "bias", "--minutes", "1"], "equal length"),
        (["--balance", "none", "bias"], "equal length"),
        (["--balance", "none", "bias", "--resume", "RUN"], "from the start"),
        (["--balance", "bias", "--bias-speed", "-1", "--steps", "1"], "bias_speed: -1"),
    ],
)
def test_the_command_refuses_in_words(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--preset", "nano", *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []
