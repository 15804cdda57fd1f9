"""The lessons as they are committed: pairs in step, executed, stripped, readable."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from lessons import PARAMETERS, ROOT, STEMS, TO_BRING_TO_THE_PATTERN, bounds, notebook

from dsv3lib.course import inspection, notebooks, pairing, readme
from dsv3lib.course.exercises import of_lesson
from dsv3lib.course.syllabus import LESSONS, lesson
from dsv3lib.errors import CourseError

each_lesson = pytest.mark.parametrize("stem", STEMS)


def test_lessons_are_found_and_named_by_the_syllabus() -> None:
    assert STEMS, "no notebook under notebooks/: the parametrised tests would pass by being empty"
    assert set(STEMS) <= {one.stem for one in LESSONS}


@each_lesson
def test_text_and_notebook_agree(stem: str) -> None:
    source = pairing.read_source(pairing.source_of(notebook(stem)))
    assert pairing.disagreements(source, pairing.read_notebook(notebook(stem))) == []


@each_lesson
def test_cell_ids_stay_when_the_notebook_is_made_again(stem: str) -> None:
    committed = pairing.read_notebook(notebook(stem))
    again = pairing.read_source(pairing.source_of(notebook(stem)))
    pairing.carry_ids(again, committed, stem)
    assert [cell.id for cell in again.cells] == [cell.id for cell in committed.cells]


@each_lesson
@pytest.mark.parametrize(
    "examine",
    [
        inspection.execution_problems,
        inspection.error_problems,
        inspection.magic_problems,
        inspection.metadata_problems,
        inspection.prose_problems,
        inspection.figure_problems,
    ],
    ids=lambda function: function.__name__,
)
def test_notebook_is_in_order(stem: str, examine: object) -> None:
    assert examine(pairing.read_notebook(notebook(stem))) == []


@each_lesson
def test_lesson_keeps_to_the_pattern(stem: str) -> None:
    if stem not in TO_BRING_TO_THE_PATTERN:
        assert notebooks.pattern_problems(pairing.read_notebook(notebook(stem)), stem) == []


@each_lesson
def test_number_of_code_cells(stem: str) -> None:
    limit = bounds(stem)
    assert inspection.size_problems(pairing.read_notebook(notebook(stem)), limit.least, limit.most) == []


@each_lesson
def test_parameters_cell(stem: str) -> None:
    assert inspection.parameter_problems(pairing.read_notebook(notebook(stem)), PARAMETERS) == []


@each_lesson
def test_every_exercise_of_the_lesson_is_asked_and_checked(stem: str) -> None:
    text = pairing.source_of(notebook(stem)).read_text(encoding="utf-8")
    for one in of_lesson(lesson(stem).short):
        assert f'exercise("{one.id}")' in text, f"{one.id} is never asked"
        assert f'check("{one.id}"' in text, f"{one.id} is never checked"


def test_jupytext_is_told_the_same_pairing() -> None:
    assert f'formats = "{pairing.FORMATS}"' in (ROOT / "notebooks" / "jupytext.toml").read_text()


@each_lesson
def test_links_lead_somewhere(stem: str) -> None:
    path = notebook(stem)
    assert inspection.link_problems(pairing.read_notebook(path), path.parent) == []


def test_a_link_to_nowhere_is_seen(tmp_path: Path) -> None:
    (tmp_path / "there.py").touch()
    text = "[a](there.py) [b](there.py#part) [c](https://example.com/x) [d](#below) [e](not_there.ipynb)"
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])
    found = inspection.link_problems(book, tmp_path)
    assert found == ["cell 0 links to not_there.ipynb, which does not exist"]


def test_the_readme_lists_the_lessons_of_the_syllabus() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text == readme.updated(text, ROOT / "notebooks"), "run make notebooks"


def test_a_readme_row_follows_the_syllabus(tmp_path: Path) -> None:
    (tmp_path / LESSONS[1].stem).with_suffix(".ipynb").touch()
    before = f"# x\n\n{readme.BEGIN}\nold\n{readme.END}\n\nrest\n"
    after = readme.updated(before, tmp_path)
    assert f"](notebooks/{LESSONS[1].stem}.ipynb)" in after and f"| {LESSONS[1].minutes} |" in after
    assert f"| {LESSONS[2].idea} | in preparation |" in after and after.endswith("\n\nrest\n")
    with pytest.raises(CourseError, match="for the table of lessons to stand between"):
        readme.updated("# nothing", tmp_path)
