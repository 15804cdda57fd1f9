"""Each guard is seen to fail: a small notebook is broken in one way, and the guard named for it says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nbformat
import papermill
import pytest
from nbformat import NotebookNode
from roads import UnknownParameter, examined, nbval, with_parameters

from dsv3lib.course import inspection, notebooks, pairing
from dsv3lib.errors import CourseError

pytestmark = pytest.mark.notebook

SOURCE = """\
# %% [markdown]
# # A small lesson

# %% tags=["parameters"]
STEPS = 3
SEED = 1
TIME = "12.3 ms"

# %%
from IPython.display import HTML
HTML('<div class="dsv3-measured">' + TIME + '<!--/measured--></div>')

# %%
print(sum(range(STEPS)))

# %% [markdown]
# *Figure: one dot in the middle of an empty square.*
"""

SILENT_WIDGET = """\
import ipywidgets

out = ipywidgets.Output()
with out:
    1 / 0
out
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> NotebookNode:
    """The small lesson, executed as ``make notebooks`` does it."""
    root = lay(tmp_path_factory.mktemp("made"))
    return notebooks.make(root, "00_small")


def lay(root: Path, source: str = SOURCE) -> Path:
    (root / "notebooks" / "source").mkdir(parents=True)
    (root / "notebooks" / "source" / "00_small.py").write_text(source)
    return root


def write(root: Path, book: NotebookNode) -> Path:
    path = root / "notebooks" / "00_small.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(book, path)
    return path


def changed(book: NotebookNode, edit: Callable[[NotebookNode], object]) -> NotebookNode:
    copy = nbformat.from_dict(nbformat.reads(nbformat.writes(book), as_version=4))
    edit(copy)
    return copy


def cell_with(book: NotebookNode, text: str) -> NotebookNode:
    return next(cell for cell in book.cells if text in cell.source)


def test_the_small_lesson_is_in_order(made: NotebookNode, tmp_path: Path) -> None:
    path = write(lay(tmp_path), made)
    assert notebooks.check(tmp_path, "00_small") == []
    assert nbval(path, tmp_path).returncode == 0
    assert examined(path) == []


def test_nbval_catches_a_changed_output_but_not_a_changed_time(made: NotebookNode, tmp_path: Path) -> None:
    def edit(book: NotebookNode) -> None:
        data = cell_with(book, "measured").outputs[0].data
        data["text/html"] = data["text/html"].replace("12.3", "99.9")
        cell_with(book, "sum").outputs[0].text = "4\n"

    result = nbval(write(tmp_path, changed(made, edit)), tmp_path)
    assert result.returncode == 1
    assert "Cell 2" in result.stdout and "1 failed, 2 passed" in result.stdout, result.stdout


def test_an_unknown_magic_is_caught(made: NotebookNode, tmp_path: Path) -> None:
    book = changed(made, lambda book: cell_with(book, "sum").update(source="%no_such_magic 3", outputs=[]))
    assert any("`%no_such_magic` not found" in line for line in examined(write(tmp_path, book)))
    root = lay(tmp_path / "project", SOURCE + "\n# %%\n# %no_such_magic 3\n")
    with pytest.raises(CourseError, match="no_such_magic"):
        notebooks.make(root, "00_small")
    assert not (root / "notebooks" / "00_small.ipynb").exists()


def test_an_error_inside_an_output_widget_is_caught(made: NotebookNode, tmp_path: Path) -> None:
    book = changed(made, lambda book: cell_with(book, "sum").update(source=SILENT_WIDGET, outputs=[]))
    assert examined(write(tmp_path, book)) == ["an Output widget holds ZeroDivisionError: division by zero"]


def test_a_raising_cell_leaves_the_former_notebook(made: NotebookNode, tmp_path: Path) -> None:
    root = lay(tmp_path, SOURCE + "\n# %%\nraise KeyError('gone')\n")
    path = write(root, made)
    before = path.read_bytes()
    with pytest.raises(CourseError, match="KeyError"):
        notebooks.make(root, "00_small")
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir() if file.is_file()] == [path.name]


def test_papermill_refuses_an_unknown_name_and_passes_a_known_one(made: NotebookNode, tmp_path: Path) -> None:
    path = write(tmp_path, made)
    with pytest.raises(UnknownParameter, match="SEEDS; it has"):
        with_parameters(path, tmp_path / "out.ipynb", SEEDS=3)
    out = with_parameters(path, tmp_path / "out.ipynb", STEPS=5)
    assert cell_with(out, "sum").outputs[0].text == "10\n"


