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
from dsv3lib.course.syllabus import LESSONS
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
    assert "exercises solved" in text and page.locator(".jp-MarkdownViewer tbody tr").count() == len(LESSONS)
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


def test_answers_stay_folded_until_a_prediction_is_made(lesson: tuple[LabPage, str]) -> None:
    lab, _ = lesson
    keys, sources = questions(lab), lab.sources()
    assert keys
    for key in keys:
        shown = lab.output_text(answer_of(key, sources))
        assert shown.startswith(FOLDED) and "What happened: predict first" in shown
        assert len(shown.splitlines()) == 1, f"{key} gives its answer away: {shown!r}"
    asking = lab.find_cell(f'"{keys[0]}"')
    lab.select(asking)
    lab.tab_to(".dsv3-predict button")
    lab.page.keyboard.press("Enter")
    lab.wait_text(asking, "Your prediction:")
    assert "s you predicted" in verdict(lab, answer_of(keys[0], sources))


def test_every_prediction_is_made_wrongly_and_rightly(lesson: tuple[LabPage, str]) -> None:
    lab, _ = lesson
    sources = lab.sources()
    for key in questions(lab):
        asking, answer = lab.find_cell(f'"{key}"'), answer_of(key, sources)
        box = lab.cell(asking).locator(".dsv3-predict")
        buttons = box.locator("button")
        if box.locator("input").count():
            buttons.click()
            wrong = verdict(lab, answer)
            assert "Not as you predicted" in wrong, wrong
            box.locator("input").fill(re.search(r"What happened: ([\d.,]*\d)", wrong).group(1).replace(",", ""))
            box.locator("input").press("Tab")
            buttons.click()
            assert "As you predicted" in verdict(lab, answer), key
            continue
        told = []
        for option in range(buttons.count()):
            buttons.nth(option).click()
            lab.wait_text(asking, f"Your prediction: {buttons.nth(option).inner_text().strip()}")
            told.append("As you predicted" in verdict(lab, answer))
        assert told.count(True) == 1 and len(told) > 1, f"{key}: {told}"


def questions(lab: LabPage) -> list[str]:
    """The keys of a lesson's predictions."""
    return [match for text in lab.sources() for match in re.findall(r'predict\(\s*"([\w.]+)"', text)]


def answer_of(key: str, sources: list[str]) -> int:
    """The cell that tells what happened."""
    return next(i for i, text in enumerate(sources) if re.search(rf'reveal\(\s*"{key}"', text))


def verdict(lab: LabPage, answer: int) -> str:
    """What the cell says once a prediction stands: nothing is folded any more."""
    lab.run_cell(answer)
    shown = lab.output_text(answer)
    assert FOLDED not in shown and "s you predicted" in shown, shown
    return shown


def test_every_slider_moves_its_figure(lesson: tuple[LabPage, str]) -> None:
    lab, _ = lesson
    views = [i for i, text in enumerate(lab.sources()) if re.search(r"(?m)^\s*live\(", text)]
    for cell in views:
        if lab.sources()[cell].startswith("# answers "):  # folded, slider and all, until its question was predicted
            lab.run_cell(cell)
    moved = lab.cells_with(".dsv3-live .noUi-handle")
    for cell in moved:
        before = lab.picture(cell)
        lab.move_slider(cell, key="ArrowRight")
        if not lab.picture_changed(cell, before):  # it may have stood at its end
            lab.move_slider(cell, key="ArrowLeft")
            lab.wait_picture_changes(cell, before)
    assert moved == views


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
