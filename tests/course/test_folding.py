"""A cell that answers an open question folds what it shows; one whose question is answered does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from IPython.core.interactiveshell import InteractiveShell

from dsv3lib.course import folding, record

REVEAL = "from dsv3lib.course import reveal\n"


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv(record.VARIABLE, str(tmp_path / "progress.json"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    made = InteractiveShell.instance()
    sent: list[dict[str, Any]] = []
    monkeypatch.setattr(made.display_pub, "publish", lambda data, *_a, **_k: sent.append(dict(data)))
    made.sent = sent
    folding.watch(made)
    folding.watch(made)  # a set-up cell that is run twice
    yield made
    InteractiveShell.clear_instance()


CELL = REVEAL + "print('before')\nreveal('mla.p1', 'grow', because='So it is.')\nprint('after')"


def test_an_open_question_folds_all_that_its_cell_shows(
    shell: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    shell.run_cell(CELL)
    assert capsys.readouterr().out == ""
    (shown,) = shell.sent
    page = shown["text/html"]
    assert page.startswith("<details") and "<details open" not in page and page.count("<details") == 1
    assert page.index("before") < page.index("What happened: grow.") < page.index("after")
    assert shown["text/plain"].splitlines()[1:] == [
        "before",
        "No prediction made | What happened: grow. So it is.",
        "after",
    ]


def test_an_answered_question_stays_open(shell: Any, capsys: pytest.CaptureFixture[str]) -> None:
    record.learner().update("predictions", "mla.p1", answer="shrink")
    shell.run_cell(CELL)
    assert capsys.readouterr().out == "before\nafter\n"
    (shown,) = shell.sent
    assert "<details" not in shown["text/html"] and "Not as you predicted" in shown["text/plain"]


def test_a_cell_that_says_what_it_answers_folds_too(shell: Any, capsys: pytest.CaptureFixture[str]) -> None:
    shell.run_cell("# answers mla.p1\nprint('seven')")
    assert capsys.readouterr().out == "" and "seven" in shell.sent[0]["text/html"]
    shell.run_cell("print('eight')  # no question")
    assert capsys.readouterr().out == "eight\n" and len(shell.sent) == 1


def test_a_cell_that_fails_shows_what_it_had_shown(shell: Any, capsys: pytest.CaptureFixture[str]) -> None:
    shell.run_cell("# answers mla.p1\nprint('seven')\n1 / 0")
    (shown,) = shell.sent  # a terminal's shell prints the error too, a notebook's kernel sends it by itself
    assert set(shown) == {"text/plain"} and shown["text/plain"].startswith("seven\n")
    shell.run_cell("print('and on')")
    assert capsys.readouterr().out == "and on\n"


@pytest.mark.parametrize(
    ("source", "keys"),
    [
        ("reveal('a.p1', 3)", ["a.p1"]),
        ('x = 1\nreveal(\n    "a.p2",\n    3)\nreveal("b.p1", 1)', ["a.p2", "b.p1"]),
        ("# answers a.p3", ["a.p3"]),
        ("# reveal('a.p1', 3)\nprint('reveal')", []),
        ("predict('a.p1', 'what?')", []),
    ],
)
def test_what_a_cell_answers(source: str, keys: list[str]) -> None:
    assert folding.answered_keys(source) == keys


def test_outside_a_notebook_there_is_nothing_to_fold() -> None:
    folding.watch(None)


def test_text_in_a_fold_is_text() -> None:
    shown = folding.folded(
        [{"text/plain": "<b>1 < 2</b>"}, {"text/html": "<b>kept</b>", "text/plain": "kept"}]
    )
    assert "&lt;b&gt;1 &lt; 2&lt;/b&gt;" in shown["text/html"] and "<b>kept</b>" in shown["text/html"]
