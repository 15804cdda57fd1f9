"""Which text `dsv3 train` reads: full or small, with its cap on passes; and runs begun when there was no choice."""

import json

import pytest

from dsv3lib.cli import main

LEFT_OUT = ("code", "docs", "chinese", "french", "spanish")
SHORT = (
    "--preset",
    "nano",
    "--no-mtp",
    "--steps",
    "2",
    "--seq-len",
    "16",
    "--batch-size",
    "1",
    "--threads",
    "1",
)


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """`dsv3 train` without the validation at its end, which is most of so short a run."""
    monkeypatch.setattr("dsv3lib.training.loop.trainer.Trainer.validate", lambda self: None)
    monkeypatch.setattr("dsv3lib.training.run.command.conclude", lambda *args: None)
    out = tmp_path / "run"

    def train(*options):
        return main(["train", *SHORT, "--out", str(out), *options]), out

    return train


def test_the_full_text_is_the_default_and_a_domain_with_little_text_has_its_share_cut(begun, capsys):
    status, out = begun("--without", *LEFT_OUT, "--max-passes", "0.00001")
    assert status == 0
    described = json.loads((out / "run.json").read_text())
    assert described["source"]["text"] == "full" and described["domains"] == ["german", "arithmetic"]
    assert "share is cut (german" in " ".join(capsys.readouterr().out.split())
    assert described["stream"]["weights"][0] < 0.39  # 0.09 of 0.23 without the cap
    main(["train", "--resume", str(out), "--threads", "1"])  # the cut shares are the run's own


def test_a_run_begun_before_there_was_a_choice_resumes_on_the_small_text(begun):
    status, out = begun("--without", *LEFT_OUT, "--text", "small")
    assert status == 0
    described = json.loads((out / "run.json").read_text())
    fingerprint = described["stream"]["domains"]["german"]
    del described["source"]["text"]
    (out / "run.json").write_text(json.dumps(described))
    assert main(["train", "--resume", str(out), "--threads", "1"]) == 0
    assert json.loads((out / "run.json").read_text())["stream"]["domains"]["german"] == fingerprint
    assert main(["train", "--resume", str(out), "--threads", "1", "--text", "full"]) == 2


def test_a_run_of_other_domains_is_refused(begun, capsys):
    _, out = begun("--without", *LEFT_OUT, "--text", "small")
    assert main(["train", "--resume", str(out), "--without", *LEFT_OUT, "german", "--threads", "1"]) == 2
    assert "to be resumed with" in capsys.readouterr().err
