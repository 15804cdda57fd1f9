"""The three roads by which a notebook is run in the tests. Each sees what the others do not.

nbval      compares every output with the committed one; blind to pictures, and to cells without a count
papermill  sets parameters, and refuses names that the notebook does not have
nbclient   plain execution on less data, after which the widgets themselves are examined
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import papermill
from lessons import ROOT
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from dsv3lib.course import inspection, notebooks, pairing
from dsv3lib.course.notebooks import environment

SANITIZE = Path(__file__).with_name("sanitize.cfg")


class UnknownParameter(AssertionError):
    """A notebook was given a parameter that it does not have; papermill alone would only warn."""


def nbval(path: Path, scratch: Path, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    """Run nbval on one notebook as ``tools/run_tests.py`` does; the exit status is 0 if all agreed."""
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"),
        *("--nbval", "--nbval-current-env", f"--nbval-cell-timeout={timeout}"),
        *("--nbval-sanitize-with", str(SANITIZE), f"--rootdir={ROOT}", str(path)),
    ]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment(scratch),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def with_parameters(path: Path, out: Path, seconds: int = 300, **parameters: object) -> NotebookNode:
    """Run a notebook through papermill; return what came out.

    Raises:
        UnknownParameter: the notebook's parameters cell does not set one of the names.
        papermill.PapermillExecutionError: a cell raised.
    """
    known = papermill.inspect_notebook(str(path))
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise UnknownParameter(
            f"{path.name} has no parameter {', '.join(unknown)}; it has {', '.join(known)}"
        )
    former = dict(os.environ)
    os.environ.update(environment(out.parent))
    try:
        return papermill.execute_notebook(
            str(path),
            str(out),
            parameters=parameters,
            cwd=str(path.parent),
            kernel_name="python3",
            progress_bar=False,
            execution_timeout=seconds,
        )
    finally:
        os.environ.clear()
        os.environ.update(former)


def examined(path: Path, seconds: int = 300) -> list[str]:
    """Run a notebook through nbclient on less data; return what is wrong with the cells and widgets that came out."""
    book = pairing.read_notebook(path)
    for cell in book.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = re.sub(r"(?m)^FAST\b.*$", "FAST = True", cell.source)
    try:
        notebooks.execute(book, path.parent, timeout=seconds)
    except CellExecutionError as error:
        return [f"a cell failed: {error}"]
    return (
        inspection.execution_problems(book)
        + inspection.error_problems(book)
        + inspection.magic_problems(book)
    )
