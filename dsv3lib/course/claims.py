"""Every bold claim and every number in a lesson's prose is tied to a cell that fails if it is false.

In the prose the tie is a comment that no page shows, after the claim or at the end of the paragraph::

    **V3 keeps one latent a token.** <!-- claim: latent -->

and on the code cell that asserts it, a tag: ``# %% tags=["claim:latent"]``. The functions here read a notebook and
return one line for each tie that is missing; ``tests/notebooks/test_claims.py`` runs the cells, and sees each bold
claim's cell fail once its mechanism is switched off.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

from nbformat import NotebookNode

TAG = "claim:"
CLAIM_WORDS = 5
"""A bold span of so many words is a claim; a shorter one is a term."""

_MARKER = re.compile(r"<!--\s*claims?:\s*([^>]*?)\s*-->")
_BOLD = re.compile(r"\*\*(.+?)\*\*", re.DOTALL)
_SOURCE = re.compile(
    r"§|\bTables?\s\d|\bEqs?\.|\bAppendix\b|arXiv|\bthe (?:paper|report)\b|paper's|About \d+ minutes"
)
"""A paragraph that says where its numbers come from."""

_NO_PROSE = re.compile(
    r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$\n]*\$|\[[^\]]*\]\([^)]*\)|<[^>]*>|(?m:^\s*#+ .*$)|(?m:^\s*\d+\.\s)",
    re.DOTALL,
)
_NUMBER = re.compile(r"(?<![\w.:-])(?!0\d\b)\d[\d,.]*")
"""A number; not the digits of V3 or FP8, and not a lesson's own, as in 01."""


@dataclass(frozen=True)
class Block:
    """A paragraph, a list item or a table's row: where it stands, its words, and the claims that it names."""

    cell: int
    text: str
    names: tuple[str, ...]

    @property
    def bold(self) -> bool:
        """Whether it holds a bold claim."""
        return any(len(span.split()) >= CLAIM_WORDS for span in _BOLD.findall(_MARKER.sub(" ", self.text)))

    @property
    def numbers(self) -> list[str]:
        """The numbers that it states without saying where they come from."""
        text = _NO_PROSE.sub(" ", self.text)
        return [] if _SOURCE.search(text) else [n.rstrip(".,") for n in _NUMBER.findall(text)]

    @property
    def opening(self) -> str:
        """Its first words, for a finding."""
        return " ".join(_MARKER.sub("", self.text).split())[:60]


def blocks(book: NotebookNode) -> Iterator[Block]:
    """Yield the blocks of a notebook's prose, in order."""
    for i, cell in enumerate(book.cells):
        if cell.cell_type != "markdown":
            continue
        for text in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.)\s)|\n(?=\|)", cell.source):
            names = [name.strip() for found in _MARKER.findall(text) for name in found.split(",")]
            yield Block(i, text, tuple(name for name in names if name))


def asserting(book: NotebookNode) -> dict[str, list[int]]:
    """Return claim → the code cells that are tagged with it."""
    found: dict[str, list[int]] = {}
    for i, cell in enumerate(book.cells):
        for tag in cell.metadata.get("tags", []):
            if tag.startswith(TAG):
                found.setdefault(tag.removeprefix(TAG), []).append(i)
    return found


def bold_claims(book: NotebookNode) -> list[str]:
    """Return the names of the claims that stand in bold."""
    names = [name for block in blocks(book) if block.bold for name in block.names]
    return list(dict.fromkeys(names))


def claim_problems(book: NotebookNode) -> list[str]:
    """Claims and numbers without a tie, ties that lead nowhere, and cells that are tied but assert nothing."""
    cells = asserting(book)
    found, named = [], set()
    for block in blocks(book):
        named.update(block.names)
        what = "a bold claim" if block.bold else f"the number {block.numbers[0]}" if block.numbers else ""
        if what and not block.names:
            found.append(f"cell {block.cell}: {what} is tied to no cell: {block.opening!r}")
        found += [
            f"cell {block.cell} names claim {name!r}, but no code cell is tagged {TAG + name!r}"
            for name in block.names
            if name not in cells
        ]
    for name, places in cells.items():
        if name not in named:
            found.append(f"cell {places[0]} is tagged {TAG + name!r}, but no sentence names that claim")
        for i in places:
            if not _asserts(book.cells[i].source):
                found.append(f"cell {i} is tagged {TAG + name!r}, but asserts nothing")
    return found


def _asserts(source: str) -> bool:
    """Whether code holds an assert of something that can be false."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return False
    return any(
        isinstance(node, ast.Assert) and not isinstance(node.test, ast.Constant) for node in ast.walk(tree)
    )
