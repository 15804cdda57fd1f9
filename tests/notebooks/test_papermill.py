"""Each lesson, run with other parameters than its own; names it does not have are refused."""

from __future__ import annotations

from pathlib import Path

import papermill
import pytest
from lessons import PARAMETERS, STEMS, bounds, notebook
from roads import UnknownParameter, with_parameters

from dsv3lib.course import inspection

pytestmark = pytest.mark.notebook

SEED = 7


@pytest.mark.parametrize("stem", STEMS)
def test_lesson_runs_fast_on_the_cpu_with_another_seed(stem: str, tmp_path: Path) -> None:
    out = tmp_path / "out.ipynb"
    given = {"FAST": True, "SEED": SEED, "DEVICE": "cpu", "STEPS": 2}
    book = with_parameters(notebook(stem), out, bounds(stem).seconds, **given)
    assert inspection.error_problems(book) + inspection.magic_problems(book) == []
    injected = [cell.source for cell in book.cells if "injected-parameters" in cell.metadata.get("tags", [])]
    assert len(injected) == 1 and f"SEED = {SEED}" in injected[0]


@pytest.mark.parametrize("stem", STEMS)
def test_lesson_has_the_parameters_and_no_others(stem: str, tmp_path: Path) -> None:
    assert PARAMETERS == set(papermill.inspect_notebook(str(notebook(stem))))
    with pytest.raises(UnknownParameter, match="STEP"):
        with_parameters(notebook(stem), tmp_path / "out.ipynb", STEP=2)
