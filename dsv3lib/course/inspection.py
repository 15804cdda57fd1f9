"""What can be wrong with an executed notebook without running it: each function returns one line a finding.

``python -m dsv3lib.course.notebooks --check`` prints them; the tests require that there are none, and show
on broken notebooks that each function finds what it is named for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nbformat import NotebookNode

WIDGET_STATE = "application/vnd.jupyter.widget-state+json"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
MAX_LINES = 15
"""Lines of a code cell that a reader takes in at once."""

MAX_COLUMNS = 96
"""Letters of a line of code that stand beside JupyterLab's file browser in a window of 1280 pixels."""

FOLDED = "folded"
"""Tag of a code cell that JupyterLab shows collapsed."""

_ALT_REACH = 2
"""How many cells away a figure's alt text may stand in Markdown."""

_FOREIGN_PATH = re.compile(r"(?<![\w.:/)+<*\]])/(?:[\w.-]+/)+[\w.-]+|\b[A-Z]:\\+Users\b")
_LINK = re.compile(r"\]\(([^)\s#][^)\s]*)\)")
_TAGS = re.compile(r'<code.*?</code>|src="data:[^"]*"|<[^>]*>', re.DOTALL)
_INSTALL = re.compile(r"\b(?:pip3?|conda|mamba|uv)\s+(?:pip\s+)?install\b")
_ALT_MARKDOWN = re.compile(r"(?i)(?:\*\*?|_)?(?:figure|alt(?: text)?)\b[^\n]{15,}|!\[[^\]]{15,}\]")


def execution_problems(book: NotebookNode) -> list[str]:
    """Non-empty code cells without an execution count, or with counts that do not run 1, 2, 3, …"""
    counts = [(i, cell.get("execution_count")) for i, cell in _code(book) if cell.source.strip()]
    missing = [f"cell {i} was never executed: it has no count" for i, count in counts if count is None]
    if missing:
        return missing
    return [
        f"cell {i} has execution count {count}, expected {expected}: not one clean run from top to bottom"
        for expected, (i, count) in enumerate(counts, start=1)
        if count != expected
    ]


def error_problems(book: NotebookNode) -> list[str]:
    """Error outputs of cells, and errors that an Output widget holds (which leave the cell itself green)."""
    found = [
        f"cell {i} ended in {out.get('ename')}: {out.get('evalue')}"
        for i, out in _outputs(book)
        if out.output_type == "error"
    ]
    for model in _widget_models(book.metadata.get("widgets", {})):
        for out in model.get("state", {}).get("outputs") or ():
            if isinstance(out, Mapping) and out.get("output_type") == "error":
                found.append(f"an Output widget holds {out.get('ename')}: {out.get('evalue')}")
    return found


def magic_problems(book: NotebookNode) -> list[str]:
    """Magics that do not exist: IPython prints a line on stderr and goes on, so the cell looks green."""
    pattern = re.compile(r"UsageError: (?:Line|Cell) magic function `([^`]+)` not found")
    return [
        f"cell {i} uses a magic that does not exist: {match.group(1)}"
        for i, out in _outputs(book)
        if out.output_type == "stream"
        for match in pattern.finditer(out.text)
    ]


def metadata_problems(book: NotebookNode) -> list[str]:
    """Widget state, views of widgets that are gone, times, versions, and ids that are missing or doubled."""
    found = []
    widgets = book.metadata.get("widgets")
    if widgets is not None:
        has_state = isinstance(widgets.get(WIDGET_STATE), Mapping) and "state" in widgets[WIDGET_STATE]
        found.append(
            "the notebook's metadata holds widget state: strip it"
            if has_state
            else "the widget metadata lacks 'state': GitHub refuses to show such a notebook"
        )
    extra = set(book.metadata) - {"kernelspec", "language_info", "widgets", "jupytext"}
    found += [f"the notebook's metadata holds {key!r}" for key in sorted(extra)]
    if "version" in book.metadata.get("language_info", {}):
        found.append("the notebook's metadata names the Python version of the machine that ran it")
    for i, cell in enumerate(book.cells):
        known = {"tags", "jupyter"} if FOLDED in cell.metadata.get("tags", []) else {"tags"}
        found += [f"cell {i} has metadata {key!r}" for key in sorted(set(cell.metadata) - known)]
    gone = [i for i, out in _outputs(book) if WIDGET_VIEW in _data(out)]
    found += [f"cell {i} shows a widget that is gone" for i in gone]
    ids = [cell.get("id") for cell in book.cells]
    if None in ids or len(set(ids)) != len(ids):
        found.append("cell ids are missing or not unique")
    return found


