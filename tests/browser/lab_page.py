"""What a learner does in JupyterLab, as functions on a Playwright page.

Waiting is done on JupyterLab's model (execution counts, the kernel's status), not on how the page looks.
"""

from __future__ import annotations

from pathlib import Path

from lab_server import LabServer
from playwright.sync_api import Locator, Page, TimeoutError

CHROMIUM_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
VIEWPORT = {"width": 1280, "height": 800}
PATIENCE_S = 180.0
"""How long anything may take: a busy machine of two cores starts JupyterLab, a kernel and torch in a minute."""

_PANEL = "const panel = window.jupyterapp.shell.currentWidget; const cells = panel.content.model.cells;"
_IDLE = f"""() => {{
  if (!window.jupyterapp || !window.jupyterapp.shell.currentWidget) return false;
  {_PANEL}
  const kernel = panel.sessionContext.session && panel.sessionContext.session.kernel;
  return Boolean(kernel) && kernel.status === 'idle' && !panel.sessionContext.pendingInput;
}}"""
_COUNTED = f"""() => {{
  {_PANEL}
  for (let i = 0; i < cells.length; i++) {{
    const cell = cells.get(i);
    if (cell.type === 'code' && cell.sharedModel.source.trim() && !cell.executionCount) return false;
  }}
  return panel.sessionContext.session.kernel.status === 'idle';
}}"""


