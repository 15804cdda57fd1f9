"""The learner's own copy of the course: lessons without outputs, outside git, with their progress beside them.

One installed environment serves many learners; each has a folder::

    Overview.md            the first page: progress, minutes, what comes next
    00_start_here.ipynb …  the lessons, to write in
    library/               the files that the lessons link to, to read
    .dsv3/                 progress.json; the lessons as they were copied; what was set aside; JupyterLab's layout

Nothing that a learner has written is ever overwritten: a newer lesson is merged in (``dsv3lib.course.merge``), a
lesson that is reset is set aside first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from dsv3lib.course import merge, overview, pairing, record
from dsv3lib.course.syllabus import lesson
from dsv3lib.errors import CourseError, SaveError
from dsv3lib.files import write_whole

VARIABLE = "DSV3_COURSE"
"""Environment variable that names a learner's folder."""

FOLDER = "dsv3-course"
HIDDEN = record.HIDDEN
LIBRARY = "library"
_LINK = re.compile(r"\]\(\.\./([^)#\s]+)")
_LEARNER = re.compile(r"[\w.-]{1,40}")


def folder_of(
    folder: Path | None = None, learner: str = "", environment: Mapping[str, str] | None = None
) -> Path:
    """Return a learner's folder: the one that is named, else the environment's, else one in the home.

    Args:
        folder: named on the command line.
        learner: a name, where several learners share one account: each gets a folder of that name.
        environment: the process's own by default.

    Raises:
        CourseError: both are named, or the name cannot be a folder's.
    """
    env = os.environ if environment is None else environment
    if folder is not None and learner:
        raise CourseError("give --folder or --learner, not both: a learner's name stands for a folder")
    if folder is not None:
        return folder.expanduser().resolve()
    if learner and not _LEARNER.fullmatch(learner):
        raise CourseError(
            f"learner {learner!r}: expected up to 40 letters, digits, dots and dashes, as in 'anna'"
        )
    if env.get(VARIABLE) and not learner:
        return Path(env[VARIABLE]).expanduser().resolve()
    return Path.home() / (f"{FOLDER}-{learner}" if learner else FOLDER)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that say whose copy is meant."""
    parser.add_argument(
        "--folder", type=Path, help=f"your copy of the course (default: {VARIABLE}, else ~/{FOLDER})"
    )
    parser.add_argument(
        "--learner", default="", metavar="NAME", help=f"where several share one account: ~/{FOLDER}-NAME"
    )


@dataclass(frozen=True)
class Workspace:
    """A learner's folder."""

    folder: Path

    @property
    def hidden(self) -> Path:
        """What is not for reading: progress, the lessons as they were copied, what was set aside."""
        return self.folder / HIDDEN

    @property
    def progress(self) -> Path:
        """The learner's progress file."""
        return self.hidden / record.FILE

    def prepare(self, course: Path) -> list[str]:
        """Make the folder, or bring it up to date; return what happened, a sentence each.

        Args:
            course: the folder that holds the course's ``notebooks/``.

        Raises:
            CourseError: the folder cannot be written, or the progress file cannot be read.
        """
        originals = sorted((course / "notebooks").glob("[0-9][0-9]_*.ipynb"))
        try:
            self.hidden.mkdir(parents=True, exist_ok=True)
            record.Record(self.progress).read_strictly()
            said = [line for path in originals if (line := self._bring(path))]
            self._copy_library(originals, course)
            overview.write(self.folder)
        except (OSError, SaveError) as error:
            raise CourseError(
                f"the folder {self.folder} cannot be written ({getattr(error, 'strerror', None) or error}); "
                f"name another with --folder, or set {VARIABLE}"
            ) from error
        return said

    def reset(self, name: str, course: Path) -> str:
        """Set a learner's copy of one lesson aside and begin it anew; return where the old one lies.

        Args:
            name: the lesson's number, short name or file. course: where the originals lie.

        Raises:
            CourseError: there is no such lesson, or it is not written yet.
        """
        stem = lesson(name.removesuffix(".ipynb")).stem
        original = course / "notebooks" / f"{stem}.ipynb"
        if not original.is_file():
            raise CourseError(f"lesson {stem} is in preparation: there is nothing to reset")
        own = self.folder / original.name
        aside = self._set_aside(own) if own.exists() else None
        (self.hidden / "base" / original.name).unlink(missing_ok=True)
        taken = record.Record(self.progress).forget(lesson(stem).short)
        if any(taken.values()):
            beside = aside or self._free_place(own)
            write_whole(beside.with_suffix(".progress.json"), json.dumps(taken, indent=1, ensure_ascii=False))
        self._bring(original)
        overview.write(self.folder)
        return f"{stem} begins anew" + (f"; your copy lies in {aside}" if aside else "")

    def _bring(self, original: Path) -> str:
        """Copy one lesson, or merge it into the learner's copy; return what happened, or ""."""
        new = working_copy(pairing.read_notebook(original))
        own, base = self.folder / original.name, self.hidden / "base" / original.name
        if not own.exists():
            self._write(own, base, new, trusted=True)
            return f"{original.stem}: your copy is ready"
        if not base.exists():
            return f"{original.stem}: left as it is, it is no copy that this command made"
        before = pairing.read_notebook(base)
        if before == new:
            return ""
        try:
            mine = pairing.read_notebook(own)
        except CourseError as error:
            return f"{error}; it is left as it is: `dsv3 lab --reset {original.stem[:2]}` begins it anew"
        trusted = _is_trusted(mine)
        self._set_aside(own, copied=True)
        self._write(own, base, merge.merged(before, mine, new), trusted, new)
        return f"{original.stem}: brought to the newer lesson, with all that you wrote"

    def _write(
        self, own: Path, base: Path, book: NotebookNode, trusted: bool, new: NotebookNode | None = None
    ) -> None:
        if not own.exists():  # stopped in between, the copy is made again; a merge, on the contrary, is kept first
            pairing.write_notebook(new or book, base)
        pairing.write_notebook(book, own)
        pairing.write_notebook(new or book, base)
        if trusted:
            _trust(book)

    def _set_aside(self, path: Path, copied: bool = False) -> Path:
        """Move or copy a file to where nothing is ever written again; return its new place."""
        aside = self._free_place(path)
        if copied:
            shutil.copy2(path, aside)
        else:
            os.replace(path, aside)
        return aside

    def _free_place(self, path: Path) -> Path:
        folder = self.hidden / "set-aside"
        folder.mkdir(parents=True, exist_ok=True)
        stamp = time.strftime("%Y%m%d-%H%M%S")
        names = (folder / f"{path.stem}.{stamp}-{number}{path.suffix}" for number in itertools.count())
        return next(place for place in names if not place.exists())

    def _copy_library(self, originals: list[Path], course: Path) -> None:
        """Copy the files that lessons link to; they are for reading, and always those of this version."""
        for linked in sorted(
            {name for path in originals for name in linked_files(pairing.read_notebook(path))}
        ):
            homes = (course / linked, Path(__file__).resolve().parents[2] / linked)
            source, target = (
                next((one for one in homes if one.is_file()), None),
                self.folder / LIBRARY / linked,
            )
            if source is not None:
                text = source.read_text(encoding="utf-8")
                if not target.is_file() or target.read_text(encoding="utf-8") != text:
                    write_whole(target, text)
                    target.chmod(0o444)


def working_copy(book: NotebookNode) -> NotebookNode:
    """Return a lesson as a learner gets it: no outputs, and links that lead into their own folder."""
    book = nbformat.from_dict(book)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        else:
            cell.source = _LINK.sub(rf"]({LIBRARY}/\1", cell.source)
    return book


def linked_files(book: NotebookNode) -> set[str]:
    """Return the files of the project that a lesson links to, as in ``{"dsv3lib/layers/rope.py"}``."""
    return {
        name for cell in book.cells if cell.cell_type == "markdown" for name in _LINK.findall(cell.source)
    }


def _trust(book: NotebookNode) -> None:
    """Sign a notebook as Jupyter does, so that its outputs are shown. Without a database there is no harm."""
    from nbformat.sign import NotebookNotary

    try:
        NotebookNotary().sign(book)
    except Exception:  # whatever its database says: an unsigned lesson only asks for one click more
        return


def _is_trusted(book: NotebookNode) -> bool:
    from nbformat.sign import NotebookNotary

    try:
        notary = NotebookNotary()
        return notary.check_signature(book) or not any(cell.get("outputs") for cell in book.cells)
    except Exception:
        return False
