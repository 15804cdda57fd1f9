"""A table in a lesson: a real one on the page, aligned columns in a terminal."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from dsv3lib.course import card
from dsv3lib.errors import CourseError


def table(
    head: Sequence[str], rows: Sequence[Sequence[Any]], *, caption: str = "", varies: bool = False
) -> None:
    """Display a table.

    Args:
        head: the names of the columns.
        rows: what stands in them, the row's name first. Whole numbers get their commas, text may hold
            `` `code` ``; round any other number before.
        caption: one sentence under it.
        varies: True if it holds times or facts of one machine, which the notebook tests do not compare.

    Raises:
        CourseError: a row has more or fewer cells than the head.
    """
    for row in rows:
        if len(row) != len(head):
            raise CourseError(f"a table of {len(head)} columns got a row of {len(row)} cells: {list(row)!r}")
    names = list(head)
    lines = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(line[i]) for line in [names, *lines]) for i in range(len(names))]
    plain = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [names, *lines]
    ] + ([caption] if caption else [])
    shown = card.table(names, lines)
    if caption:
        shown += (
            f'<p class="dsv3-caption" style="margin:.1em 0 .6em 0;max-width:46em">{html.escape(caption)}</p>'
        )
    if varies:
        card.measured(plain, shown)
    else:
        card.show(shown, "\n".join(plain))


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