def test_papermill_catches_a_raising_cell(made: NotebookNode, tmp_path: Path) -> None:
    book = changed(made, lambda book: cell_with(book, "sum").update(source="raise ValueError('no')"))
    with pytest.raises(papermill.PapermillExecutionError, match="ValueError"):
        with_parameters(write(tmp_path, book), tmp_path / "out.ipynb", STEPS=5)


def strip_counts(book: NotebookNode) -> None:
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.execution_count = None


def add_widgets(state: dict) -> Callable[[NotebookNode], object]:
    return lambda book: book.metadata.update(widgets={inspection.WIDGET_STATE: state})


def add_output(output: NotebookNode, near: str = "sum") -> Callable[[NotebookNode], object]:
    return lambda book: cell_with(book, near).outputs.append(output)


def add_figure(book: NotebookNode) -> None:
    book.cells = book.cells[:-1]  # the Markdown that holds its alt text
    add_output(PICTURE)(book)


def page(html: str) -> NotebookNode:
    return nbformat.v4.new_output("display_data", {"text/html": html})


ERROR = nbformat.v4.new_output("error", ename="E", evalue="x", traceback=[])
PICTURE = nbformat.v4.new_output("display_data", {"image/png": "iVBO"})
VIEW = nbformat.v4.new_output("display_data", {inspection.WIDGET_VIEW: {"model_id": "1"}})
HELD = {"state": {"1": {"state": {"outputs": [dict(ERROR)]}}}}
MAGIC = nbformat.v4.new_output(
    "stream", name="stderr", text="UsageError: Line magic function `%x` not found."
)

BREAKS: dict[str, tuple[Callable[[NotebookNode], object], Callable[[NotebookNode], list[str]], str]] = {
    "stripped counts": (strip_counts, inspection.execution_problems, "was never executed"),
    "counts out of order": (
        lambda book: cell_with(book, "sum").update(execution_count=9),
        inspection.execution_problems,
        "count 9, expected 3",
    ),
    "an error output": (add_output(ERROR), inspection.error_problems, "ended in E: x"),
    "an error held by a widget": (add_widgets(HELD), inspection.error_problems, "Output widget holds E: x"),
    "an unknown magic's complaint": (add_output(MAGIC), inspection.magic_problems, "does not exist: %x"),
    "widget state": (add_widgets({"state": {}}), inspection.metadata_problems, "strip it"),
    "widget metadata without state": (add_widgets({}), inspection.metadata_problems, "lacks 'state'"),
    "a widget's view": (add_output(VIEW), inspection.metadata_problems, "widget that is gone"),
    "times of execution": (
        lambda book: cell_with(book, "sum").metadata.update(execution={"iopub.status.idle": "now"}),
        inspection.metadata_problems,
        "metadata 'execution'",
    ),
    "a doubled id": (
        lambda book: book.cells[1].update(id=book.cells[0].id),
        inspection.metadata_problems,
        "not unique",
    ),
    "an installation": (
        lambda book: cell_with(book, "sum").update(source="!pip install torch"),
        inspection.prose_problems,
        "installs something",
    ),
    "a path of one machine": (
        lambda book: cell_with(book, "sum").outputs[0].update(text="read /ho" + "me/ada/data.txt\n"),
        inspection.prose_problems,
        "/ho" + "me/ada/data.txt",
    ),
    "a long cell": (
        lambda book: cell_with(book, "sum").update(source="x = 1\n" * 16),
        inspection.prose_problems,
        "16 lines",
    ),
    "a line that is cut off": (
        lambda book: cell_with(book, "sum").update(source="x = 1  # " + "long " * 20),
        inspection.page_problems,
        "at most 96",
    ),
    "raw Markdown in an output": (
        lambda book: cell_with(book, "sum").outputs[0].update(text="the **bias** moves\n"),
        inspection.page_problems,
        "raw **",
    ),
    "the view of a run that has not begun": (
        lambda book: cell_with(book, "sum").outputs[0].update(text="load: no step has been recorded yet"),
        inspection.page_problems,
        "has not begun",
    ),
    "a picture in HTML without alt text": (
        add_output(page('<img src="data:image/png;base64,iV">')),
        inspection.caption_problems,
        "without an alt text",
    ),
    "a figure without a caption": (
        add_output(page('<figure class="dsv3-figure"><img alt="one dot in a square"></figure>')),
        inspection.caption_problems,
        "without a caption",
    ),
    "a figure without alt text": (add_figure, inspection.figure_problems, "without an alt text"),
    "too few cells": (
        lambda book: book,
        lambda book: inspection.size_problems(book, 25, 40),
        "3 code cells, expected 25 to 40",
    ),
    "a parameter that is not set": (
        lambda book: cell_with(book, "STEPS =").update(source="SEED = 1\nFAST == 2"),
        lambda book: inspection.parameter_problems(book, frozenset({"STEPS", "SEED"})),
        "does not set STEPS",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_inspection_finds(made: NotebookNode, name: str) -> None:
    edit, examine, expected = BREAKS[name]
    if name != "too few cells":
        assert examine(made) == [], "the guard must be silent on the sound notebook"
    findings = examine(changed(made, edit))
    assert any(expected in line for line in findings), findings


def test_a_figure_with_its_alt_text_beside_it_passes(made: NotebookNode) -> None:
    assert inspection.figure_problems(changed(made, add_output(PICTURE))) == []


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda text: text.replace("sum(", "max("), "differs between source and notebook"),
        (lambda text: text + "\n# %%\n1 + 1\n", "the source has 6 cells, the notebook 5"),
        (lambda text: text.replace(' tags=["parameters"]', ""), "other tags"),
        (lambda text: text.replace("# %%\nprint", "# %% [markdown]\n# print"), "is markdown in the source"),
        (lambda text: "", "has no cell"),
        (lambda text: "x = 1\n" + text, "before its first cell"),
    ],
)
def test_a_pair_out_of_step_is_caught(
    made: NotebookNode, tmp_path: Path, edit: Callable[[str], str], expected: str
) -> None:
    root = lay(tmp_path, edit(SOURCE))
    write(root, made)
    findings = notebooks.check(root, "00_small")
    assert any(expected in line for line in findings), findings
    assert notebooks.main(["--root", str(root), "--check"]) == 1


