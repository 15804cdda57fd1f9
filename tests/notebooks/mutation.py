"""Runs a lesson's claims twice: as they are, and with the mechanism that they speak of switched off.

    python tests/notebooks/mutation.py LESSON.ipynb CLAIMS.py OUT.json

in a process of its own, where nothing checks types at every call: a lesson runs there as it does in a kernel.
"""

from __future__ import annotations

import importlib.util
import json
import linecache
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from nbformat import NotebookNode

from dsv3lib.course import claims, pairing

FAST = {"FAST": True, "STEPS": 2, "DEVICE": "cpu"}


@dataclass(frozen=True)
class Off:
    """How a claim's mechanism is switched off.

    Attributes:
        what: the world in which the claim is false, in words.
        code: run before the claim's cell, with the notebook's names, ``patch(object, name, value)`` (undone
            afterwards) and ``rerun(tag)`` (the earlier cells of that tag run again).
        given: run before both, standing in for what the lesson does not train when it is run with FAST; the
            claim's cell is then run as without FAST.
    """

    what: str
    code: str
    given: str = ""


@dataclass
class Lesson:
    """A lesson's code under way: its names, and the cells that have run."""

    book: NotebookNode
    path: Path
    names: dict[str, Any] = field(default_factory=dict)
    ran: list[int] = field(default_factory=list)

    def run(self, i: int) -> None:
        """Run one code cell; its source is put where ``inspect.getsource`` finds it."""
        cell = self.book.cells[i]
        name = f"<{self.path.stem} cell {i}>"
        linecache.cache[name] = (len(cell.source), None, cell.source.splitlines(keepends=True), name)
        exec(compile(cell.source, name, "exec"), self.names)
        if "parameters" in cell.metadata.get("tags", []):
            self.names.update(FAST)

    def tagged(self, tag: str) -> list[int]:
        """The cells of a tag that have run already."""
        return [i for i in self.ran if tag in self.book.cells[i].metadata.get("tags", [])]


def examined(book: NotebookNode, path: Path, off: dict[str, Off]) -> Iterator[tuple[str, str]]:
    """Run a lesson once on less data; yield (claim, "" or what is wrong with it) at each claim's cells.

    Args:
        book: the lesson. path: its file, for messages. off: claim → how it is switched off.
    """
    lesson = Lesson(book, path)
    for i, cell in enumerate(book.cells):
        if cell.cell_type != "code":
            continue
        before, state = dict(lesson.names), _random_state(lesson.names)
        lesson.run(i)
        after, later = dict(lesson.names), _random_state(lesson.names)
        for tag in cell.metadata.get("tags", []):
            name = tag.removeprefix(claims.TAG)
            if tag.startswith(claims.TAG) and name in off:
                yield name, _try(lesson, i, off[name], before, state)
                _put(lesson.names, after, later)
        lesson.ran.append(i)


def _try(lesson: Lesson, i: int, off: Off, before: dict[str, Any], state: Any) -> str:
    """Say what is wrong with a claim's cell: it fails as things are, or passes with the mechanism switched off."""
    if off.given:
        with _world(lesson, before, state, off, off.given):
            try:
                lesson.run(i)
            except AssertionError as error:
                return f"its cell fails on what is given: {error!r}"
    with _world(lesson, before, state, off, off.given + "\n" + off.code):
        try:
            lesson.run(i)
        except AssertionError:
            return ""
    return f"its cell passes {off.what}"


@contextmanager
def _world(lesson: Lesson, before: dict[str, Any], state: Any, off: Off, code: str) -> Iterator[None]:
    """The names as they were before the cell, with some code run on them; patches are undone at the end."""
    undo: list[Callable[[], None]] = []

    def patch(owner: Any, name: str, value: Any) -> None:
        former = owner.__dict__[name] if name in vars(owner) else getattr(owner, name)
        setattr(owner, name, value)
        undo.append(lambda: setattr(owner, name, former))

    def rerun(tag: str) -> None:
        for i in lesson.tagged(tag):
            lesson.run(i)

    _put(lesson.names, before, state)
    if off.given:
        lesson.names["FAST"] = False
    lesson.names.update(patch=patch, rerun=rerun)
    try:
        exec(code, lesson.names)
        yield
    finally:
        for one in reversed(undo):
            one()


def _put(names: dict[str, Any], content: dict[str, Any], state: Any) -> None:
    """Set names back in place: functions of earlier cells look them up in this very dictionary."""
    names.clear()
    names.update(content)
    random.setstate(state[0])
    numpy.random.set_state(state[1])
    torch.set_rng_state(state[2])
    if state[3] is not None:
        names["session"].generator.set_state(state[3])


def _random_state(names: dict[str, Any]) -> tuple[Any, ...]:
    session = names.get("session")
    own = session.generator.get_state() if session is not None else None
    return random.getstate(), numpy.random.get_state(), torch.get_rng_state(), own


def off_of(path: Path) -> dict[str, Off]:
    """Read a lesson's file of claims."""
    spec = importlib.util.spec_from_file_location("claims_of_a_lesson", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CLAIMS


def main(lesson: Path, off: Path, out: Path) -> None:
    """Run one lesson; write claim → what is wrong with it."""
    book, known = pairing.read_notebook(lesson), off_of(off)
    os.chdir(lesson.parent)
    out.write_text(json.dumps(dict(examined(book, lesson, known))), encoding="utf-8")


if __name__ == "__main__":
    sys.modules["mutation"] = sys.modules["__main__"]  # the claims' file imports Off from here
    main(*(Path(word).resolve() for word in sys.argv[1:4]))
