"""The course's widgets in JupyterLab, as a learner meets them: slider, predictions, check, hints; no mouse."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator

import pytest
from lab_page import LabPage
from lab_server import LabServer
from sample_notebook import BROKEN, RIGHT, WRONG

OpenPage = Callable[[LabServer], LabPage]
LEAST_CONTRAST = 4.5  # WCAG AA for text


@pytest.fixture(scope="module")
def lesson(light: LabServer, open_page: OpenPage) -> Iterator[LabPage]:
    """The small lesson, run once by a learner who has done nothing yet; the tests go through it in order."""
    light.progress.unlink(missing_ok=True)
    lab = open_page(light)
    lab.open_notebook("00_small.ipynb")
    lab.run_all()
    yield lab
    lab.close()


def test_run_all_passes_through_and_shows_what_is_open(lesson: LabPage) -> None:
    assert lesson.errors() == []
    assert lesson.output_text(lesson.find_cell("check(")).startswith("Open · exercise start.1")
    assert lesson.output_text(lesson.find_cell('reveal("mla.p1"')).startswith("What happened: predict first")
    assert "exercises solved" in lesson.output_text(lesson.find_cell("progress()"))


def test_slider_moves_the_figure_and_its_words_with_the_arrow_keys(lesson: LabPage) -> None:
    cell = lesson.find_cell("live(draw")
    before = lesson.picture(cell)
    assert before.startswith("data:image/png")
    lesson.move_slider(cell)
    after = lesson.wait_picture_changes(cell, before)
    assert "MHA has 4 heads" in lesson.output_text(cell)
    assert lesson.picture_alt(cell) == "Two straight lines from zero; MHA has 4 heads."
    lesson.move_slider(cell, key="ArrowLeft")
    assert lesson.wait_picture_changes(cell, after) == before


def test_hints_one_at_a_time_and_the_reference_by_keyboard(lesson: LabPage) -> None:
    cell = lesson.find_cell("check(")
    lesson.press_button(cell, "Hint")
    lesson.wait_text(cell, "Hint 1 of 2")
    assert "Hint 2 of 2" not in lesson.output_text(cell)
    lesson.press_button(cell, "Hint")
    lesson.wait_text(cell, "Hint 2 of 2")
    lesson.press_button(cell, "Skip: show the reference")
    lesson.wait_text(cell, "return gate + up + down")


def test_a_folded_solution_unfolds_by_keyboard(lesson: LabPage) -> None:
    cell = lesson.find_cell("solution(")
    lesson.select(cell)
    lesson.tab_to("summary")
    assert "return gate" not in lesson.output_text(cell)
    lesson.page.keyboard.press("Enter")
    lesson.wait_text(cell, "return gate")


def test_an_exercise_answered_wrongly_broken_and_rightly(lesson: LabPage) -> None:
    cell = lesson.find_cell("check(")
    lesson.type_code(cell, WRONG)
    lesson.run_cell(cell)
    wrong = lesson.output_text(cell)
    assert wrong.startswith("Not yet · exercise start.1") and "SwiGLU has a third, the gate" in wrong
    lesson.type_code(cell, BROKEN)
    lesson.run_cell(cell)
    broken = lesson.output_text(cell)
    assert "Your function raised ZeroDivisionError" in broken and "line 2: return hidden_size / 0" in broken
    lesson.type_code(cell, RIGHT)
    lesson.run_cell(cell)
    assert lesson.output_text(cell).startswith("Right · exercise start.1")
    assert lesson.errors() == []
    kept = json.loads(lesson.server.progress.read_text())
    assert kept["exercises"]["start.1"]["state"] == "right"


def test_a_prediction_is_made_kept_and_compared_without_a_mouse(lesson: LabPage) -> None:
    cell = lesson.find_cell('predict("mla.p1"')
    lesson.select(cell)
    lesson.tab_to(".dsv3-predict button")
    for key in ("Enter", "Tab", "Enter"):  # the first option, then the second instead
        lesson.page.keyboard.press(key)
    lesson.wait_text(cell, "Your prediction: they stay")
    revealing = lesson.find_cell('reveal("mla.p1"')
    lesson.run_cell(revealing)
    assert lesson.output_text(revealing).startswith("As you predicted")
    kept = json.loads(lesson.server.progress.read_text())["predictions"]["mla.p1"]
    assert kept["answer"] == "they stay"


def test_a_number_is_predicted_without_a_mouse(lesson: LabPage) -> None:
    cell = lesson.find_cell('predict("mla.p2"')
    lesson.select(cell)
    lesson.tab_to("input[type=number]")
    lesson.page.keyboard.press("Control+a")
    lesson.page.keyboard.type("686")
    for key in ("Tab", "Enter"):
        lesson.page.keyboard.press(key)
    lesson.wait_text(cell, "Your prediction: 686 KiB")
    revealing = lesson.find_cell('reveal("mla.p2"')
    lesson.run_cell(revealing)
    assert "Yours was 10 times too high" in lesson.output_text(revealing)


@pytest.mark.parametrize("server_name", ["light", "dark"])
def test_every_word_is_legible(server_name: str, open_page: OpenPage, request: pytest.FixtureRequest) -> None:
    lab = open_page(request.getfixturevalue(server_name))
    lab.open_notebook("00_small.ipynb")
    lab.run_all()
    cell = lab.find_cell("check(")
    lab.press_button(cell, "Hint")
    lab.wait_text(cell, "Hint 1 of 2")
    pale = [
        found
        for found in lab.text_colours(".dsv3-card, .dsv3-measured")
        if contrast(*found[:2]) < LEAST_CONTRAST
    ]
    assert pale == []
    language = lab.page.evaluate("document.documentElement.lang")
    assert server_name == "light" or language.startswith("de"), "the dark server speaks German"
    lab.close()


def contrast(text: str, background: str) -> float:
    def light(colour: str) -> float:
        parts = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
        red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    brighter, darker = sorted((light(text), light(background)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


def test_the_measure_of_contrast_rejects_grey_on_grey() -> None:
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21)
    assert contrast("rgb(120, 120, 120)", "rgb(150, 150, 150)") < LEAST_CONTRAST
