"""What a learner does in JupyterLab, as functions on a Playwright page.

Waiting is done on JupyterLab's model (execution counts, the kernel's status), not on how the page looks.
"""

from __future__ import annotations

from pathlib import Path

from jupyterlab_server import LabServer
from playwright.sync_api import Locator, Page

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

    def open_notebook(self, notebook: str, timeout_s: float = 60) -> None:
        """Open a notebook (its path from the server's root) and wait until its kernel is idle."""
        self.page.goto(self.server.address(notebook))
        self.page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=timeout_s * 1000)
        self.wait_idle(timeout_s)

    def wait_idle(self, timeout_s: float = 60) -> None:
        """Wait until the kernel is there and idle."""
        self.page.wait_for_function(_IDLE, timeout=timeout_s * 1000)

    def command(self, name: str, **arguments: object) -> None:
        """Execute one of JupyterLab's commands and wait for it."""
        self.page.evaluate(
            "([name, given]) => window.jupyterapp.commands.execute(name, given).then(() => null)",
            [name, arguments],
        )

    def run_all(self, timeout_s: float = 120) -> None:
        """Clear, run all cells, and wait until each non-empty code cell has a count and the kernel rests."""
        self.command("notebook:clear-all-cell-outputs")
        # Not awaited: it may take longer than one evaluation may.
        self.page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }")
        self.page.wait_for_function(_COUNTED, timeout=timeout_s * 1000)
        self.wait_idle(timeout_s)

    def run_cell(self, index: int, timeout_s: float = 60) -> None:
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
        return self.page.evaluate(
            f"(i) => {{ {_PANEL} return cells.get(i).outputs.toJSON(); }}", index
        )

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

    def wait_picture_changes(self, index: int, before: str, timeout_s: float = 10) -> str:
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

    def screenshot(self, path: Path) -> None:
        """Keep a picture of what the learner sees."""
        self.page.screenshot(path=str(path))
