"""Following a run from another process: half lines, restarts, deaths, and no run at all; then the real page."""

import json
import os
import threading
import time
from pathlib import Path

import pytest

from dsv3lib.cli import main
from dsv3lib.config import ModelConfig
from dsv3lib.errors import TrainingError
from dsv3lib.viz import watch
from dsv3lib.viz.watch_command import voila_command, voila_environment

SIZE = ModelConfig.preset("nano")
WAIT_SECONDS = 20


def header(**changes):
    return {
        "kind": "header",
        "model": SIZE.replace(**changes).to_dict(),
        "domains": ["docs"],
        "total_steps": 9,
    }


def step(number, layers=3, experts=8):
    load = [[number + e for e in range(experts)]] * layers
    return {
        "kind": "step", "step": number, "expert_load": load, "domain_load": {"docs": load}, "bias_speed": 0.001,
        "seconds": 0.01,
    }  # fmt: skip


def line(record):
    return json.dumps(record) + "\n"


class Run:
    """A run's log, written piece by piece."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log.jsonl"
        folder.mkdir(exist_ok=True)

    def write(self, text: str) -> None:
        with self.log.open("a") as file:
            file.write(text)

    def replace(self, text: str) -> None:
        new = self.log.with_suffix(".new")
        new.write_text(text)
        os.replace(new, self.log)


@pytest.fixture
def run(tmp_path):
    made = Run(tmp_path / "run")
    made.write(line(header()))
    return made


@pytest.fixture
def follow(run):
    """A function that begins to follow the run; it is ended with the test."""
    followers = []

    def begin():
        followers.append(watch.Follower(run.folder, poll_seconds=0.01).start())
        return followers[-1]

    yield begin
    for follower in followers:
        follower.stop()
    run.log.unlink(missing_ok=True)  # the reader wakes when its log changes
    for follower in followers:
        for thread in follower._threads:
            thread.join(WAIT_SECONDS)
            assert not thread.is_alive()


def until(condition):
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


def test_steps_appear_as_they_are_logged_and_a_half_line_is_waited_for(run, follow):
    follower = follow()
    assert "no step is done yet" in follower.state
    run.write(line(step(1)))
    until(lambda: follower.view.history.steps == [1])
    whole = line(step(2))
    run.write(whole[:50])
    time.sleep(0.1)
    assert follower.view.history.steps == [1]
    run.write(whole[50:])
    until(lambda: follower.view.history.steps == [1, 2])
    assert follower.state == "Step 2 of 9. Following the run."


def test_a_resumed_run_is_read_again_from_the_top(run, follow):
    follower = follow()
    for number in (1, 2, 3):
        run.write(line(step(number)))
    until(lambda: follower.view.history.steps == [1, 2, 3])
    run.replace(line(header()) + line(step(1)))
    until(lambda: follower.view.history.steps == [1])
    run.write(line(step(2)))
    until(lambda: follower.view.history.steps == [1, 2])


def test_an_ended_run_that_goes_on_is_followed_on(run, follow):
    follower = follow()
    run.write(line(step(1)) + line({"kind": "end", "step": 1, "reason": "interrupted"}))
    until(lambda: follower.state == "The run has ended at step 1 (interrupted).")
    run.replace(line(header()) + line(step(1)))
    run.write(line(step(2)))
    until(lambda: follower.state == "Step 2 of 9. Following the run.")
    assert follower.view.history.steps == [1, 2]


def test_a_run_that_goes_on_while_nobody_looks_is_not_missed(run, follow, monkeypatch):
    look, changed = watch.Follower._stamp, []

    def replace_first(self):
        """The log is replaced between its end and the first look at the file."""
        if not changed:
            changed.append(True)
            run.replace(line(header()) + line(step(1)))
            run.write(line(step(2)))
        return look(self)

    monkeypatch.setattr(watch.Follower, "_stamp", replace_first)
    run.write(line(step(1)) + line({"kind": "end", "step": 1, "reason": "interrupted"}))
    follower = follow()
    until(lambda: follower.state == "Step 2 of 9. Following the run.")
    assert changed and follower.view.history.steps == [1, 2]


def test_a_run_begun_anew_with_another_model_is_shown_as_it_is(run, follow):
    follower = follow()
    run.write(line(step(1)))
    until(lambda: len(follower.view.history))
    run.replace(line(header(n_routed_experts=16)) + line(step(1, experts=16)))
    until(lambda: follower.view.history.experts == 16 and len(follower.view.history))


def test_of_a_run_that_died_it_is_said_that_it_is_silent(run, follow, monkeypatch):
    monkeypatch.setattr(watch, "_QUIET_SECONDS", 0.05)
    follower = follow()
    run.write(line(step(1)))
    until(lambda: "may have died" in follower.state)
    run.write(line(step(2)))
    until(lambda: follower.view.history.steps == [1, 2])


def test_a_run_whose_folder_goes_and_comes_back(run, follow):
    follower = follow()
    run.write(line(step(1)))
    until(lambda: len(follower.view.history))
    run.log.unlink()
    until(lambda: "there is no log to read" in follower.state)
    run.write(line(header()) + line(step(1)) + line(step(2)))
    until(lambda: follower.view.history.steps == [1, 2])
    until(lambda: "Following" in follower.state)


def test_a_line_from_another_config_is_said_and_not_shown(run, follow):
    follower = follow()
    run.write(line(step(1)) + line(step(2, experts=4)))
    until(lambda: "the log is of another model" in follower.state)
    assert follower.view.history.steps == [1]


def test_what_was_read_is_drawn(run, follow):
    follower = follow()
    packets = threading.Event()
    follower.view.widget().observe(lambda _change: packets.set(), names="packet")
    run.write(line(step(1)))
    assert packets.wait(WAIT_SECONDS)
    until(lambda: follower.view.widget().state == "Step 1 of 9. Following the run.")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "there is no such run"),
        (lambda path: path.mkdir(), "there is no log to read"),
        (lambda path: (path.mkdir(), (path / "log.jsonl").write_text(line(step(1)))), "expected a header"),
        (lambda path: (path.mkdir(), (path / "log.jsonl").write_text('{"kind": "hea')), "expected a header"),
        (lambda path: (path.mkdir(), (path / "log.jsonl").write_text("words\n")), "is not JSON"),
        (
            lambda path: (path.mkdir(), (path / "log.jsonl").write_text('{"kind": "header"}\n')),
            "describes no mixture of experts",
        ),
    ],
)
def test_what_is_no_run_is_refused_before_a_browser_opens(make, message, tmp_path, capsys):
    path = tmp_path / "run"
    make(path)
    with pytest.raises(TrainingError, match=message):
        watch.Follower(path)
    assert main(["watch", str(path), "--no-browser"]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_port_that_is_none_is_refused(run, capsys):
    assert main(["watch", str(run.folder), "--port", "99999"]) == 2
    assert "--port: 99999" in capsys.readouterr().err


def test_the_page_is_served_on_the_loopback_address_and_keeps_its_token(tmp_path):
    command = voila_command(browser=False, port=4321)
    assert "--Voila.ip=127.0.0.1" in command and "--Voila.auto_token=True" in command
    assert "--no-browser" in command and "--port=4321" in command
    notebook = Path(next(word for word in command if word.endswith(".ipynb")))
    assert "show()" in notebook.read_text()
    environment = voila_environment({"JUPYTER_TOKEN": "", "HOME": "/home/me"}, tmp_path)
    assert "JUPYTER_TOKEN" not in environment and environment["HOME"] == "/home/me"
    assert environment[watch.RUN_VARIABLE] == str(tmp_path)


def test_the_page_without_the_command_says_how_to_start_it(monkeypatch):
    monkeypatch.delenv(watch.RUN_VARIABLE, raising=False)
    with pytest.raises(TrainingError, match="start this page with dsv3 watch RUN"):
        watch.show()
