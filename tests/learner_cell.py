"""A learner's code in a file, as a notebook's cell is to Python: ``inspect`` finds its source."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType


def lesson_module(tmp_path: Path, text: str) -> ModuleType:
    """A learner's code in a file, as a notebook's cell is to Python."""
    path = tmp_path / "cell.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("cell", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
