"""A learner's first lesson in their own copy: the overview, every cell, a slider, a prediction, exercises both ways.

One lesson is driven by default; ``DSV3_BROWSER_LESSONS=01,03`` names others. All are run by the other roads.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lab_page import LabPage
from lab_server import LabServer

from dsv3lib.course.exercises import of_lesson
from dsv3lib.course.notebooks import stems
from dsv3lib.course.syllabus import lesson as named

CHOSEN = tuple(os.environ.get("DSV3_BROWSER_LESSONS", "00").split(","))
STEMS = [stem for stem in stems(Path(__file__).resolve().parents[2]) if stem.startswith(CHOSEN)]
RUN_SECONDS = 400
IMPORTS = "from __future__ import annotations\nimport math, torch\nfrom torch import Tensor\n"
FOLDED = "What happened: predict first"


@pytest.fixture(scope="module", params=STEMS)
def lesson(
    request: pytest.FixtureRequest, light: LabServer, open_page: Callable[[LabServer], LabPage]
) -> Iterator[tuple[LabPage, str]]:
    """A lesson on less data, run once by a learner who has done nothing yet."""
    stem = request.param
    light.progress.unlink(missing_ok=True)
    lab = open_page(light)
    lab.open_notebook(f"{stem}.ipynb")
    assert not any(lab.outputs(i) for i, text in enumerate(lab.sources()) if "setup(" in text), (
        "nothing is shown yet"
    )
    cell = next(i for i, text in enumerate(lab.sources()) if re.search(r"(?m)^FAST\b", text))
    lab.type_code(cell, re.sub(r"(?m)^FAST\b.*$", "FAST = True", lab.sources()[cell]))
    lab.run_all(RUN_SECONDS)
    yield lab, stem
    lab.close()


def test_the_overview_is_the_first_page_and_leads_to_a_lesson(
    light: LabServer, open_page: Callable[[LabServer], LabPage]
) -> None:
    page = open_page(light).page
    page.goto(f"{light.url}/lab/tree/Overview.md?reset&token={light.token}", wait_until="commit")
    page.wait_for_selector(".jp-MarkdownViewer table")
    text = page.locator(".jp-MarkdownViewer").inner_text()
    assert "exercises solved" in text and "in\u00a0preparation" in text
    listed = page.locator(".jp-DirListing-item").all_inner_texts()
    assert any("00_start_here.ipynb" in one for one in listed)
    assert not any(one.startswith(("jupytext", ".dsv3")) for one in listed)
    assert page.locator(".jp-toast, .Toastify__toast").count() == 0, "nothing pops up"
    page.locator(".jp-MarkdownViewer a", has_text=re.compile("Start here")).first.click()
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    page.close(run_before_unload=False)


def test_every_cell_runs(lesson: tuple[LabPage, str]) -> None:
    lab, _ = lesson
    assert lab.errors() == []


def test_every_slider_moves_its_figure(lesson: tuple[LabPage, str]) -> None:
    lab, _ = lesson
    moved = 0
    for cell in lab.cells_with(".dsv3-live .noUi-handle"):
        before = lab.picture(cell)
        lab.move_slider(cell, key="ArrowRight")
        if not lab.picture_changed(cell, before):  # it may have stood at its end
            lab.move_slider(cell, key="ArrowLeft")
            lab.wait_picture_changes(cell, before)
        moved += 1
    # A view that would answer a question stays folded, slider and all, until the question has a prediction.
    open_from_the_start = [text for text in lab.sources() if not text.startswith("# answers ")]
    assert moved == len([text for text in open_from_the_start if re.search(r"(?m)^\s*live\(", text)])


def test_answers_stay_folded_until_a_prediction_is_made(lesson: tuple[LabPage, str]) -> None:
    lab, _ = lesson
    sources = lab.sources()
    keys = [match for text in sources for match in re.findall(r'predict\(\s*"([\w.]+)"', text)]
    assert keys
    for key in keys:
        answer = next(i for i, text in enumerate(sources) if re.search(rf'reveal\(\s*"{key}"', text))
        shown = lab.output_text(answer)
        assert shown.startswith(FOLDED) and "What happened: predict first" in shown
        assert len(shown.splitlines()) == 1, f"{key} gives its answer away: {shown!r}"
    asking = lab.find_cell(f'"{keys[0]}"')
    lab.select(asking)
    lab.tab_to(".dsv3-predict button")
    lab.page.keyboard.press("Enter")
    lab.wait_text(asking, "Your prediction:")
    answer = next(i for i, text in enumerate(sources) if re.search(rf'reveal\(\s*"{keys[0]}"', text))
    lab.run_cell(answer)
    assert FOLDED not in lab.output_text(answer) and "s you predicted" in lab.output_text(answer)


def test_every_exercise_is_answered_wrongly_and_rightly(lesson: tuple[LabPage, str]) -> None:
    lab, stem = lesson
    exercises = of_lesson(named(stem).short)
    assert exercises, f"{stem} has no exercise"
    for one in exercises:
        name = one.solution.__name__
        call = f'\n\n{name} = check("{one.id}", {name})\n'
        cell = lab.find_cell(f'check("{one.id}"')
        assert lab.output_text(cell).startswith(f"Open · exercise {one.id}")
        lab.type_code(cell, f"def {name}(*anything):\n    return 12345" + call)
        lab.run_cell(cell)
        assert lab.output_text(cell).startswith(f"Not yet · exercise {one.id}")
        lab.type_code(cell, IMPORTS + one.solution_source() + call)
        lab.run_cell(cell)
        right = lab.output_text(cell)
        assert right.startswith(f"Right · exercise {one.id}") and "the reference" in right, right
    overview = (lab.server.root / "Overview.md").read_text()
    assert "■" * len(exercises) in overview, "the first page follows"
