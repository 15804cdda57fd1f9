"""What a lesson shows: check, hints, the reference, predictions, progress, the set-up cell."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from learner_cell import lesson_module
from nbval.plugin import get_sanitize_patterns

import dsv3lib.course as course
from dsv3lib.course import card, record
from dsv3lib.course.exercises import ALL, find
from dsv3lib.errors import CourseError

SANITIZE = Path(__file__).parents[1] / "notebooks" / "sanitize.cfg"


def kept(path: Path) -> dict:
    return json.loads(path.read_text())


# --- check, hint, solution, progress -------------------------------------------------------------------------


def test_check_shows_and_keeps_the_outcome(capsys: pytest.CaptureFixture[str], progress_file: Path) -> None:
    course.check("mla.1")
    assert capsys.readouterr().out.startswith("Open · exercise mla.1")
    assert not progress_file.exists()
    course.check("mla.1", lambda *a: 1)
    assert "should be a tensor; you returned int 1" in capsys.readouterr().out
    assert kept(progress_file)["exercises"]["mla.1"] == {"state": "wrong", "tries": 1}
    course.check("mla.1", find("mla.1").solution)
    assert capsys.readouterr().out.startswith("Right")
    course.check("mla.1", lambda *a: 1)
    assert kept(progress_file)["exercises"]["mla.1"] == {"state": "right", "tries": 3}


def test_hints_come_one_at_a_time(capsys: pytest.CaptureFixture[str], progress_file: Path) -> None:
    hints = find("mla.1").hints
    for number in (1, 2, 3, 3):
        course.hint("mla.1")
        lines = capsys.readouterr().out.splitlines()
        assert lines == [f"Hint {i + 1} of 3 | {hints[i]}" for i in range(number)]
    assert kept(progress_file)["exercises"]["mla.1"]["hints"] == 3


def test_solution_is_shown_folded(capsys: pytest.CaptureFixture[str], progress_file: Path) -> None:
    course.solution("mla.1")
    assert find("mla.1").solution_source() in capsys.readouterr().out
    assert kept(progress_file)["exercises"]["mla.1"]["solution_shown"] is True


def test_exercise_shows_task_dots_and_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    course.exercise("mla.5")
    assert "●●● · 9 minutes" in capsys.readouterr().out


def test_progress_counts(capsys: pytest.CaptureFixture[str]) -> None:
    course.check("start.1", find("start.1").solution)
    course.check("start.2", lambda *a: 3)
    record.learner().update("predictions", "start.p1", answer=3)
    capsys.readouterr()
    course.progress()
    out = capsys.readouterr().out
    assert f"1 of {len(ALL)} exercises solved, 1 tried" in out
    assert re.search(r"00_start_here .*1 of 5 solved +■◪□□□ +1", out)


@pytest.mark.parametrize("function", ["check", "hint", "solution", "exercise"])
def test_unknown_exercise(function: str) -> None:
    with pytest.raises(CourseError, match="there is no exercise 'mla.77'"):
        getattr(course, function)("mla.77")


# --- predictions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "actual", "expected"),
    [
        (None, "it grows", "No prediction made | What happened: it grows."),
        ("it grows", "it grows", "As you predicted | What happened: it grows."),
        ("it stays", "it grows", "Not as you predicted | You predicted: it stays. What happened: it grows."),
        (70, 68.6, "As you predicted | You predicted: 70 KiB. What happened: 68.6 KiB."),
        (686, 68.6, "Yours was 10 times too high."),
        (7, 70, "Yours was 10 times too low."),
        (0, 70, "The difference is 70."),
    ],
)
def test_reveal_compares(
    answer: object, actual: object, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if answer is not None:
        record.learner().update(
            "predictions", "mla.p1", answer=answer, unit="KiB" if answer != str(answer) else ""
        )
    course.reveal("mla.p1", actual)
    assert expected in capsys.readouterr().out


def test_reveal_of_a_time_is_not_compared_by_the_notebook_tests(capsys: pytest.CaptureFixture[str]) -> None:
    course.reveal("mla.p1", 12.3456, unit="ms", varies=True)
    assert capsys.readouterr().out == "measured | No prediction made. What happened: 12.35 ms.\n"


def test_predict_never_waits(capsys: pytest.CaptureFixture[str], progress_file: Path) -> None:
    course.predict("mla.p1", "Which?", options=["this", "that"])
    assert capsys.readouterr().out == "Predict | Which?\n  ( ) this\n  ( ) that\n"
    course.predict("mla.p2", "How many?", number=(1, 10_000, "KiB"))
    assert "a number: 1 to 10,000 KiB" in capsys.readouterr().out
    assert not progress_file.exists()


@pytest.mark.parametrize(
    ("key", "given", "expected"),
    [
        ("mla.1", {"options": ["a", "b"]}, "must look like"),
        ("mla.p1", {}, "either options"),
        ("mla.p1", {"options": ["a", "b"], "number": (1, 2)}, "either options"),
        ("mla.p1", {"options": ["a", "a"]}, "all different"),
        ("mla.p1", {"number": (2, 2)}, "expected low < high"),
    ],
)
def test_malformed_prediction(key: str, given: dict, expected: str) -> None:
    with pytest.raises(CourseError, match=expected):
        course.predict(key, "?", **given)


# --- the progress file ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"exercises": 3}', '{"exercises": {"mla.1": 3}}', "\xff", ""]
)
def test_an_unreadable_file_is_set_aside_not_lost(content: str, progress_file: Path) -> None:
    progress_file.parent.mkdir(parents=True)
    progress_file.write_text(content, encoding="latin-1")
    assert record.learner().update("exercises", "mla.1", state="right") == ""
    assert kept(progress_file)["exercises"] == {"mla.1": {"state": "right"}}
    aside = [path for path in progress_file.parent.iterdir() if "unreadable" in path.name]
    assert len(aside) == 1 and aside[0].read_text(encoding="latin-1") == content


def test_a_folder_that_cannot_be_written_is_said_and_the_lesson_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(record.VARIABLE, str(tmp_path / "file" / "progress.json"))
    course.check("mla.1", find("mla.1").solution)
    out = capsys.readouterr().out
    assert out.startswith("Right") and "Your progress could not be kept" in out


def test_a_failed_write_leaves_the_former_file(progress_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record.learner().update("exercises", "mla.1", state="right")
    before = progress_file.read_bytes()

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record.os, "fsync", full)
    assert "No space left" in record.learner().update("exercises", "mla.1", state="wrong")
    assert progress_file.read_bytes() == before
    assert [path.name for path in progress_file.parent.iterdir()] == [progress_file.name]


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {"HOME": "/h"}, "/h/.local/state/dsv3lib/progress.json"),
        ("linux", {"HOME": "/h", "XDG_STATE_HOME": "/s"}, "/s/dsv3lib/progress.json"),
        ("darwin", {"HOME": "/h"}, "/h/Library/Application Support/dsv3lib/progress.json"),
        ("win32", {"USERPROFILE": "/h", "LOCALAPPDATA": "/l"}, "/l/dsv3lib/progress.json"),
        ("linux", {"HOME": "/h", "DSV3_PROGRESS": "/x/p.json"}, "/x/p.json"),
    ],
)
def test_where_progress_is_kept(platform: str, environment: dict, expected: str) -> None:
    assert record.progress_path(environment, platform) == Path(expected)


# --- set-up, cards, waiting ----------------------------------------------------------------------------------


def test_setup_seeds_everything_and_prints_the_same_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    def draw() -> tuple:
        session = course.setup(seed=11, notebook="01_mla_latent_cache", device="cpu")
        own = torch.rand(1, generator=session.generator).item()
        return random.random(), numpy.random.rand(), torch.rand(1).item(), own, session.device

    assert draw() == draw()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "01_mla_latent_cache · seed 11"
    assert all(line.startswith("measured | ") for line in lines[1:2])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"seed": 1, "notebook": "99_none"}, "no lesson '99_none'"),
        ({"seed": 1, "device": "abacus"}, "device: 'abacus' cannot be used"),
    ],
)
def test_setup_refuses(given: dict, expected: str) -> None:
    with pytest.raises(CourseError, match=expected):
        course.setup(**given)


def test_setup_without_the_gpu_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CourseError, match="there is no CUDA GPU here"):
        course.setup(seed=1, device="cuda")


def test_what_is_measured_is_replaced_before_the_notebook_tests_compare(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[tuple[str, str]] = []
    monkeypatch.setattr(card, "show", lambda html_text, plain, view=None: shown.append((html_text, plain)))
    card.measured("12.3 ms\na second line")
    card.measured("a <b> & `99.9` ms")
    for html_text, plain in shown:
        assert clean(html_text) == "MEASURED"
        assert clean(plain) == "MEASURED", "however many lines a measurement has"
    assert clean("the loss is 3.2") == "the loss is 3.2"


def test_progress_is_replaced_too(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[str, str]] = []
    monkeypatch.setattr(card, "show", lambda html_text, plain, view=None: shown.append((html_text, plain)))
    course.progress()
    course.check("start.1", find("start.1").solution)
    course.progress()
    (html_before, before), _, (html_after, after) = shown
    assert before != after and clean(before) == clean(after) == "PROGRESS"
    assert html_before != html_after and clean(html_before) == clean(html_after)


def clean(text: str) -> str:
    """A text as nbval sees it."""
    for pattern, replacement in get_sanitize_patterns(SANITIZE.read_text()):
        text = re.sub(pattern, replacement, text)
    return text


@given(st.text())
def test_no_text_breaks_out_of_a_card(text: str) -> None:
    bare = re.sub(
        r"</?(?:p|code|div|strong)\b[^>]*>", "", card.card("bad", text, card.words(text), card.code(text))
    )
    assert "<" not in bare


def test_bar_counts_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with course.bar("training", total=3) as step:
        for _ in range(3):
            step(note="loss 2.0")
    err = capsys.readouterr().err
    assert "3/3" in err and err.endswith("done\n")
    with pytest.raises(RuntimeError), course.bar("training", total=3) as step:
        step()
        raise RuntimeError
    assert capsys.readouterr().err.endswith("stopped\n")
    with pytest.raises(CourseError, match="0 steps"), course.bar("nothing", total=0):
        pass


def test_public_names_load_when_asked_for() -> None:
    assert all(callable(getattr(course, name)) for name in course.__all__)
    with pytest.raises(AttributeError, match="no attribute 'teach'"):
        course.teach  # noqa: B018


# --- the idea is the learner's; what goes on is right ---------------------------------------------------------


def test_check_returns_what_later_cells_use(capsys: pytest.CaptureFixture[str]) -> None:
    reference = find("mla.1").solution

    def own(h, W_DKV, W_KR, norm, rope):
        return torch.hstack([norm(h @ W_DKV.T), rope(h @ W_KR.T)])

    assert course.check("mla.1", own) is own
    assert "reference meanwhile" not in capsys.readouterr().out
    for not_yet in (None, lambda *a: 1, lambda *a: 1 / 0):
        assert course.check("mla.1", not_yet) is reference
        assert "The cells below go on with the reference meanwhile." in capsys.readouterr().out


def test_a_right_answer_stands_beside_the_reference_and_an_open_one_folds_it(tmp_path: Path) -> None:
    from dsv3lib.course import answer

    module = lesson_module(tmp_path, "def compress(h, a, b, n, r):\n    return n(h @ a.T)  # mine\n")
    beside = answer._beside(find("mla.1"), module.compress)
    assert beside.index("# mine") < beside.index("the reference") < beside.index("def compress(h, W_DKV")
    assert "<details" not in beside
    assert "<details style" in answer._reference(find("mla.1"), is_open=False), "folded on the page"


def test_exercise_shows_specification_and_picture(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from dsv3lib.course import answer
    from dsv3lib.viz.layer_map import layer_map

    one = replace(find("mla.1"), spec=(("kv_rank", "int", "width of the latent"),), picture=layer_map)
    monkeypatch.setattr(answer, "find", lambda key: one)
    course.exercise("mla.1")
    out = capsys.readouterr().out
    assert "  kv_rank: int: width of the latent" in out and "Figure: A row of boxes" in out
