"""`make checkpoint`: its stages in order, each passed over where it is done, and interrupts that lose nothing."""

import json

import pytest
from short_run import SHAPE, trained

from dsv3lib.training.run import checkpoint
from dsv3lib.training.run.tiny_v3 import dense_twin


@pytest.fixture
def calls(monkeypatch):
    """Training replaced by runs of six steps of a model that is much smaller; publishing by one batch a domain."""
    made = []

    def train(out, config=None, dense=False):
        made.append((out.name, config, dense))
        trained(out, dense_twin(SHAPE) if dense else SHAPE)
        return True

    real = checkpoint.publish
    monkeypatch.setattr(checkpoint, "train", train)
    monkeypatch.setattr(checkpoint, "settings", lambda *args, **kwargs: (args, kwargs))
    monkeypatch.setattr(checkpoint, "publish", lambda run, out, dense: real(run, out, dense, batches=1))

    def distil(folder, run, into, config):
        made.append((run.name, config, folder == into))
        return True

    monkeypatch.setattr(checkpoint.drafts, "distil", distil)
    return made


def test_all_stages_once_and_nothing_again_but_what_is_measured(calls, tmp_path):
    runs, out, first = tmp_path / "runs", tmp_path / "data" / "tiny-v3", tmp_path / "first.json"
    assert checkpoint.make(runs, out, 1, 7, first)
    (name, config, dense), (twin, its_config, its_dense), (last, drafted, in_place) = calls
    assert (name, dense, config) == ("tiny-v3", False, ((7,), {"threads": 1}))
    assert (twin, its_dense) == ("tiny-v3-dense", True)
    assert (last, drafted, in_place) == ("tiny-v3-drafts", checkpoint.drafts.settings(threads=1), True)
    assert its_config == ((), {"tokens": 384, "threads": 1, "decay_after": None})
    assert (out / "README.md").is_file() and len(json.loads(first.read_text())["losses"]) == 4
    (out / "stale.txt").write_text("of the checkpoint before")
    assert checkpoint.make(runs, out, 1, 7) and [call[0] for call in calls[3:]] == ["tiny-v3-drafts"]
    assert not (out / "stale.txt").exists() and (out / "model.safetensors").is_file()


def test_an_interrupted_stage_ends_all_and_leaves_the_old_checkpoint(calls, tmp_path, monkeypatch):
    out = tmp_path / "tiny-v3"
    out.mkdir()
    (out / "old.txt").write_text("stands")
    monkeypatch.setattr(checkpoint, "train", lambda out, config=None, dense=False: False)
    assert checkpoint.make(tmp_path / "runs", out) is False
    assert (out / "old.txt").read_text() == "stands"


def test_an_interrupted_distillation_leaves_the_old_checkpoint_too(calls, tmp_path, monkeypatch):
    out = tmp_path / "tiny-v3"
    out.mkdir()
    (out / "old.txt").write_text("stands")
    monkeypatch.setattr(checkpoint.drafts, "distil", lambda folder, run, into, config: False)
    assert checkpoint.make(tmp_path / "runs", out) is False
    assert (out / "old.txt").read_text() == "stands"


def test_the_command_line_names_an_error_and_says_it_was_interrupted(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(checkpoint, "make", lambda *args: False)
    assert checkpoint.main(["--runs", str(tmp_path)]) == 130
    monkeypatch.undo()
    (tmp_path / "tiny-v3").mkdir()
    (tmp_path / "tiny-v3" / "other").write_text("not a run")
    assert checkpoint.main(["--runs", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "error:" in capsys.readouterr().err
