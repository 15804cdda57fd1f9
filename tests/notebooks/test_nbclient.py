"""Each lesson, run as *Run All* would; then its widgets are looked into."""

from __future__ import annotations

import pytest
from lessons import STEMS, bounds, notebook
from roads import examined

pytestmark = pytest.mark.notebook


@pytest.mark.parametrize("stem", STEMS)
def test_lesson_runs_and_no_widget_holds_an_error(stem: str) -> None:
    assert examined(notebook(stem), bounds(stem).seconds) == []