class LabPage:
    """One notebook open in JupyterLab."""

    def __init__(self, page: Page, server: LabServer) -> None:
        self.page = page
        self.server = server
        page.set_default_timeout(PATIENCE_S * 1000)

    def open_notebook(self, notebook: str, timeout_s: float = PATIENCE_S) -> None:
        """Open a notebook (its path from the server's root) and wait until its kernel is idle."""
        self.page.goto(self.server.address(notebook), wait_until="commit", timeout=timeout_s * 1000)
        self.page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=timeout_s * 1000)
        self.wait_idle(timeout_s)

    def wait_idle(self, timeout_s: float = PATIENCE_S) -> None:
        """Wait until the kernel is there and idle."""
        self.page.wait_for_function(_IDLE, timeout=timeout_s * 1000)

    def command(self, name: str, **arguments: object) -> None:
        """Execute one of JupyterLab's commands and wait for it."""
        self.page.evaluate(
            "([name, given]) => window.jupyterapp.commands.execute(name, given).then(() => null)",
            [name, arguments],
        )

    def run_all(self, timeout_s: float = PATIENCE_S) -> None:
        """Clear, run all cells, and wait until each non-empty code cell has a count and the kernel rests."""
        self.command("notebook:clear-all-cell-outputs")
        # Not awaited: it may take longer than one evaluation may.
        self.page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }")
        self.page.wait_for_function(_COUNTED, timeout=timeout_s * 1000)
        self.wait_idle(timeout_s)

    def run_cell(self, index: int, timeout_s: float = PATIENCE_S) -> None:
        """Run one cell, by its place in the notebook, and wait until it is done."""
        before = self.count_of(index)
        self._activate(index)
        self.page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-cell'); }")
        self.page.wait_for_function(
            f"([i, before]) => {{ {_PANEL} const now = cells.get(i).executionCount;"
            "return now && now !== before && panel.sessionContext.session.kernel.status === 'idle'; }",
            arg=[index, before],
            timeout=timeout_s * 1000,
        )

    def count_of(self, index: int) -> int | None:
        """Return a cell's execution count."""
        return self.page.evaluate(f"(i) => {{ {_PANEL} return cells.get(i).executionCount; }}", index)

    def sources(self) -> list[str]:
        """Return the text of every cell."""
        return self.page.evaluate(
            f"() => {{ {_PANEL} const all = Array.from({{length: cells.length}}, (_, i) => cells.get(i));"
            "return all.map((cell) => cell.sharedModel.source); }"
        )

    def find_cell(self, text: str) -> int:
        """Return the place of the first cell that contains ``text``."""
        for index, source in enumerate(self.sources()):
            if text in source:
                return index
        raise AssertionError(f"no cell contains {text!r}")

    def outputs(self, index: int) -> list[dict]:
        """Return a cell's outputs from the model, as in a notebook file."""
        return self.page.evaluate(f"(i) => {{ {_PANEL} return cells.get(i).outputs.toJSON(); }}", index)

    def errors(self) -> list[str]:
        """Return every error output of the notebook as ``cell: name: value``."""
        return self.page.evaluate(
            f"""() => {{ {_PANEL} const found = [];
            for (let i = 0; i < cells.length; i++) if (cells.get(i).type === 'code')
              for (const out of cells.get(i).outputs.toJSON())
                if (out.output_type === 'error') found.push(`${{i}}: ${{out.ename}}: ${{out.evalue}}`);
            return found; }}"""
        )

    def cell(self, index: int) -> Locator:
        """Return a cell as the page shows it."""
        return self.page.locator(".jp-Notebook .jp-Cell").nth(index)

    def output_text(self, index: int) -> str:
        """Return what a learner reads under a cell."""
        return self.cell(index).locator(".jp-OutputArea").first.inner_text()

    def type_code(self, index: int, code: str) -> None:
        """Replace a cell's text with the keyboard: Enter to edit it, select all, type."""
        self.cell(index).scroll_into_view_if_needed()
        self._activate(index)
        self.page.keyboard.press("Enter")
        self.page.keyboard.press("Control+a")
        self.page.keyboard.insert_text(code)
        self.page.keyboard.press("Escape")

    def move_slider(self, index: int, presses: int = 1, key: str = "ArrowRight", nth: int = 0) -> None:
        """Move a slider under a cell with the arrow keys."""
        handle = self.cell(index).locator(".widget-slider .noUi-handle, .noUi-handle").nth(nth)
        handle.scroll_into_view_if_needed()
        handle.focus()
        for _ in range(presses):
            handle.press(key)

    def press_button(self, index: int, name: str) -> None:
        """Reach a button under a cell and press Enter on it, as a learner without a mouse does."""
        button = self.cell(index).get_by_role("button", name=name, exact=True)
        button.scroll_into_view_if_needed()
        button.focus()
        self.page.keyboard.press("Enter")

    def picture(self, index: int) -> str:
        """Return the source of the first picture under a cell."""
        return self.cell(index).locator(".jp-OutputArea img").first.get_attribute("src") or ""

    def wait_picture_changes(self, index: int, before: str, timeout_s: float = PATIENCE_S) -> str:
        """Wait until the picture under a cell is another than ``before``; return it."""
        self.page.wait_for_function(
            "([i, before]) => { const cell = document.querySelectorAll('.jp-Notebook .jp-Cell')[i];"
            "const img = cell && cell.querySelector('.jp-OutputArea img');"
            "return img && img.src !== before; }",
            arg=[index, before],
            timeout=timeout_s * 1000,
        )
        return self.picture(index)

    def _activate(self, index: int) -> None:
        self.page.evaluate(
            f"(i) => {{ {_PANEL} panel.content.deselectAll(); panel.content.activeCellIndex = i;"
            "panel.content.mode = 'command'; panel.content.node.focus(); }",
            index,
        )

    def picture_alt(self, index: int) -> str:
        """Return the alt text of the first picture under a cell."""
        return self.cell(index).locator(".jp-OutputArea img").first.get_attribute("alt") or ""

    def picture_changed(self, index: int, before: str, within_s: float = 2) -> bool:
        """Return whether the picture under a cell becomes another than ``before`` within a while."""
        try:
            self.wait_picture_changes(index, before, within_s)
        except TimeoutError:
            return False
        return True

    def cells_with(self, selector: str) -> list[int]:
        """Return the places of the cells that show something that matches."""
        return self.page.evaluate(
            "(s) => Array.from(document.querySelectorAll('.jp-Notebook .jp-Cell'))"
            ".map((cell, i) => cell.querySelector(s) ? i : -1).filter((i) => i >= 0)",
            selector,
        )

    def wait_text(self, index: int, text: str, timeout_s: float = PATIENCE_S) -> None:
        """Wait until a learner reads ``text`` under a cell."""
        self.page.wait_for_function(
            "([i, text]) => { const cell = document.querySelectorAll('.jp-Notebook .jp-Cell')[i];"
            "return cell && cell.querySelector('.jp-OutputArea').innerText.includes(text); }",
            arg=[index, text],
            timeout=timeout_s * 1000,
        )

    def select(self, index: int) -> None:
        """Make a cell the active one, in command mode, with the focus on it."""
        self.cell(index).scroll_into_view_if_needed()
        self._activate(index)

    def tab_to(self, selector: str, most: int = 30) -> None:
        """Press Tab until the focus is on an element that matches; fail after ``most`` presses."""
        for _ in range(most):
            self.page.keyboard.press("Tab")
            if self.page.evaluate("(s) => Boolean(document.activeElement.matches(s))", selector):
                return
        focus = self.page.evaluate("() => document.activeElement.outerHTML.slice(0, 200)")
        raise AssertionError(f"{most} presses of Tab do not reach {selector}; the focus is on {focus}")

    def text_colours(self, selector: str) -> list[tuple[str, str, str]]:
        """Return (colour, background, words) of every text inside the matching elements."""
        return [
            tuple(found)
            for found in self.page.evaluate(
                """(selector) => {
                  const ground = (e) => {
                    for (; e; e = e.parentElement) {
                      const colour = getComputedStyle(e).backgroundColor;
                      if (colour !== 'transparent' && !colour.endsWith(', 0)')) return colour;
                    }
                    return 'rgb(255, 255, 255)';
                  };
                  const found = [];
                  for (const card of document.querySelectorAll(selector)) {
                    const walk = document.createTreeWalker(card, NodeFilter.SHOW_TEXT);
                    while (walk.nextNode()) {
                      const words = walk.currentNode.textContent.trim();
                      const holder = walk.currentNode.parentElement;
                      if (words) found.push([getComputedStyle(holder).color, ground(holder), words]);
                    }
                  }
                  return found;
                }""",
                selector,
            )
        ]

    def close(self) -> None:
        """Shut the notebook's kernel down, so that kernels do not pile up, and close the page."""
        self.page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
        self.page.close(run_before_unload=False)

    def screenshot(self, path: Path) -> None:
        """Keep a picture of what the learner sees."""
        self.page.screenshot(path=str(path))
