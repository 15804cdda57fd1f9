"""A context extension as a run: two phases, resumable to the bit, refused where there is nothing to extend."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from dsv3lib import DeepSeekV3
from dsv3lib.cli import main
from dsv3lib.errors import ConfigError, TrainingError
from dsv3lib.training.run import extension
from dsv3lib.training.run.folder import weights_fingerprint
from dsv3lib.training.run.log import read_log

STEPS = 4


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for name in ("a", "b", "c"):
        (folder / f"{name}.txt").write_text(" ".join(f"{name} word {i % 37} of {i % 11};" for i in range(900)))
    return folder


@pytest.fixture(scope="module")
def base(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run: two steps at 16 tokens."""
    out = tmp_path_factory.mktemp("base") / "run"
    options = ["--preset", "nano", "--no-mtp", "--data", str(text), "--seq-len", "16", "--steps", "2"]
    assert main(["train", *options, "--batch-size", "1", "--threads", "1", "--out", str(out)]) == 0
    return out


def plan(base: Path, **changes: object) -> extension.Extension:
    found = extension.find_base(base)
    weights = weights_fingerprint(DeepSeekV3.from_pretrained(found.model))
    made = extension.Extension(
        str(found.model), weights, "yarn", found.trained, 128, 8.0, STEPS, 128, 1e-3, 0, 2, found.text
    )
    return dataclasses.replace(made, **changes)


def losses(out: Path) -> list[float]:
    return [loss for phase in ("phase-1", "phase-2") for loss in read_log(out / phase).column("loss")]


def test_two_phases_are_trained_and_the_model_reads_the_new_length(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "long"
    extension.begin(out, plan(base))
    seen = []
    for trainer in extension.trainers(out, threads=1):
        seen.append((trainer.stream.seq_len, trainer.config.batch_size, trainer.config.learning_rate))
        trainer.run(progress=False)
    assert seen == [(64, 2, 1e-3), (128, 1, 1e-3)]
    assert list(extension.trainers(out, threads=1)) == []
    model = DeepSeekV3.from_pretrained(out / "phase-2" / "model")
    assert model.config.max_position_embeddings == 128 and model.config.rope_scaling.factor == 8.0
    with torch.no_grad():
        assert torch.isfinite(model(torch.ones(1, 128, dtype=torch.int64)).logits).all()
    rates = read_log(out / "phase-2").column("learning_rate")
    assert rates[-1] == 1e-3  # it does not fall


def test_stopped_anywhere_it_goes_on_to_the_same_losses(base: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for out in (whole, cut):
        extension.begin(out, plan(base))
    for trainer in extension.trainers(whole, threads=1):
        trainer.run(progress=False)
    lives = 0
    while next(iter(extension.trainers(cut, threads=1)), None) is not None:
        lives += 1
        trainer = next(extension.trainers(cut, threads=1))
        for _ in range(min(3, trainer.total_steps - trainer.steps_done)):
            trainer.step()  # and no farewell: what was not saved is lost
    assert lives == 4 and losses(cut) == losses(whole)
    other = tmp_path / "other"
    extension.begin(other, plan(base, method="interpolation"))
    next(extension.trainers(other, threads=1)).step()
    assert read_log(other / "phase-1").column("loss")[0] != losses(whole)[0]


def test_a_phase_that_is_left_early_is_not_passed_over(base: Path, tmp_path: Path) -> None:
    extension.begin(tmp_path / "x", plan(base))
    phases = extension.trainers(tmp_path / "x", threads=1)
    next(phases).step()
    with pytest.raises(TrainingError, match="is not finished; go on with it"):
        next(phases)


def test_the_base_must_be_the_same_when_it_goes_on(base: Path, tmp_path: Path) -> None:
    moved = tmp_path / "base"
    shutil.copytree(base, moved)
    extension.begin(tmp_path / "x", plan(moved))
    model = DeepSeekV3.from_pretrained(moved / "model")
    with torch.no_grad():
        model.lm_head.weight += 1e-3
    model.save_pretrained(moved / "model")
    with pytest.raises(TrainingError, match="its weights are .* the extension was begun with"):
        next(extension.trainers(tmp_path / "x", threads=1))


def test_what_is_no_base_is_refused(base: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(base / "run.json", bare)
    with pytest.raises(TrainingError, match="no checkpoint yet"):
        extension.find_base(bare)
    with pytest.raises(TrainingError, match="neither a run nor a checkpoint"):
        extension.find_base(tmp_path)
    found = extension.find_base(base / "model")  # a checkpoint without its run: the configuration's length
    assert found.trained == DeepSeekV3.from_pretrained(base / "model").config.max_position_embeddings
    assert extension.find_base(base / "model", trained=16).trained == 16


def test_nothing_is_written_for_an_extension_that_cannot_be(base: Path, tmp_path: Path) -> None:
    for changes in ({"factor": 2.0}, {"target": 8}, {"method": "ntk", "factor": 0.5}):
        with pytest.raises(ConfigError):
            extension.begin(tmp_path / "x", plan(base, **changes))
        assert not (tmp_path / "x").exists()


def test_a_damaged_plan_is_refused(tmp_path: Path) -> None:
    (tmp_path / extension.FILE_NAME).write_text(json.dumps({"format": 99}))
    with pytest.raises(TrainingError, match="begin the extension anew"):
        extension.read(tmp_path)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--extend", "64"], "given without --from"),
        (["--from", "BASE"], "given without --extend"),
        (["--extend", "64", "--from", "BASE", "--preset", "nano"], "--preset"),
        (["--extend", "64", "--from", "BASE", "--yarn-factor", "0.5"], "a number >= 1"),
        (["--extend", "64", "--from", "BASE", "--yarn-factor", "2"], "at most factor x trained length"),
        (["--extend", "64", "--from", "nowhere"], "neither a run nor a checkpoint"),
    ],
)
def test_the_command_refuses_in_words(base: Path, tmp_path: Path, options: list[str], says: str, capsys) -> None:
    given = [str(base) if option == "BASE" else option for option in options]
    assert main(["train", *given, "--out", str(tmp_path / "x")]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_the_command_extends_and_finds_nothing_left_to_resume(base: Path, tmp_path: Path, capsys) -> None:
    out = str(tmp_path / "long")
    options = ["--extend", "32", "--from", str(base), "--steps", "1", "--tokens-per-step", "32", "--threads", "1"]
    assert main(["train", *options, "--out", out]) == 0
    assert "1 steps of 1 x 32 tokens" in " ".join(capsys.readouterr().out.split())
    assert main(["train", "--resume", out, "--threads", "1"]) == 0
    assert "The model reads 32 tokens" in capsys.readouterr().out
