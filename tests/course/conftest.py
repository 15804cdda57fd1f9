"""Every test of the course has a progress file of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv3lib.course import record


@pytest.fixture(autouse=True)
def progress_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "learner" / "progress.json"
    monkeypatch.setenv(record.VARIABLE, str(path))
    return path
