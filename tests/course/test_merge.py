"""A newer lesson is merged into a learner's copy, and nothing that they wrote is lost."""

from __future__ import annotations

import copy

import nbformat
from hypothesis import given
from hypothesis import strategies as st
from nbformat import NotebookNode

from dsv3lib.course.merge import CHANGED, merged

TEXTS = st.sampled_from(["a = 1", "b = 2", "c = 3", "def f(x):\n    ...", "words", ""])
NAMES = st.sampled_from([f"id{i}" for i in range(8)])


def book(*cells: tuple[str, str]) -> NotebookNode:
    """A notebook of code cells, (id, source) each."""
    made = [nbformat.v4.new_code_cell(source, id=name) for name, source in cells]
    return nbformat.v4.new_notebook(cells=made)


def sources(made: NotebookNode) -> list[str]:
    return [cell.source for cell in made.cells]


@st.composite
def books(draw: st.DrawFn) -> NotebookNode:
    names = draw(st.lists(NAMES, unique=True, max_size=6))
    return book(*((name, draw(TEXTS)) for name in names))


@st.composite
def learners(draw: st.DrawFn, base: NotebookNode) -> NotebookNode:
    """What a learner may do to a copy: change, delete, move and add cells, run some."""
    cells = [copy.deepcopy(cell) for cell in base.cells if draw(st.booleans()) or draw(st.booleans())]
    for cell in cells:
        if draw(st.booleans()):
            cell.source = draw(st.sampled_from(["mine = 1", "mine = 2", cell.source]))
        if draw(st.booleans()):
            cell.outputs = [nbformat.v4.new_output("stream", text="seen")]
    for number in range(draw(st.integers(0, 3))):
        added = nbformat.v4.new_code_cell(f"added = {number}", id=f"own{number}")
        cells.insert(draw(st.integers(0, len(cells))), added)
    return nbformat.v4.new_notebook(cells=draw(st.permutations(cells)))


@given(st.data())
def test_nothing_the_learner_wrote_is_lost(data: st.DataObject) -> None:
    base, new = data.draw(books()), data.draw(books())
    mine = data.draw(learners(base))
    result = merged(base, mine, new)
    before = {cell["id"]: cell.source for cell in base.cells}
    kept = sources(result)
    for cell in mine.cells:
        if before.get(cell["id"]) != cell.source:
            assert cell.source in kept
    assert len({cell["id"] for cell in result.cells}) == len(result.cells)
    nbformat.validate(result)


@given(st.data())
def test_an_untouched_copy_becomes_the_new_lesson(data: st.DataObject) -> None:
    base, new = data.draw(books()), data.draw(books())
    assert sources(merged(base, copy.deepcopy(base), new)) == sources(new)


@given(st.data())
def test_with_nothing_new_the_copy_stays_and_merging_again_changes_nothing(data: st.DataObject) -> None:
    base, new = data.draw(books()), data.draw(books())
    mine = data.draw(learners(base))
    assert sorted(sources(merged(base, mine, base))) == sorted(sources(mine))
    once = merged(base, mine, new)
    assert sources(merged(new, once, new)) == sources(once)


BASE = book(("t", "title"), ("q", "def f(x):\n    ..."), ("c", "check(f)"), ("o", "old"))


def test_an_answer_stays_and_the_rest_is_new() -> None:
    mine = copy.deepcopy(BASE)
    mine.cells[1].source = "def f(x):\n    return x"
    mine.cells[2].outputs = [nbformat.v4.new_output("stream", text="Right")]
    mine.cells.insert(2, nbformat.v4.new_code_cell("f(3)", id="own"))
    new = book(("t", "new title"), ("n", "new cell"), ("q", "def f(x):\n    ..."), ("c", "check(f)"))
    result = merged(BASE, mine, new)
    assert sources(result) == ["new title", "new cell", "def f(x):\n    return x", "f(3)", "check(f)"]
    assert result.cells[4].outputs, "what has not changed keeps what it showed"
    assert not result.cells[0].outputs


def test_where_both_changed_the_learners_stays_and_the_new_text_is_shown_once() -> None:
    mine = copy.deepcopy(BASE)
    mine.cells[1].source = "def f(x):\n    return x"
    new = book(("t", "title"), ("q", "def f(x, y):\n    ..."), ("c", "check(f)"), ("o", "old"))
    once = merged(BASE, mine, new)
    assert sources(once)[1] == "def f(x):\n    return x"
    assert once.cells[2].cell_type == "markdown" and once.cells[2].source.startswith(CHANGED)
    assert "def f(x, y):" in once.cells[2].source
    assert sources(merged(new, once, new)) == sources(once)


def test_a_cell_that_the_learner_took_out_stays_out_until_it_changes() -> None:
    mine = copy.deepcopy(BASE)
    del mine.cells[3]
    assert sources(merged(BASE, mine, BASE)) == sources(mine)
    assert sources(merged(BASE, mine, book(("t", "title"), ("o", "newer")))) == ["title", "newer"]


def test_ids_that_a_tool_dropped_are_found_again() -> None:
    mine = copy.deepcopy(BASE)
    mine.cells[1].source = "def f(x):\n    return x"
    for cell in mine.cells:
        del cell["id"]
    new = book(("t", "title"), ("q", "def f(x):\n    ..."), ("c", "check(f)"), ("o", "newer"))
    assert sources(merged(BASE, mine, new)) == ["title", "def f(x):\n    return x", "check(f)", "newer"]
