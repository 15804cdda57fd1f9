"""Each lesson in JupyterLab: every cell runs, its sliders move its figures, an exercise is answered both ways."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lab_page import LabPage
from lab_server import LabServer

from dsv3lib.course.exercises import of_lesson
from dsv3lib.course.notebooks import stems
from dsv3lib.course.syllabus import lesson as named

STEMS = stems(Path(__file__).resolve().parents[2])
RUN_SECONDS = 400
IMPORTS = "from __future__ import annotations\nimport math, torch\nfrom torch import Tensor\n"


@pytest.fixture(scope="module", params=STEMS)
def lesson(
    request: pytest.FixtureRequest, light: LabServer, open_page: Callable[[LabServer], LabPage]
) -> Iterator[tuple[LabPage, str]]:
    """A lesson on less data, run once by a learner who has done nothing yet."""
    stem = request.param
    light.progress.unlink(missing_ok=True)
    lab = open_page(light)
    lab.open_notebook(f"{stem}.ipynb")
    cell = next(i for i, text in enumerate(lab.sources()) if re.search(r"(?m)^FAST\b", text))
    lab.type_code(cell, re.sub(r"(?m)^FAST\b.*$", "FAST = True", lab.sources()[cell]))
    lab.run_all(RUN_SECONDS)
    yield lab, stem
    lab.close()


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
    assert moved == len([text for text in lab.sources() if re.search(r"(?m)^\s*live\(", text)])


def test_every_exercise_is_answered_wrongly_and_rightly(lesson: tuple[LabPage, str]) -> None:
    lab, stem = lesson
    exercises = of_lesson(named(stem).short)
    assert exercises, f"{stem} has no exercise"
    for one in exercises:
        name = one.solution.__name__
        call = f'\n\ncheck("{one.id}", {name})\n'
        cell = lab.find_cell(f'check("{one.id}"')
        assert lab.output_text(cell).startswith(f"Open · exercise {one.id}")
        lab.type_code(cell, f"def {name}(*anything):\n    return 12345" + call)
        lab.run_cell(cell)
        assert lab.output_text(cell).startswith(f"Not yet · exercise {one.id}")
        lab.type_code(cell, IMPORTS + one.solution_source() + call)
        lab.run_cell(cell)
        assert lab.output_text(cell).startswith(f"Right · exercise {one.id}"), lab.output_text(cell)
