"""dsv3 lab: the course is found, the language is set with care, the server is JupyterLab with its token."""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from dsv3lib.course import lab
from dsv3lib.course.workspace import Workspace
from dsv3lib.errors import CourseError

START_TIMEOUT = 60  # seconds that JupyterLab may take to say its address
STOP_TIMEOUT = 30  # seconds that it may take to end


def make_course(folder: Path) -> Path:
    """A folder that looks like a checkout."""
    (folder / "notebooks").mkdir(parents=True)
    notebook = {"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (folder / "notebooks" / lab.FIRST).write_text(json.dumps(notebook))
    return folder


def test_the_checkout_around_the_learner_comes_first(tmp_path):
    here = make_course(tmp_path / "here")
    other = make_course(tmp_path / "other")
    inside = here / "runs" / "one"
    inside.mkdir(parents=True)
    assert lab.find_course(inside, package=other / "dsv3lib") == here


def test_from_elsewhere_it_is_the_checkout_of_the_package(tmp_path):
    other = make_course(tmp_path / "other")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert lab.find_course(empty, package=other / "dsv3lib", installed=tmp_path / "none") == other


def test_without_a_checkout_it_is_what_a_wheel_installed(tmp_path):
    share = make_course(tmp_path / "share")
    empty = tmp_path / "empty"
    empty.mkdir()
    found = lab.find_course(empty, package=tmp_path / "site" / "dsv3lib", installed=share / "notebooks")
    assert found == share and not list(empty.iterdir())


def test_no_course_anywhere_is_told(tmp_path):
    with pytest.raises(CourseError, match=r"not found: looked for .* inside a clone"):
        lab.find_course(tmp_path, package=tmp_path / "site" / "dsv3lib", installed=tmp_path / "none")


def test_the_language_is_set_and_the_learners_settings_stay(tmp_path):
    path = tmp_path / lab.LANGUAGE_SETTING
    path.parent.mkdir(parents=True)
    path.write_text('{\n  // mine\n  "stringsPrefix": "!!",\n  "locale": "fr_FR",\n}\n')
    assert lab.set_language("de-DE", tmp_path) == path
    assert json.loads(path.read_text()) == {"stringsPrefix": "!!", "locale": "de_DE"}
    lab.set_language("en", tmp_path)
    assert json.loads(path.read_text())["locale"] == "en"
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_jupyterlab_knows_each_language():
    from jupyterlab_server.translation_utils import get_language_packs

    known, _ = get_language_packs()
    assert {language.replace("-", "_") for language in lab.LANGUAGES} <= set(known)


def test_an_unknown_language_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(CourseError, match="'tlh' is unknown; there are: en, de-DE"):
        lab.set_language("tlh", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_missing_language_pack_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(lab, "_installed", lambda package: False)
    with pytest.raises(CourseError, match="jupyterlab-language-pack-zh-CN"):
        lab.set_language("zh-CN", tmp_path)


@pytest.mark.parametrize("text", ["{ not json", "[1, 2]"])
def test_settings_that_cannot_be_read_are_left_alone(tmp_path, text):
    path = tmp_path / lab.LANGUAGE_SETTING
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(CourseError, match="mend or remove"):
        lab.set_language("de-DE", tmp_path)
    assert path.read_text() == text


@pytest.mark.parametrize("words", [["--port", "0"], ["--port", "70000"], ["--port", "x"]])
def test_a_port_that_is_none_is_refused(words, capsys):
    parser = argparse.ArgumentParser()
    lab.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(words)
    assert "from 1 to 65535" in capsys.readouterr().err


def test_an_empty_token_does_not_open_the_server():
    kept = lab.lab_environment({"JUPYTER_TOKEN": "", "HOME": "x"})
    assert kept == {"HOME": "x"}
    assert lab.lab_environment({"JUPYTER_TOKEN": "abc"}) == {"JUPYTER_TOKEN": "abc"}


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def status_of(address: str, deadline: float) -> int:
    """The HTTP status of an address; JupyterLab says its address a moment before it listens there."""
    while True:
        try:
            with urllib.request.urlopen(address, timeout=30) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            with error:
                return error.code
        except urllib.error.URLError:
            assert time.monotonic() < deadline, f"nothing listens at {address}"
            time.sleep(0.1)


def test_progress_and_layout_are_the_learners_unless_the_environment_says_so(tmp_path):
    own = Workspace(tmp_path)
    made = lab.lab_environment({}, own)
    assert made["DSV3_PROGRESS"] == str(own.progress) and made["JUPYTERLAB_WORKSPACES_DIR"].startswith(
        str(own.hidden)
    )
    assert lab.lab_environment({"DSV3_PROGRESS": "mine"}, own)["DSV3_PROGRESS"] == "mine"


def test_the_server_opens_the_learners_overview_and_wants_its_token(tmp_path):
    course = make_course(tmp_path / "course")
    own = tmp_path / "own"
    folders = {
        f"JUPYTER_{name}": str(tmp_path / name.lower()) for name in ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR")
    }
    folders |= {"JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"), "JUPYTER_TOKEN": ""}
    port = free_port()
    words = ["--no-browser", "--port", str(port), "--language", "de-DE", "--folder", str(own)]
    process = subprocess.Popen(
        [sys.executable, "-m", "dsv3lib.cli", "lab", *words],
        cwd=course,
        env={**os.environ, **folders, "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        token = None
        deadline = time.monotonic() + START_TIMEOUT
        while token is None and time.monotonic() < deadline:
            line = process.stdout.readline()
            assert line, "JupyterLab ended before it said its address"
            token = re.search(rf"127\.0\.0\.1:{port}/lab/tree/Overview\.md\?token=(\w+)", line)
        assert token, "JupyterLab did not say its address"
        contents = f"http://127.0.0.1:{port}/api/contents/{lab.FIRST}"
        assert status_of(contents, deadline) == 403
        assert status_of(f"{contents}?token={token.group(1)}", deadline) == 200
        page = urllib.request.urlopen(f"http://127.0.0.1:{port}/lab?token={token.group(1)}", timeout=30)
        with page:
            text = page.read().decode()
        assert '"news": {"disabled": true}' in text, "no pop-up asks for news"
        assert "Markdown Preview" in text or (own / ".dsv3" / "settings" / "overrides.json").is_file()
    finally:
        process.terminate()
        try:
            process.communicate(timeout=STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    with socket.socket() as probe:  # the server went with the process: nothing holds its port
        assert probe.connect_ex(("127.0.0.1", port)) != 0
    settings = json.loads((tmp_path / "settings" / lab.LANGUAGE_SETTING).read_text())
    assert settings == {"locale": "de_DE"}
