"""A lesson is written as text (py:percent) and read as a notebook; this keeps the two one.

The text is the truth. Cells keep their ids when the notebook is made anew from it: an unchanged cell keeps
its own, a changed cell keeps that of the cell it replaces, and a new cell gets one that follows from its
content, so that making the notebook twice gives the same file.
"""

from __future__ import annotations

import difflib
import hashlib
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode

from dsv3lib.errors import CourseError
from dsv3lib.files import write_whole

PERCENT = "py:percent"
FORMATS = "notebooks///ipynb,notebooks/source///py:percent"
"""Jupytext's name for the pairing; ``notebooks/jupytext.toml`` says the same to other tools."""

KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
LANGUAGE = {
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "name": "python",
    "pygments_lexer": "ipython3",
}

_HEADER = """\
# ---
# jupyter:
#   jupytext:
#     formats: {formats}
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: {display_name}
#     language: {language}
#     name: {name}
# ---

"""


def source_of(notebook: Path) -> Path:
    """Return where the text of a notebook lies."""
    return notebook.parent / "source" / f"{notebook.stem}.py"


def read_source(path: Path) -> NotebookNode:
    """Return the notebook that a text describes: cells with tags, no outputs.

    Raises:
        CourseError: the file is missing or is no py:percent text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CourseError(f"the source {path} cannot be read: {error}") from error
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith("# %%")), None)
    if first is None:
        raise CourseError(f"the source {path} has no cell; a cell begins with a line '# %%'")
    stray = next((line for line in lines[:first] if line.strip() and not line.startswith("#")), None)
    if stray is not None:
        raise CourseError(f"the source {path} has {stray!r} before its first cell; it would be lost")
    # The header is for other tools: the notebook's metadata are the course's own.
    written = jupytext.reads("\n".join(lines[first:]) + "\n", fmt=PERCENT)
    book = nbformat.v4.new_notebook(metadata={"kernelspec": KERNELSPEC, "language_info": LANGUAGE})
    book.cells = [_plain(cell) for cell in written.cells]
    return book


def read_notebook(path: Path) -> NotebookNode:
    """Return a notebook from its file.

    Raises:
        CourseError: the file is missing or is no notebook.
    """
    try:
        return nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
    except (OSError, ValueError, nbformat.ValidationError) as error:
        raise CourseError(f"the notebook {path} cannot be read: {error}") from error


def write_source(book: NotebookNode, path: Path) -> None:
    """Write a notebook's cells as text, for a lesson that was edited in JupyterLab."""
    bare = nbformat.v4.new_notebook(cells=[_plain(cell) for cell in book.cells])
    bare.metadata["jupytext"] = {"notebook_metadata_filter": "-all"}
    text = jupytext.writes(bare, fmt=PERCENT)
    start = text.find("# %%")
    write_whole(path, _HEADER.format(formats=FORMATS, **KERNELSPEC) + text[max(start, 0) :])


def write_notebook(book: NotebookNode, path: Path) -> None:
    """Write a notebook's file by rename, so that an interrupted run leaves the former one whole."""
    write_whole(path, nbformat.writes(book, version=4).rstrip("\n") + "\n")


def carry_ids(new: NotebookNode, old: NotebookNode | None, name: str) -> None:
    """Give each cell of ``new`` its id: that of the cell of ``old`` it continues, else one from its content.

    Args:
        new: changed in place.
        old: the notebook as it was, or None.
        name: the lesson, which new ids depend on.
    """
    before = [] if old is None else old.cells
    matcher = difflib.SequenceMatcher(
        a=[_key(cell) for cell in before], b=[_key(cell) for cell in new.cells], autojunk=False
    )
    for cell in new.cells:
        cell["id"] = ""
    for kind, a0, a1, b0, b1 in matcher.get_opcodes():
        if kind in ("equal", "replace"):
            for former, cell in zip(before[a0:a1], new.cells[b0:b1], strict=False):
                if kind == "equal" or former.cell_type == cell.cell_type:
                    cell["id"] = former.get("id", "")
    taken = {cell["id"] for cell in new.cells if cell["id"]}
    for cell in new.cells:
        if not cell["id"]:
            cell["id"] = _fresh_id(cell, name, taken)
            taken.add(cell["id"])


def disagreements(source: NotebookNode, book: NotebookNode) -> list[str]:
    """Return where text and notebook differ: the number of cells, a type, a source, tags; one line each."""
    found = []
    if len(source.cells) != len(book.cells):
        found.append(f"the source has {len(source.cells)} cells, the notebook {len(book.cells)}")
    for number, (ours, theirs) in enumerate(zip(source.cells, book.cells, strict=False)):
        if ours.cell_type != theirs.cell_type:
            kinds = f"{ours.cell_type} in the source, {theirs.cell_type} in the notebook"
            found.append(f"cell {number} is {kinds}")
        elif ours.source != theirs.source:
            texts = f"{_first(ours)} / {_first(theirs)}"
            found.append(f"cell {number} differs between source and notebook: {texts}")
        elif ours.metadata.get("tags", []) != theirs.metadata.get("tags", []):
            found.append(f"cell {number} has other tags in the source than in the notebook")
    return found


def _plain(cell: NotebookNode) -> NotebookNode:
    make = {"code": nbformat.v4.new_code_cell, "raw": nbformat.v4.new_raw_cell}
    kept = {"tags": list(cell.metadata["tags"])} if cell.metadata.get("tags") else {}
    return make.get(cell.cell_type, nbformat.v4.new_markdown_cell)(cell.source.strip("\n"), metadata=kept)


def _key(cell: NotebookNode) -> tuple[str, str]:
    return cell.cell_type, cell.source


def _fresh_id(cell: NotebookNode, name: str, taken: set[str]) -> str:
    for attempt in range(len(taken) + 1):
        text = f"{name}\n{cell.cell_type}\n{attempt}\n{cell.source}"
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        if digest not in taken:
            return digest
    raise CourseError(f"no free id for a cell of {name}")  # unreachable short of a broken hash


def _first(cell: NotebookNode) -> str:
    lines = cell.source.splitlines()
    return repr(lines[0][:50]) if lines else "(empty)"
