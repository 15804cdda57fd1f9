"""A newer lesson meets a learner's copy: three-way, cell by cell, and nothing of the learner's is lost.

A cell is known by its id, which stays through all versions of a lesson (``dsv3lib.course.pairing``). What the
learner has written, added or moved stays; what they have not touched becomes new; where both changed, theirs stays
and the new text is put under it as words.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence

import nbformat
from nbformat import NotebookNode

from dsv3lib.course import pairing

CHANGED = "**This cell of the lesson has changed since you wrote in it.** Yours stands above. The new one:"


def merged(base: NotebookNode, mine: NotebookNode, new: NotebookNode) -> NotebookNode:
    """Return the learner's copy, brought to a newer version of its lesson.

    Args:
        base: the lesson as the copy was made from it, or was last merged with.
        mine: the learner's copy.
        new: the lesson as it is now.

    Returns:
        A notebook in which every cell that the learner wrote, changed or added stands as they left it.
    """
    mine = _with_ids(mine, base)
    before = {cell["id"]: cell for cell in base.cells}
    wanted = {cell["id"]: cell for cell in new.cells}
    own = {cell["id"]: cell for cell in mine.cells}
    first, after = _followers(mine.cells, before, wanted)
    cells = [*first]
    for cell in new.cells:
        cells += _settled(cell, own.get(cell["id"]), before.get(cell["id"]))
        cells += after.get(cell["id"], [])
    book = copy.deepcopy(mine)
    book.cells = copy.deepcopy(cells)
    book.nbformat, book.nbformat_minor = new.nbformat, max(new.nbformat_minor, mine.nbformat_minor)
    _make_unique(book.cells)
    return book


def _settled(new: NotebookNode, mine: NotebookNode | None, before: NotebookNode | None) -> list[NotebookNode]:
    """What becomes of one cell of the new lesson: a list of none, one, or the learner's with a note."""
    if mine is None:
        taken_out = before is not None and _text(before) == _text(new)
        return [] if taken_out else [new]
    if _text(mine) == _text(new):
        return [mine]
    if before is not None and _text(mine) == _text(before):
        return [new]  # untouched: the new text, whose outputs are not there yet
    if before is not None and _text(before) == _text(new):
        return [mine]
    return [mine, _note(new)]


def _followers(
    cells: Sequence[NotebookNode], before: dict[str, NotebookNode], wanted: dict[str, NotebookNode]
) -> tuple[list[NotebookNode], dict[str, list[NotebookNode]]]:
    """The learner's further cells: those that stand first, and those that follow a cell of the lesson."""
    first: list[NotebookNode] = []
    after: dict[str, list[NotebookNode]] = {}
    place = first
    met: set[str] = set()
    for cell in cells:
        name = cell["id"]
        if name in wanted and name not in met:
            met.add(name)
            place = after.setdefault(name, [])
        elif name in met or name not in before or _text(before[name]) != _text(cell):
            place.append(cell)  # added, or changed by the learner though the lesson no longer has it
    return first, after


def _note(new: NotebookNode) -> NotebookNode:
    """The new text of a cell in which the learner wrote, as words: it does not run."""
    fence = "```" if new.cell_type == "code" else "~~~"
    kind = "python" if new.cell_type == "code" else "markdown"
    text = f"{CHANGED}\n\n{fence}{kind}\n{new.source}\n{fence}"
    name = hashlib.sha256(f"{new['id']}\n{new.source}".encode()).hexdigest()[:8]
    return nbformat.v4.new_markdown_cell(text, id=name)


def _with_ids(mine: NotebookNode, base: NotebookNode) -> NotebookNode:
    """A copy whose cells all have an id; a tool that drops ids has not dropped what the cells are."""
    mine = copy.deepcopy(mine)
    if any(not cell.get("id") for cell in mine.cells):
        pairing.carry_ids(mine, base, "yours")
    return mine


def _make_unique(cells: Sequence[NotebookNode]) -> None:
    """Give a cell whose id is taken another one; a copied cell may have kept that of its original."""
    taken: set[str] = set()
    for number, cell in enumerate(cells):
        if cell["id"] in taken:
            cell["id"] = hashlib.sha256(f"{cell['id']} {number} {cell.source}".encode()).hexdigest()[:8]
        taken.add(cell["id"])


def _text(cell: NotebookNode) -> tuple[str, str]:
    return cell.cell_type, cell.source
