"""`dsv3 train` as a process that is killed, interrupted and resumed: the losses must not show it.

Real processes, real SIGKILL at moments drawn at random: while it starts, trains, writes its log or a save point.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dsv3lib.cli import main
from dsv3lib.training.run.log import read_log

STEPS = 60
KILLS = 4
TIMED = ("seconds", "tokens_per_second")  # the only values of a step that may differ
COMMON = [
    "--preset",
    "nano",
    "--text",
    "small",
    "--seq-len",
    "16",
    "--batch-size",
    "2",
    "--threads",
    "1",
    "--checkpoint-every",
    "4",
]
LIMIT_SECONDS = 240  # far more than it takes: a process that hangs fails the test instead of stopping it


def train(*options: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "dsv3lib.cli", "train", *options]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def finish(process: subprocess.Popen) -> str:
    try:
        output, _ = process.communicate(timeout=LIMIT_SECONDS)
    finally:
        process.kill()
    return output


def steps_logged(run: Path) -> int:
    return len(read_log(run).steps) if (run / "log.jsonl").exists() else 0


def wait_for_steps(run: Path, count: int, process: subprocess.Popen) -> None:
    """Returns when the log holds that many steps, or the process has ended."""
    until = time.monotonic() + LIMIT_SECONDS
    while process.poll() is None:
        assert time.monotonic() < until, "no progress"
        if steps_logged(run) >= count:
            return
        time.sleep(0.02)


def without_times(record: dict) -> dict:
    return {name: value for name, value in record.items() if name not in TIMED}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    process = train(*COMMON, "--steps", str(STEPS), "--out", str(run))
    output = finish(process)
    assert process.returncode == 0, output
    return run


def assert_same_run(run: Path, reference: Path) -> None:
    ours, theirs = read_log(run), read_log(reference)
    assert [r["step"] for r in ours.steps] == list(range(1, STEPS + 1))
    assert [without_times(r) for r in ours.steps] == [without_times(r) for r in theirs.steps]
    assert ours.validations == theirs.validations
    for name in ("model/model.safetensors", f"checkpoints/step-{STEPS:08d}/training/optimizer.safetensors"):
        assert (run / name).read_bytes() == (reference / name).read_bytes(), name


def test_killed_again_and_again_it_ends_as_if_it_never_was(uninterrupted, tmp_path):
    run, chance = tmp_path / "run", random.Random(1)
    process = train(*COMMON, "--steps", str(STEPS), "--out", str(run))
    killed_after = []
    for kill in range(KILLS):
        done = steps_logged(run)
        wait_for_steps(run, done + chance.randrange(1, STEPS // (2 * KILLS)), process)
        if kill == 0:  # the moment that matters most, aimed at: a save point is half-written
            while process.poll() is None and not any((run / "checkpoints").glob(".unfinished-step-*")):
                time.sleep(0.001)
        else:
            time.sleep(chance.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        output = finish(process)
        assert process.returncode == -signal.SIGKILL, output
        killed_after.append(steps_logged(run))
        process = train("--resume", str(run))
    output = finish(process)
    assert process.returncode == 0, output
    assert min(killed_after) >= 1 and max(killed_after) < STEPS
    assert_same_run(run, uninterrupted)
    assert not list(run.rglob(".unfinished-*")) and not list(run.parent.glob(".unfinished-*"))


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(uninterrupted, tmp_path):
    run = tmp_path / "run"
    process = train(*COMMON, "--steps", str(STEPS), "--out", str(run))
    wait_for_steps(run, 5, process)
    process.send_signal(signal.SIGINT)
    output = finish(process)
    assert process.returncode == 130, output
    assert f"dsv3 train --resume {run}" in output
    stopped = read_log(run)
    assert stopped.end["reason"] == "interrupted" and 5 <= len(stopped.steps) < STEPS
    # The whole step was kept: the newest save point is of the last step that the log has.
    assert (run / "checkpoints" / f"step-{len(stopped.steps):08d}").is_dir()
    process = train("--resume", str(run))
    output = finish(process)
    assert process.returncode == 0, output
    assert_same_run(run, uninterrupted)


@pytest.fixture
def threads():
    """The command sets torch's threads; this process gets its own back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_finished_run_is_measured_and_shown_again(uninterrupted, capsys, threads):
    assert main(["train", "--resume", str(uninterrupted)]) == 0
    output = capsys.readouterr().out
    for expected in ("bits per byte", "arithmetic", "dsv3 generate", f"resumed after step {STEPS}"):
        assert expected in output
    before = read_log(uninterrupted).validations[-1]
    assert f"{before['domains']['docs']['loss']:.3f}" in output


def test_the_model_of_a_run_writes(uninterrupted, capsys):
    for folder in (
        uninterrupted,
        uninterrupted / "model",
        uninterrupted / "checkpoints" / f"step-{STEPS:08d}",
    ):
        assert main(["generate", str(folder), "--prompt", "The ", "--max-new-tokens", "5"]) == 0
        assert capsys.readouterr().out.startswith("The ")


@pytest.mark.parametrize(
    "options, named",
    [
        (["--resume", "RUN", "--seed", "3"], "training.seed"),
        (["--resume", "RUN", "--steps", "9"], "training.steps"),
        (["--resume", "RUN", "--seq-len", "8"], "stream.seq_len"),
        (["--resume", "RUN", "--preset", "tiny"], "model.hidden_size"),
        (["--resume", "RUN", "--no-mtp"], "model.num_nextn_predict_layers"),
        (["--resume", "RUN", "--without", "docs"], "stream.weights"),
        (["--resume", "RUN", "--out", "elsewhere"], "--out"),
        (["--out", "RUN"], "holds a run already"),
        (["--resume", "nowhere"], "no run to resume"),
        (["--preset", "nano", "--config", "x.json"], "--config"),
        (["--preset", "nano", "--device", "abacus", "--out", "NEW"], "--device"),
        (["--preset", "nano", "--data", "EMPTY", "--out", "NEW"], "EMPTY"),
        (["--preset", "nano", "--batch-size", "0", "--out", "NEW"], "batch_size"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(uninterrupted, capsys, threads, tmp_path, options, named):
    (tmp_path / "EMPTY").mkdir()
    places = {"RUN": str(uninterrupted), "NEW": str(tmp_path / "new"), "EMPTY": str(tmp_path / "EMPTY")}
    before = (uninterrupted / "log.jsonl").read_bytes()
    assert main(["train", *(places.get(word, word) for word in options)]) == 2
    assert named in capsys.readouterr().err
    assert (uninterrupted / "log.jsonl").read_bytes() == before and not (tmp_path / "new").exists()
