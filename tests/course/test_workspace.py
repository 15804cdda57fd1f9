"""A learner's own copy: made, brought up to date, reset, handed in; and what goes wrong is told in words."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from dsv3lib.course import overview, pairing, record, report, workspace
from dsv3lib.course.workspace import Workspace, folder_of
from dsv3lib.errors import CourseError

ROOT = Path(__file__).resolve().parents[2]
STEM = "01_mla_latent_cache"


def lesson_book(title: str = "The latent", answer: str = "def f(x):\n    ...") -> NotebookNode:
    shown = [nbformat.v4.new_output("stream", text="70,272\n")]
    return nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell(f"# 01 · {title}\n\nSee [it](../dsv3lib/layers/rope.py).", id="t"),
            nbformat.v4.new_code_cell('predict("mla.p1", "?")', id="p", outputs=shown, execution_count=1),
            nbformat.v4.new_code_cell('exercise("mla.1")', id="e"),
            nbformat.v4.new_code_cell(answer, id="a", metadata={"tags": ["claim:x"]}),
        ]
    )


def course(root: Path, book: NotebookNode | None = None) -> Path:
    pairing.write_notebook(book or lesson_book(), root / "notebooks" / f"{STEM}.ipynb")
    (root / "notebooks" / "source").mkdir(exist_ok=True)
    (root / "notebooks" / "source" / f"{STEM}.py").touch()
    return root


@pytest.fixture(autouse=True)
def own_signatures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))


def answer(own: Workspace, text: str = "def f(x):\n    return 2 * x") -> None:
    book = pairing.read_notebook(own.folder / f"{STEM}.ipynb")
    next(cell for cell in book.cells if cell["id"] == "a").source = text
    pairing.write_notebook(book, own.folder / f"{STEM}.ipynb")


def test_a_copy_has_no_outputs_no_sources_and_links_that_lead_somewhere(tmp_path: Path) -> None:
    own = Workspace(tmp_path / "own")
    assert own.prepare(course(tmp_path / "c")) == [f"{STEM}: your copy is ready"]
    seen = sorted(path.name for path in own.folder.iterdir() if not path.name.startswith("."))
    assert seen == [f"{STEM}.ipynb", overview.PAGE, "library"], "no source/, no tool's file"
    book = pairing.read_notebook(own.folder / f"{STEM}.ipynb")
    assert all(
        not cell.outputs and cell.execution_count is None for cell in book.cells if cell.cell_type == "code"
    )
    link = re.search(r"\]\(([^)]+)\)", book.cells[0].source).group(1)
    assert "rope" in (own.folder / link).read_text()


def test_every_link_of_every_lesson_leads_somewhere_in_a_copy(tmp_path: Path) -> None:
    own = Workspace(tmp_path)
    own.prepare(ROOT)
    books = sorted(own.folder.glob("[0-9][0-9]_*.ipynb"))
    assert books
    for path in books:
        for cell in pairing.read_notebook(path).cells:
            for link in re.findall(r"\]\(([^)\s#:]+)", cell.source) if cell.cell_type == "markdown" else []:
                known = (own.folder / link).exists() or (ROOT / "notebooks" / link).exists()
                assert known or re.match(r"0\d_\w+\.ipynb", link), f"{path.name}: {link}"


def test_the_copy_is_trusted_and_a_learners_distrust_stays(tmp_path: Path) -> None:
    from nbformat.sign import NotebookNotary

    own = Workspace(tmp_path / "own")
    own.prepare(course(tmp_path / "c"))
    assert NotebookNotary().check_signature(pairing.read_notebook(own.folder / f"{STEM}.ipynb"))
    book = pairing.read_notebook(own.folder / f"{STEM}.ipynb")
    book.cells[1].outputs = [nbformat.v4.new_output("display_data", {"text/html": "<b>foreign</b>"})]
    pairing.write_notebook(book, own.folder / f"{STEM}.ipynb")
    own.prepare(course(tmp_path / "c", lesson_book("Newer")))
    assert not NotebookNotary().check_signature(pairing.read_notebook(own.folder / f"{STEM}.ipynb"))


def test_starting_again_changes_nothing_and_a_newer_lesson_keeps_the_answer(tmp_path: Path) -> None:
    own, home = Workspace(tmp_path / "own"), course(tmp_path / "c")
    own.prepare(home)
    answer(own)
    mine = (own.folder / f"{STEM}.ipynb").read_bytes()
    assert own.prepare(home) == []
    assert (own.folder / f"{STEM}.ipynb").read_bytes() == mine
    (said,) = own.prepare(course(home, lesson_book("A better title")))
    assert "with all that you wrote" in said
    texts = [cell.source for cell in pairing.read_notebook(own.folder / f"{STEM}.ipynb").cells]
    assert texts[0].startswith("# 01 · A better title") and texts[3] == "def f(x):\n    return 2 * x"
    (before,) = (own.hidden / "set-aside").glob("*.ipynb")
    assert before.read_bytes() == mine, "what was merged lies aside as it was"


def test_two_learners_of_one_installation(tmp_path: Path) -> None:
    home = course(tmp_path / "c")
    anna, ben = Workspace(tmp_path / "anna"), Workspace(tmp_path / "ben")
    for own in (anna, ben):
        own.prepare(home)
    answer(anna)
    record.Record(anna.progress).update("exercises", "mla.1", state="right", tries=2)
    assert "1 of 1 exercises solved" in (anna.folder / overview.PAGE).read_text(), (
        "the page follows the answers"
    )
    assert "0 of 1 exercises solved" in (ben.folder / overview.PAGE).read_text()
    assert "..." in pairing.read_notebook(ben.folder / f"{STEM}.ipynb").cells[3].source


def test_the_overview_says_what_comes_next_and_what_is_in_preparation(tmp_path: Path) -> None:
    own = Workspace(tmp_path / "own")
    own.prepare(course(tmp_path / "c"))
    text = (own.folder / overview.PAGE).read_text()
    assert f"**Next: [The latent]({STEM}.ipynb)**" in text
    assert re.search(r"\| 02 \| decoupled rope: .* \| in\u00a0preparation \|", text)
    record.Record(own.progress).update("predictions", "mla.p1", answer=3)
    assert f"**Go on with: [The latent]({STEM}.ipynb)**" in (own.folder / overview.PAGE).read_text()
    record.Record(own.progress).update("exercises", "mla.1", state="right")
    assert "All that is written is done" in (own.folder / overview.PAGE).read_text()


def test_a_reset_begins_one_lesson_anew_and_loses_nothing(tmp_path: Path) -> None:
    own, home = Workspace(tmp_path / "own"), course(tmp_path / "c")
    own.prepare(home)
    answer(own)
    kept = record.Record(own.progress)
    kept.update("exercises", "mla.1", state="right")
    kept.update("exercises", "start.1", state="right")
    said = own.reset("01", home)
    assert "..." in pairing.read_notebook(own.folder / f"{STEM}.ipynb").cells[3].source
    assert set(kept.read()["exercises"]) == {"start.1"}
    (aside,) = (own.hidden / "set-aside").glob("*.ipynb")
    assert str(aside) in said and "2 * x" in aside.read_text()
    assert "mla.1" in aside.with_suffix(".progress.json").read_text()
    assert own.prepare(home) == []


@pytest.mark.parametrize(
    ("name", "expected"), [("77", "no lesson '77'; there are 00"), ("05", "in preparation")]
)
def test_a_lesson_that_cannot_be_reset_is_named(tmp_path: Path, name: str, expected: str) -> None:
    own, home = Workspace(tmp_path / "own"), course(tmp_path / "c")
    own.prepare(home)
    with pytest.raises(CourseError, match=expected):
        own.reset(name, home)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("I am no folder")
    with pytest.raises(CourseError, match=r"file/own cannot be written .*name another with --folder"):
        Workspace(tmp_path / "file" / "own").prepare(course(tmp_path / "c"))


@pytest.mark.parametrize("content", ["{ half", "[]", '{"exercises": 3}', '{"predictions": {"a": 1}}'])
def test_a_progress_file_that_cannot_be_read_is_left_alone(tmp_path: Path, content: str) -> None:
    own = Workspace(tmp_path / "own")
    own.progress.parent.mkdir(parents=True)
    own.progress.write_text(content)
    with pytest.raises(CourseError, match=r"progress\.json cannot be read .*[Mm]end it, or move it away"):
        own.prepare(course(tmp_path / "c"))
    assert own.progress.read_text() == content


def test_a_broken_copy_is_left_and_the_other_lessons_are_ready(tmp_path: Path) -> None:
    own, home = Workspace(tmp_path / "own"), course(tmp_path / "c")
    own.prepare(home)
    (own.folder / f"{STEM}.ipynb").write_text("{ half a file")
    (said,) = own.prepare(course(home, lesson_book("Newer")))
    assert "left as it is: `dsv3 lab --reset 01`" in said
    assert (own.folder / f"{STEM}.ipynb").read_text() == "{ half a file"


def test_a_file_that_no_copy_was_made_of_is_left(tmp_path: Path) -> None:
    own = Workspace(tmp_path / "own")
    own.folder.mkdir()
    (own.folder / f"{STEM}.ipynb").write_text("somebody's")
    assert "left as it is" in own.prepare(course(tmp_path / "c"))[0]
    assert (own.folder / f"{STEM}.ipynb").read_text() == "somebody's"


def test_whose_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert folder_of(environment={}) == tmp_path / "dsv3-course"
    assert folder_of(learner="anna", environment={"DSV3_COURSE": "/x"}) == tmp_path / "dsv3-course-anna"
    assert folder_of(environment={"DSV3_COURSE": str(tmp_path / "x")}) == tmp_path / "x"
    assert folder_of(tmp_path / "y", environment={"DSV3_COURSE": "/x"}) == tmp_path / "y"
    for wrong in ("../anna", "a/b", "x" * 41):
        with pytest.raises(CourseError, match="expected up to 40 letters"):
            folder_of(learner=wrong)
    with pytest.raises(CourseError, match="not both"):
        folder_of(tmp_path, "anna")


def command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    return report.run(parser.parse_args(words))


def test_progress_is_handed_in_and_collected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, state in (("anna", "right"), ("ben", "wrong")):
        own = Workspace(tmp_path / name)
        own.prepare(ROOT)
        record.Record(own.progress).update("exercises", "mla.1", state=state, tries=2)
        out = tmp_path / f"{name}.json"
        assert command("--folder", str(own.folder), "--name", name, "--export", str(out)) == 0
    content = json.loads((tmp_path / "anna.json").read_text())
    assert content["learner"] == "anna" and content["exercises"]["mla.1"]["tries"] == 2
    capsys.readouterr()
    assert command("--collect", str(tmp_path / "ben.json"), str(tmp_path / "anna.json")) == 0
    head, anna, ben = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["learner", "00", "01"]
    assert re.search(r"anna +0/\d+ +1/\d+", anna) and re.search(r"ben +0/\d+ +0/\d+", ben)
    assert command("--folder", str(tmp_path / "anna")) == 0
    assert re.search(rf"{STEM} .* 1 of \d+ solved", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "cannot be read"), ("{", "cannot be read"), ("[]", "no file of"), ("{}", "no file of")],
)
def test_what_was_not_exported_is_refused(tmp_path: Path, content: str | None, expected: str) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CourseError, match=expected):
        report.read_export(path)


def test_the_hidden_folder_is_the_one_that_the_record_knows() -> None:
    assert workspace.HIDDEN == record.HIDDEN and Workspace(Path("x")).progress.name == record.FILE
