"""The look of everything the course says: one card in HTML, and the same words as plain text.

Colours come from JupyterLab's own variables, so a card is at home in the light and in the dark theme; the
fallbacks serve pages that are not JupyterLab. Meaning never hangs on colour alone: each card opens with a
word (Right, Not yet, Open, …).
"""

from __future__ import annotations

import html
import re
from typing import Any

TONES = {
    "plain": "var(--jp-brand-color1, #1976d2)",
    "good": "var(--jp-success-color1, #2e7d32)",
    "bad": "var(--jp-error-color1, #c62828)",
    "open": "var(--jp-border-color1, #9e9e9e)",
}
"""Tone → the colour of a card's edge."""

_CARD = (
    "color:var(--jp-content-font-color1, inherit);"
    "background:var(--jp-layout-color1, transparent);"
    "font-family:var(--jp-content-font-family, sans-serif);"
    "font-size:var(--jp-content-font-size1, 14px);"
    "line-height:1.5;max-width:46em;margin:.3em 0;padding:.5em .9em;"
    "border:1px solid var(--jp-border-color2, #bdbdbd);border-left-width:5px;border-radius:3px;"
)
_NOTE = (
    "color:var(--jp-content-font-color1, inherit);white-space:pre-line;max-width:46em;padding:.1em .9em;"
    "font-family:var(--jp-content-font-family, sans-serif);font-size:var(--jp-content-font-size1, 14px);"
    "line-height:1.5;border-left:5px solid var(--jp-border-color2, #bdbdbd);"
)
_CODE = (
    "display:block;white-space:pre;overflow-x:auto;margin:.4em 0;padding:.5em .7em;"
    "font-family:var(--jp-code-font-family, monospace);font-size:var(--jp-code-font-size, 13px);"
    "color:var(--jp-content-font-color1, inherit);background:var(--jp-layout-color2, rgba(128,128,128,.12));"
)
_INLINE = (
    "font-family:var(--jp-code-font-family, monospace);font-size:.93em;padding:0 .25em;"
    "color:inherit;background:var(--jp-layout-color2, rgba(128,128,128,.15));border-radius:2px;"
)


def card(tone: str, title: str, *blocks: str) -> str:
    """Return a card: its title in bold, then blocks of HTML (see :func:`words`, :func:`code`, :func:`fold`).

    It is a live region: a screen reader speaks it when it appears.
    """
    edge = f"border-left-color:{TONES[tone]};"
    inner = "".join(blocks)
    return (
        f'<div class="dsv3-card dsv3-{tone}" role="status" style="{_CARD}{edge}">'
        f"<strong>{inline(title)}</strong>{inner}</div>"
    )


def words(text: str) -> str:
    """Return paragraphs of plain text as HTML; `` `code` `` becomes code, a blank line a new paragraph."""
    style = 'style="margin:.35em 0;white-space:pre-line"'
    return "".join(f"<p {style}>{inline(part)}</p>" for part in re.split(r"\n\s*\n", text.strip()))


def inline(text: str) -> str:
    """Return one run of text as HTML, with `` `code` `` marked."""
    escaped = html.escape(text, quote=False)
    return re.sub(r"`([^`\n]+)`", rf'<code style="{_INLINE}">\1</code>', escaped)


def code(source: str) -> str:
    """Return a block of code as HTML."""
    return f'<code style="{_CODE}">{html.escape(source.strip(), quote=False)}</code>'


def fold(summary: str, *blocks: str, is_open: bool = False) -> str:
    """Return blocks folded under a summary; Tab reaches it and Enter unfolds it."""
    state = " open" if is_open else ""
    head = f'<summary style="cursor:pointer">{inline(summary)}</summary>'
    return f'<details{state} style="margin:.35em 0">{head}{"".join(blocks)}</details>'


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table as HTML; the first column names the row. Cells are plain text, as :func:`inline` takes it."""
    return table_of_html([inline(h) for h in head], [[inline(value) for value in row] for row in rows])


def table_of_html(head: list[str], rows: list[list[str]]) -> str:
    """Return a table whose cells are HTML already."""
    cell = "padding:.15em .9em .15em 0;text-align:left;color:inherit;background:transparent;border:0;"
    rule = "border-bottom:1px solid var(--jp-border-color2, #bdbdbd);"
    heads = "".join(f'<th scope="col" style="{cell}{rule}">{h}</th>' for h in head)
    body = "".join(
        '<tr style="background:transparent">'
        + f'<th scope="row" style="{cell}font-weight:normal">{row[0]}</th>'
        + "".join(f'<td style="{cell}">{value}</td>' for value in row[1:])
        + "</tr>"
        for row in rows
    )
    return f'<table style="border-collapse:collapse;margin:.4em 0"><tr>{heads}</tr>{body}</table>'


def columns(*parts: tuple[str, str]) -> str:
    """Return pieces of code under their titles, side by side where there is room, else one below the other."""
    side = "flex:1 1 32em;min-width:0"
    inner = "".join(
        f'<div style="{side}"><em>{inline(title)}</em>{code(text)}</div>' for title, text in parts
    )
    return f'<div style="display:flex;flex-wrap:wrap;gap:0 1em">{inner}</div>'


def show(html_text: str, plain: str, view: dict[str, Any] | None = None) -> None:
    """Display a card: as a widget where there is a kernel, else as HTML, else as plain text.

    Args:
        html_text: the card.
        plain: the same in plain text.
        view: a widget's own view bundle, preferred by front ends that hold its model.
    """
    from IPython.display import display

    if not in_notebook():
        print(plain)
        return
    display({"text/plain": plain, "text/html": html_text, **(view or {})}, raw=True)


def in_notebook() -> bool:
    """Return whether there is a front end that shows HTML; a plain Python session has none."""
    from IPython.core.interactiveshell import InteractiveShell

    return InteractiveShell.initialized()


def view_of(widget: Any) -> dict[str, Any]:
    """Return the part of a widget's bundle that front ends render as the live widget."""
    mime = "application/vnd.jupyter.widget-view+json"
    return {mime: widget._repr_mimebundle_()[mime]}


def measured(text: str | list[str], *blocks: str) -> None:
    """Display what differs from machine to machine or from run to run: a time, a device, a speed.

    The notebook tests compare every other output word for word; this one they replace before comparing
    (``tests/notebooks/sanitize.cfg``), so nothing else may hold a time.

    Args:
        text: plain text, or its lines.
        blocks: HTML to show instead where HTML is shown.
    """
    # A cell of a table may hold a model's own text, line ends and all: every line of it has to bear the mark.
    lines = [part for line in ([text] if isinstance(text, str) else text) for part in line.splitlines() or [""]]
    inner = "".join(blocks) or inline("\n".join(lines))
    body = f'<div class="dsv3-measured" role="note" style="{_NOTE}">{inner}<!--/measured--></div>'
    show(body, "\n".join(f"measured | {part}" for part in lines))
