"""Documentation inside installed packages: the docstrings of NumPy, PyTorch, Matplotlib and NetworkX.

A document is what one source file says in its triple-quoted strings. They are found by their quotes and not by
parsing: it is fast, and it also finds texts that are attached to functions written in C.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path

# All of them come with the course; `torch` brings `networkx` along.
PACKAGES = ("numpy", "torch", "matplotlib", "networkx")
MIN_CHARS = 120
"""A shorter docstring says little more than the function's name."""
_TEXT = re.compile(r'(?<!["\w])[rRuU]?"""(.*?)"""', re.DOTALL)
# Tests, other projects' copies, and PyTorch's compilers, which are the size of all the rest together.
_SKIPPED = {"tests", "test", "testing", "_vendor", "__pycache__", "include", "bin", "ao", "fx", "onnx"}


def package_root(name: str) -> Path | None:
    """Folder of an installed package, found without importing it; None where it is missing."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def documented_files(name: str) -> dict[str, Path]:
    """Python sources of a package that may hold documentation: "numpy/linalg/_linalg.py" -> path, sorted."""
    root = package_root(name)
    if root is None:
        return {}
    files = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        folders = relative.parts[:-1]
        if not _SKIPPED.intersection(folders) and not (name == "torch" and _is_private(folders)):
            files[f"{name}/{relative.as_posix()}"] = path
    return files


def _is_private(folders: tuple[str, ...]) -> bool:
    return any(folder.startswith("_") for folder in folders)


def docstrings(source: str) -> list[str]:
    """The documentation in one source file: its triple-quoted strings of ``MIN_CHARS`` or more, dedented."""
    texts = (inspect.cleandoc(match.group(1)) for match in _TEXT.finditer(source))
    return [text for text in texts if len(text) >= MIN_CHARS and " " in text]