def test_a_folded_cell_is_collapsed_in_jupyterlab(tmp_path: Path) -> None:
    root = lay(tmp_path, SOURCE + '\n# %% tags=["folded"]\nprint(7)\n')
    book = notebooks.make(root, "00_small")
    assert cell_with(book, "print(7)").metadata["jupyter"] == {"source_hidden": True}
    assert inspection.metadata_problems(book) == []
    book.cells[0].metadata["jupyter"] = {"source_hidden": True}
    assert inspection.metadata_problems(book) == ["cell 0 has metadata 'jupyter'"]


def test_ids_follow_their_cells(made: NotebookNode, tmp_path: Path) -> None:
    edited = SOURCE.replace("sum(range(STEPS))", "sum(range(STEPS + 1))").replace(
        "# # A small lesson", "# # A small lesson\n\n# %%\nnew = 1"
    )
    again = pairing.read_source(lay(tmp_path, edited) / "notebooks" / "source" / "00_small.py")
    pairing.carry_ids(again, made, "00_small")
    assert cell_with(again, "STEPS + 1").id == cell_with(made, "sum").id
    assert cell_with(again, "measured").id == cell_with(made, "measured").id
    assert cell_with(again, "new = 1").id not in {cell.id for cell in made.cells}
    assert len({cell.id for cell in again.cells}) == len(again.cells)


def test_making_twice_gives_the_same_file(made: NotebookNode, tmp_path: Path) -> None:
    root = lay(tmp_path)
    path = write(root, made)
    before = path.read_text()
    assert notebooks.main(["--root", str(root)]) == 0
    assert path.read_text() == before
    assert notebooks._is_current(root, "00_small")
    source = pairing.source_of(path)
    source.write_text(SOURCE + "\n# more\n")
    assert not notebooks._is_current(root, "00_small")


def test_a_notebook_edited_in_jupyterlab_becomes_text_again(made: NotebookNode, tmp_path: Path) -> None:
    root = lay(tmp_path)
    write(root, changed(made, lambda book: cell_with(book, "sum").update(source="print('edited')")))
    assert notebooks.main(["--root", str(root), "--to-source", "00"]) == 0
    assert notebooks.check(root, "00_small") == []
    text = pairing.source_of(root / "notebooks" / "00_small.ipynb").read_text()
    assert "print('edited')" in text and pairing.FORMATS in text


def test_wrong_calls_say_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert notebooks.main(["--root", str(tmp_path), "--check"]) == 1
    assert "no notebook sources were found" in capsys.readouterr().err
    lay(tmp_path)
    assert notebooks.main(["--root", str(tmp_path), "--check", "42"]) == 1
    assert "there is no lesson '42'; there are 00_small" in capsys.readouterr().err
