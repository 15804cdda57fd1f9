"""Distilling a checkpoint's MTP modules: the model's own text, the run, the folder that comes of it."""

import dataclasses
import json

import pytest
import torch
from short_run import NAMES, SHAPE, trained

from dsv3lib import DeepSeekV3
from dsv3lib.errors import TrainingError
from dsv3lib.training.run import drafts
from dsv3lib.training.run.publish import publish
from dsv3lib.training.text.data import PackedStream
from dsv3lib.training.text.domains import builtin_domains
from dsv3lib.training.text.tokenizer import Tokenizer

WIDTH = 32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    publish(trained(folder / "main"), folder / "tiny", batches=1)
    return folder / "tiny"


def trainer(checkpoint, out, steps=6, make=drafts.trainer):
    config = dataclasses.replace(drafts.settings(), tokens=steps * 8 * WIDTH, warmup_steps=2, checkpoint_every=2)
    return make(checkpoint, out, config, builtin_domains(NAMES), 128, WIDTH, progress=False)


@pytest.fixture(scope="module")
def distilled(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    assert trainer(checkpoint, out).run(progress=False)["reason"] == "finished"
    into = tmp_path_factory.mktemp("distilled") / "tiny"
    return into, drafts.write_checkpoint(checkpoint, out, into, builtin_domains(NAMES), batches=1), out


def beginnings(checkpoint):
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    return PackedStream(builtin_domains(NAMES), tokenizer, WIDTH, seed=drafts.SEED + 1, fim_rate=0.0)


def test_half_of_the_text_is_what_the_model_wrote(checkpoint, tmp_path):
    run = trainer(checkpoint, tmp_path)
    shares = dict(zip(run.stream.domain_names, run.stream.weights, strict=True))
    assert shares[drafts.OWN] == pytest.approx(0.5) and sum(shares.values()) == pytest.approx(1.0)
    own = run.stream.domains[-1]
    assert 100 <= own.count <= 128
    model = DeepSeekV3.from_pretrained(checkpoint, dtype=torch.float32)
    prompts = beginnings(checkpoint)
    ids = prompts.next_batch(128).input_ids[:1, :16]
    expected = prompts.tokenizer.decode(model.generate(ids, WIDTH - 16).tolist()[0]).replace("\ufffd", "")
    assert own.read(0).text == expected


def test_parts_that_are_there_are_read_and_a_damaged_one_is_named(checkpoint, tmp_path):
    model = DeepSeekV3.from_pretrained(checkpoint, dtype=torch.float32)

    def write(documents):
        return drafts.own_text(model, beginnings(checkpoint), tmp_path, documents, progress=False)

    first = write(128)
    part = tmp_path / "part-000.json"
    found = json.loads(part.read_text(encoding="utf-8"))
    part.write_text(json.dumps(["one", *found[1:]]), encoding="utf-8")
    more = write(200)
    assert more.read(0).text == "one" and more.count > first.count  # gone on behind what was there
    part.write_text("[", encoding="utf-8")
    with pytest.raises(TrainingError, match="part-000.json: is damaged"):
        write(128)


def test_the_folder_has_new_modules_the_same_model_and_both_measurements(checkpoint, distilled):
    into, record, _ = distilled
    before, after = (DeepSeekV3.from_pretrained(folder).state_dict() for folder in (checkpoint, into))
    first = SHAPE.num_hidden_layers
    modules = tuple(f"model.layers.{first + k}." for k in range(SHAPE.num_nextn_predict_layers))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith(modules) for name in changed)
    assert after["lm_head.weight"].dtype == torch.bfloat16
    old = json.loads((checkpoint / "results.json").read_text())
    assert record["distillation"]["before"] == old["drafts"]
    assert record["bits_per_byte"] == old["bits_per_byte"]
    assert record["drafts"].keys() == old["drafts"].keys() and record["drafts"] != old["drafts"]
    for name, row in record["drafts"].items():  # the model's entropy is of the same text as before
        assert row["entropy"] == pytest.approx(old["drafts"][name]["entropy"], rel=1e-6)
    assert json.loads((into / "results.json").read_text()) == json.loads(json.dumps(record))
    text = (into / "README.md").read_text(encoding="utf-8")
    assert "(before " in text and "the main model was frozen" in text
    assert "(before " not in (checkpoint / "README.md").read_text(encoding="utf-8")


def test_what_is_not_to_be_distilled_is_refused(checkpoint, distilled, tmp_path):
    into, _, out = distilled
    with pytest.raises(TrainingError, match="distilled already"):
        trainer(into, tmp_path)
    begun = trainer(checkpoint, tmp_path / "begun")
    begun.step()
    with pytest.raises(TrainingError, match="not finished"):
        drafts.write_checkpoint(checkpoint, tmp_path / "begun", tmp_path / "new", builtin_domains(NAMES), 1)
    other = tmp_path / "other"
    publish(trained(tmp_path / "run", SHAPE.replace(rms_norm_eps=1e-3)), other, batches=1)
    with pytest.raises(TrainingError, match="another main model"):
        drafts.write_checkpoint(other, out, tmp_path / "new", builtin_domains(NAMES), 1)
    assert not (tmp_path / "new").exists()


def test_the_command_trains_writes_and_names_an_error(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(drafts, "trainer", lambda folder, out, config, progress: trainer(folder, out))
    real = drafts.write_checkpoint
    monkeypatch.setattr(
        drafts, "write_checkpoint", lambda *folders: real(*folders, builtin_domains(NAMES), batches=1)
    )
    into = tmp_path / "new"
    command = [str(checkpoint), "--out", str(tmp_path / "run"), "--into", str(into)]
    assert drafts.main(command) == 0
    assert "(was " in capsys.readouterr().out and (into / "README.md").is_file()
    assert drafts.main([str(into), "--out", str(tmp_path / "again")]) == 1
    assert "distilled already" in capsys.readouterr().err
