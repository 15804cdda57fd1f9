"""Make the notebooks from their sources: ``python -m dsv3lib.course.notebooks`` (``make notebooks``).

For each ``notebooks/source/NN_name.py`` whose text or whose library has changed since it last ran here:
build the notebook, execute it in a fresh kernel, refuse it if anything in it failed, strip what belongs to
the one run (widget state, times, versions), and replace the file.

    python -m dsv3lib.course.notebooks             what has changed
    python -m dsv3lib.course.notebooks 01          that lesson, changed or not
    python -m dsv3lib.course.notebooks --all       everything
    python -m dsv3lib.course.notebooks --check     executes nothing; says what is out of step
    python -m dsv3lib.course.notebooks --to-source 01   writes the text from a notebook edited in JupyterLab
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nbformat import NotebookNode

from dsv3lib.course import claims, inspection, minutes, pairing, readme, record
from dsv3lib.course.syllabus import LESSONS
from dsv3lib.errors import CourseError, Dsv3Error
from dsv3lib.files import write_whole

CELL_TIMEOUT_SECONDS = 900
_STAMPS = Path("build") / "notebooks"


def execute(book: NotebookNode, folder: Path, timeout: int = CELL_TIMEOUT_SECONDS) -> None:
    """Run a notebook in a fresh kernel of this Python; outputs and widget state are put into ``book``.

    The kernel sees an empty progress file and one thread, so that what it prints does not depend on who
    runs it, and an own IPython folder, so that nobody's start-up files take part.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    class OwnPython(AsyncKernelManager):
        """Finds no kernel in any folder, so that the one of this interpreter is what is left."""

        def _kernel_spec_manager_default(self) -> KernelSpecManager:
            return KernelSpecManager(kernel_dirs=[], parent=self)

    with tempfile.TemporaryDirectory(prefix="dsv3-notebook-") as scratch:
        client = NotebookClient(
            book,
            kernel_name="python3",
            kernel_manager_class=OwnPython,
            timeout=timeout,
            resources={"metadata": {"path": str(folder)}},
            store_widget_state=True,
            record_timing=False,
        )
        client.execute(env=environment(Path(scratch)))


def environment(scratch: Path) -> dict[str, str]:
    """Return the environment that a notebook runs in when it is made or tested."""
    return {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        record.VARIABLE: str(scratch / "progress.json"),
        "IPYTHONDIR": str(scratch / "ipython"),
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }


def normalise(book: NotebookNode) -> None:
    """Strip what belongs to one run: widget state and views, times, versions, execution metadata."""
    book.metadata.clear()
    book.metadata.update({"kernelspec": dict(pairing.KERNELSPEC), "language_info": dict(pairing.LANGUAGE)})
    for cell in book.cells:
        for key in set(cell.metadata) - {"tags"}:
            del cell.metadata[key]
        if inspection.FOLDED in cell.metadata.get("tags", []):
            cell.metadata["jupyter"] = {"source_hidden": True}
        if cell.cell_type == "code":
            cell.outputs = [out for out in (_without_view(one) for one in _joined(cell.outputs)) if out]


def _joined(outputs: Sequence[NotebookNode]) -> list[NotebookNode]:
    """Join stream outputs of one name that follow each other: how they were cut is chance."""
    joined: list[NotebookNode] = []
    for out in outputs:
        if joined and out.output_type == "stream" == joined[-1].output_type and out.name == joined[-1].name:
            joined[-1].text += out.text
        else:
            joined.append(out)
    return joined


def _without_view(out: NotebookNode) -> NotebookNode | None:
    """Drop the view of a widget that will be gone; what it had beside it (HTML, a picture, text) stays."""
    data = out.get("data")
    if data is not None and data.pop(inspection.WIDGET_VIEW, None) is not None and not data:
        return None
    return out


def make(root: Path, stem: str) -> NotebookNode:
    """Build, execute, examine and write one notebook; return it.

    Raises:
        CourseError: something in it failed; the former file is untouched.
    """
    from nbclient.exceptions import CellExecutionError

    path = root / "notebooks" / f"{stem}.ipynb"
    book = pairing.read_source(pairing.source_of(path))
    former = pairing.read_notebook(path) if path.exists() else None
    pairing.carry_ids(book, former, stem)
    try:
        execute(book, path.parent)
    except CellExecutionError as error:
        raise CourseError(f"{stem}: a cell failed, the notebook is left as it was.\n{error}") from error
    failed = inspection.error_problems(book) + inspection.magic_problems(book)
    if failed:
        raise CourseError(f"{stem}: {'; '.join(failed)}. The notebook is left as it was.")
    normalise(book)
    pairing.write_notebook(book, path)
    os.utime(pairing.source_of(path))  # jupytext's server extension refuses a text older than its notebook
    return book


