"""From a run to a checkpoint folder: what is measured, what the card says, and what is refused."""

import dataclasses
import gzip
import json
import math

import numpy as np
import pytest
import torch
from short_run import NAMES, SETTINGS, SHAPE, trained

from dsv3lib import DeepSeekV3
from dsv3lib.errors import CheckpointError, SaveError, TrainingError
from dsv3lib.inference.generate_command import read_tokenizer
from dsv3lib.training.baselines.measure import (
    compressed_bits,
    first_drafts,
    segments,
    target_bytes,
    unigram_bits,
)
from dsv3lib.training.loop.evaluate import evaluate
from dsv3lib.training.run.card import beats_five_gram, card
from dsv3lib.training.run.publish import measure_run, publish, stream_of_run
from dsv3lib.training.run.tiny_v3 import dense_twin


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return trained(folder / "main"), trained(folder / "dense", dense_twin(SHAPE))


@pytest.fixture(scope="module")
def published(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("checkpoints") / "tiny"
    return out, publish(runs[0], out, runs[1], batches=1)


def test_the_folder_holds_a_model_in_bf16_that_loads_with_its_tokenizer_and_what_was_measured(
    published, runs
):
    out, record = published
    assert {p.name for p in out.iterdir()} >= {
        "README.md", "config.json", "model.safetensors", "results.json", "tokenizer.json", "training_log.jsonl",
    }  # fmt: skip
    model = DeepSeekV3.from_pretrained(out)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(record))
    read_tokenizer(out)
    losses = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in losses if r["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert not any("expert_load" in r for r in losses)


def test_every_column_is_of_the_same_targets(published, runs):
    _, record = published
    stream = stream_of_run(runs[0])
    for name in NAMES:
        batches = stream.validation_batches(name, 1, 8)
        row = record["bits_per_byte"][name]
        parts = list(segments(batches))
        assert row["tokens"] == sum(len(part) - 1 for part in parts)
        text = stream.tokenizer.decode([token for part in parts for token in part[1:].tolist()])
        assert row["bytes"] == target_bytes(batches, stream.tokenizer) == len(text.encode())
        assert row["gzip"] == pytest.approx(8 * len(gzip.compress(text.encode(), 9)) / row["bytes"], rel=0.01)
        assert row["five_gram"] < row["unigram"] < math.log2(stream.tokenizer.vocab_size)
    total = record["bits_per_byte"]["all"]
    assert total["bytes"] == sum(record["bits_per_byte"][n]["bytes"] for n in NAMES)
    assert min(r["model"] for r in record["bits_per_byte"].values()) <= total["model"]


def test_the_models_figure_is_of_the_weights_that_are_shipped(published, runs):
    out, record = published
    found = evaluate(DeepSeekV3.from_pretrained(out, dtype=torch.float32), stream_of_run(runs[0]), 1, 8)
    assert record["bits_per_byte"]["docs"]["model"] == pytest.approx(found.domains["docs"].bits_per_byte)


def test_the_card_says_what_was_measured_and_admits_a_model_that_is_too_weak(published):
    _, record = published
    text = card(record)
    for part in (
        "bits per byte",
        "MaxVio",
        "5-gram",
        "mtp_copies=False",
        "What it cannot do",
        "--tokens 384",
    ):
        assert part in text
    assert f"{record['bits_per_byte']['docs']['model']:.3f}" in text
    assert not beats_five_gram(record) and "**does not beat**" in text  # six steps teach little
    assert "Fewer than 20,000 tokens were there for: docs, arithmetic" in text
    better = json.loads(json.dumps(record))
    better["bits_per_byte"]["all"]["model"] = 0.1
    assert beats_five_gram(better) and "does not beat" not in card(better)
    del better["bits_per_byte"]["all"]["dense"]
    assert "has not been trained" in card(better)


def test_a_foreign_tokenizer_is_refused(published, tmp_path):
    out, _ = published
    for file in ("results.json", "tokenizer.json"):
        (tmp_path / file).write_text((out / file).read_text())
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="not the one that the model was trained with"):
        read_tokenizer(tmp_path)


def test_unfinished_runs_twins_of_other_tokens_and_another_text_are_refused(
    runs, published, tmp_path, monkeypatch
):
    half = trained(tmp_path / "half", stop_after=2)
    with pytest.raises(TrainingError, match="not finished"):
        publish(half, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    short = trained(tmp_path / "short", dense_twin(SHAPE), dataclasses.replace(SETTINGS, steps=3))
    with pytest.raises(TrainingError, match="--tokens 384 --dense"):
        measure_run(runs[0], published[0], short, batches=1)
    with pytest.raises((TrainingError, SaveError), match="is no run of ours|exists"):
        publish(runs[0], published[0])
    described = json.loads((runs[0] / "run.json").read_text())
    described["stream"]["domains"]["docs"] = "another text"
    (half / "run.json").write_text(json.dumps(described))
    with pytest.raises(TrainingError, match="publish it where it was trained"):
        stream_of_run(half)


def test_drafts_that_are_the_models_own_agree_and_entropy_is_that_of_the_distribution(runs):
    stream = stream_of_run(runs[0])
    batches = stream.validation_batches("arithmetic", 1, 4)
    model = DeepSeekV3(SHAPE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token is as likely as any, and the first is taken by all
    entropy, agreement = first_drafts(model, batches)
    assert entropy == pytest.approx(math.log2(SHAPE.vocab_size), rel=1e-5) and agreement == [1.0, 1.0]
    uniform = np.full(SHAPE.vocab_size, 1 / SHAPE.vocab_size)
    targets = sum(len(part) - 1 for part in segments(batches))
    assert unigram_bits(uniform, batches) == pytest.approx(targets * math.log2(SHAPE.vocab_size))
    assert set(compressed_bits(batches, stream.tokenizer)) == {"gzip", "xz"}