def prose_problems(book: NotebookNode) -> list[str]:
    """Paths of one machine, installations, and code cells that are too long."""
    found = []
    for i, cell in enumerate(book.cells):
        if _INSTALL.search(cell.source) and cell.cell_type == "code":
            found.append(f"cell {i} installs something: the environment is made by make setup")
        texts = [cell.source, *(_text(out) for out in cell.get("outputs", []))]
        paths = [match.group() for text in texts for match in _FOREIGN_PATH.finditer(text)]
        found += [f"cell {i} names a path of one machine: {path}" for path in paths]
        lines = len([line for line in cell.source.splitlines() if line.strip()])
        if cell.cell_type == "code" and lines > MAX_LINES:
            found.append(f"cell {i} has {lines} lines of code, at most {MAX_LINES}")
    return found


def page_problems(book: NotebookNode) -> list[str]:
    """Lines of code that are cut off beside the file browser, raw Markdown in outputs, views saved while empty."""
    found = []
    for i, cell in _code(book):
        longest = max(map(len, cell.source.splitlines()), default=0)
        if longest > MAX_COLUMNS:
            found.append(f"cell {i} has a line of {longest} letters, at most {MAX_COLUMNS}")
    for i, out in _outputs(book):
        seen = _TAGS.sub(" ", _text(out))
        if re.search(r"\*\*\w[^*\n]*\*\*", seen):  # a pair: a text of code may hold **kwargs
            found.append(f"cell {i} shows raw ** in its output")
        if "no step has been recorded yet" in seen:
            found.append(
                f"cell {i} saved the view of a run that has not begun: show it in the cell that trains"
            )
    return found


def caption_problems(book: NotebookNode) -> list[str]:
    """Figures in HTML whose picture has no alt text or that have no caption for eyes."""
    found = []
    for i, out in _outputs(book):
        page = str(_data(out).get("text/html", ""))
        for picture in re.findall(r"<img\b[^>]*>", page):
            if not re.search(r'\balt="[^"]{15,}"', picture):
                found.append(f"cell {i} shows a picture without an alt text")
        bare = page.count('<figure class="dsv3-figure"') - page.count('<figcaption class="dsv3-caption"')
        found += [f"cell {i} shows a figure without a caption"] * max(0, bare)
    return found


def figure_problems(book: NotebookNode) -> list[str]:
    """Pictures without an alt text: in the output's own metadata, or in Markdown within two cells."""
    found = []
    for i, out in _outputs(book):
        if not any(mime.startswith("image/") for mime in _data(out)):
            continue
        own = any(isinstance(v, Mapping) and v.get("alt") for v in out.get("metadata", {}).values())
        near = book.cells[max(0, i - _ALT_REACH) : i + _ALT_REACH + 1]
        said = any(cell.cell_type == "markdown" and _ALT_MARKDOWN.search(cell.source) for cell in near)
        if not own and not said:
            found.append(f"cell {i} shows a figure without an alt text")
    return found


def link_problems(book: NotebookNode, folder: Path) -> list[str]:
    """Links to files that are not there; ``folder`` is the notebook's."""
    return [
        f"cell {i} links to {target}, which does not exist"
        for i, cell in enumerate(book.cells)
        if cell.cell_type == "markdown"
        for target in _LINK.findall(cell.source)
        if "://" not in target and not (folder / target.partition("#")[0]).exists()
    ]


def size_problems(book: NotebookNode, least: int, most: int) -> list[str]:
    """A lesson with fewer or more code cells than its bounds."""
    count = len(list(_code(book)))
    return [] if least <= count <= most else [f"{count} code cells, expected {least} to {most}"]


def parameter_problems(book: NotebookNode, names: frozenset[str]) -> list[str]:
    """A parameters cell that is missing, doubled, or does not set exactly these names."""
    tagged = [cell for _, cell in _code(book) if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        return [f"{len(tagged)} cells are tagged 'parameters', expected 1"]
    return [
        f"the parameters cell does not set {name} on a line of its own"  # papermill reads no other form
        for name in sorted(names)
        if not re.search(rf"(?m)^{name}\s*(?::[^=\n]+)?=(?!=)", tagged[0].source)
    ]


def problems(book: NotebookNode) -> list[str]:
    """Every finding that needs neither the source nor a lesson's bounds."""
    checks = (
        execution_problems,
        error_problems,
        magic_problems,
        metadata_problems,
        prose_problems,
        figure_problems,
    )
    return [line for one in checks for line in one(book)]


def _code(book: NotebookNode) -> Iterator[tuple[int, NotebookNode]]:
    return ((i, cell) for i, cell in enumerate(book.cells) if cell.cell_type == "code")


def _outputs(book: NotebookNode) -> Iterator[tuple[int, NotebookNode]]:
    return ((i, out) for i, cell in _code(book) for out in cell.get("outputs", []))


def _data(out: Mapping[str, Any]) -> Mapping[str, Any]:
    return out.get("data", {})


def _text(out: Mapping[str, Any]) -> str:
    texts = [value for mime, value in _data(out).items() if mime.startswith("text/")]
    return "\n".join(str(text) for text in [*texts, out.get("text", "")])


def _widget_models(widgets: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(widgets.get(WIDGET_STATE, {}).get("state", {}).values())