def check(root: Path, stem: str) -> list[str]:
    """Return what is wrong with a lesson on disk, without running it."""
    path = root / "notebooks" / f"{stem}.ipynb"
    try:
        source = pairing.read_source(pairing.source_of(path))
        book = pairing.read_notebook(path)
    except CourseError as error:
        return [str(error)]
    links = inspection.link_problems(book, path.parent)
    return (
        pairing.disagreements(source, book) + inspection.problems(book) + links + pattern_problems(book, stem)
    )


def pattern_problems(book: NotebookNode, stem: str) -> list[str]:
    """Return where a lesson leaves the pattern: its page, captions, claims and minutes."""
    found = inspection.page_problems(book) + inspection.caption_problems(book) + claims.claim_problems(book)
    known = any(one.stem == stem for one in LESSONS)
    return found + (minutes.minutes_problems(book, stem) if known else [])


def stems(root: Path) -> list[str]:
    """Return the lessons that have a source or a notebook, in order."""
    folder = root / "notebooks"
    found = {path.stem for path in (folder / "source").glob("[0-9][0-9]_*.py")}
    return sorted(found | {path.stem for path in folder.glob("[0-9][0-9]_*.ipynb")})


def fingerprint(root: Path, stem: str) -> str:
    """Return a digest of all that a lesson's outputs depend on: its two files, the library, the data."""
    digest = hashlib.sha256()
    path = root / "notebooks" / f"{stem}.ipynb"
    library = sorted((root / "dsv3lib").rglob("*.py")) + sorted((root / "dsv3lib").rglob("*.json"))
    for file in [pairing.source_of(path), path, *library, root / "constraints.txt"]:
        digest.update(file.name.encode() + b"\0")
        digest.update(file.read_bytes() if file.is_file() else b"-")
    return digest.hexdigest()


def _is_current(root: Path, stem: str) -> bool:
    stamp = root / _STAMPS / stem
    return stamp.is_file() and stamp.read_text(encoding="utf-8") == fingerprint(root, stem)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 1 if a lesson is out of step or failed."""
    options = _options(arguments)
    root = options.root.resolve()
    try:
        chosen = _choose(stems(root), options.lessons)
        if options.check:
            return _report({stem: check(root, stem) for stem in chosen})
        if options.to_source:
            for stem in chosen:
                path = root / "notebooks" / f"{stem}.ipynb"
                pairing.write_source(pairing.read_notebook(path), pairing.source_of(path))
                print(f"{stem}: source written from the notebook")
            return 0
        return _make_all(root, chosen, options.all or bool(options.lessons))
    except Dsv3Error as error:
        print(f"notebooks: {error}", file=sys.stderr)
        return 1


def _make_all(root: Path, chosen: Sequence[str], whatever: bool) -> int:
    failed = 0
    for stem in chosen:
        if not whatever and _is_current(root, stem):
            print(f"{stem}: up to date", flush=True)
            continue
        started = time.monotonic()
        try:
            make(root, stem)
        except CourseError as error:
            print(error, file=sys.stderr)
            failed += 1
            continue
        write_whole(root / _STAMPS / stem, fingerprint(root, stem))
        print(f"{stem}: executed in {time.monotonic() - started:.0f} s", flush=True)
        failed += _report({stem: check(root, stem)})
    readme.update(root)
    return int(failed > 0)


def _report(findings: dict[str, list[str]]) -> int:
    for stem, lines in findings.items():
        print(f"{stem}: {'in order' if not lines else f'{len(lines)} to mend'}")
        for line in lines:
            print(f"  {line}")
    return int(any(findings.values()))


def _choose(known: list[str], wanted: Sequence[str]) -> list[str]:
    if not known:
        raise CourseError("no notebook sources were found; run this in the project's folder, or give --root")
    for name in wanted:
        if not any(stem.startswith(name) for stem in known):
            raise CourseError(f"there is no lesson {name!r}; there are {', '.join(known)}")
    return [stem for stem in known if not wanted or any(stem.startswith(name) for name in wanted)]


def _options(arguments: Sequence[str] | None) -> Any:
    about = "Make the notebooks from their sources."
    parser = argparse.ArgumentParser(prog="python -m dsv3lib.course.notebooks", description=about)
    parser.add_argument("lessons", nargs="*", help="beginnings of names, as in 01; by default all")
    parser.add_argument("--all", action="store_true", help="execute even what has not changed")
    parser.add_argument("--check", action="store_true", help="execute nothing; say what is out of step")
    parser.add_argument("--to-source", action="store_true", help="write the text from the notebook")
    home = Path(__file__).resolve().parents[2]
    parser.add_argument("--root", type=Path, default=home, help="the project's folder")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
