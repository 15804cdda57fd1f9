"""The pipeline view and the game in JupyterLab: controls, the time slider, a refusal, a game played to its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import nbformat
import pytest
from lab_page import LabPage
from lab_server import LabServer
from playwright.sync_api import Page

NOTEBOOK = """
from dsv3lib.viz.pipeline_view import PipelineView
PipelineView("dualpipe", stages=16, microbatches=40)
---
from dsv3lib.viz.pipeline_game import PipelineGame
PipelineGame(stages=2, microbatches=2)
"""
GAME = [
    (0, "F0.0"), (1, "F0.0"), (1, "I0.0"), (0, "F0.1"), (0, "I0.0"), (0, "W0.0"), (1, "F0.1"), (1, "I0.1"), (1, "W0.0"),
    (1, "W0.1"), (0, "I0.1"), (0, "W0.1"),
]  # fmt: skip


@pytest.fixture(scope="module")
def lab(light: LabServer, open_page: Callable[[LabServer], LabPage]) -> Iterator[LabPage]:
    cells = [nbformat.v4.new_code_cell(text.strip()) for text in NOTEBOOK.split("---\n")]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), light.root / "pipeline_view.ipynb")
    lab = open_page(light)
    lab.open_notebook("pipeline_view.ipynb")
    lab.run_all()
    yield lab
    lab.close()


def wait_words(page: Page, selector: str, text: str) -> None:
    page.wait_for_function(
        "([selector, text]) => [...document.querySelectorAll(selector)].some((e) => e.innerText.includes(text))",
        arg=[selector, text],
    )


def drawn(page: Page) -> str:
    return page.evaluate("document.querySelector('.dsv3-pipe canvas').toDataURL()")


def test_the_slider_steps_without_the_kernel(lab: LabPage) -> None:
    page = lab.page
    wait_words(page, ".dsv3-pipe h3", "DualPipe, 16 ranks, 40 micro-batches")
    wait_words(page, ".dsv3-pipe .words", "idle at most 14 a rank")
    before = drawn(page)
    slider = page.locator(".dsv3-pipe input.time")
    slider.focus()
    words = set()
    for _ in range(3):
        slider.press("ArrowLeft")
        words.add(page.locator(".dsv3-pipe .words").first.inner_text())
    assert drawn(page) != before and len(words) == 3
    assert page.locator(".dsv3-pipe[data-draw-ms]").count() == 1  # how long the last drawing took, to be read there


def test_the_controls_simulate_anew(lab: LabPage) -> None:
    page = lab.page
    page.locator(".dsv3-pipe select.schedule").select_option("zb1p")
    wait_words(page, ".dsv3-pipe .words", "idle at most 15 a rank")
    stages = page.locator(".dsv3-pipe input.stages")
    stages.fill("8")
    stages.press("Tab")
    wait_words(page, ".dsv3-pipe .words", "idle at most 7 a rank")
    page.locator(".dsv3-pipe select.schedule").select_option("dualpipe")
    wait_words(page, ".dsv3-pipe .words", "peak 9 micro-batches")
    stages.fill("7")
    stages.press("Tab")
    wait_words(page, ".dsv3-pipe .wrong", "stages: 7, expected an even number")
    assert page.locator(".dsv3-pipe h3").first.inner_text().startswith("DualPipe, 8 ranks")
    stages.fill("8")
    stages.press("Tab")
    page.wait_for_function("() => document.querySelector('.dsv3-pipe .wrong').innerText === ''")


def test_a_box_tells_its_action_on_hover(lab: LabPage) -> None:
    page = lab.page
    canvas = page.locator(".dsv3-pipe canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 37 * box["width"] / 980, box["y"] + 35 * box["width"] / 980)
    page.wait_for_function("() => document.querySelector('.dsv3-pipe canvas').title.startsWith('rank 0: F0.0')")


def test_a_game_is_played_to_its_end_and_scored(lab: LabPage) -> None:
    page = lab.page
    game = page.locator(".dsv3-pipe", has=page.locator("button.undo"))
    for rank, text in GAME:
        game.locator("tr").nth(rank).get_by_role("button", name=text, exact=True).click()
        page.wait_for_function(
            "([rank, text]) => ![...document.querySelectorAll('.dsv3-pipe tr')[rank].querySelectorAll('button')]"
            ".some((b) => b.innerText === text)",
            arg=[rank, text],
        )
    wait_words(page, ".dsv3-pipe .score", "Done: it takes 7")
    game.locator("button.again").click()
    wait_words(page, ".dsv3-pipe .score", "0 of 16 parts placed")
    for text in ("F0.0", "B0.0"):
        game.locator("tr").nth(0).get_by_role("button", name=text, exact=True).click()
    wait_words(page, ".dsv3-pipe .wrong", "which rank 1 has not placed yet")
    assert lab.errors() == []
