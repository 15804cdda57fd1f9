"""``dsv3 progress``: how far a learner is, a file to hand in, and a table of the files that were handed in."""

from __future__ import annotations

import argparse
import getpass
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv3lib.course import overview, record, workspace
from dsv3lib.course.lab import find_course
from dsv3lib.course.syllabus import lesson
from dsv3lib.errors import CourseError
from dsv3lib.files import write_whole

KIND = "dsv3lib progress"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``dsv3 progress``."""
    workspace.add_arguments(parser)
    parser.add_argument("--export", type=Path, metavar="FILE", help="write a file for a teacher to collect")
    parser.add_argument(
        "--name", default="", help="who you are, in that file (default: --learner, or your login)"
    )
    parser.add_argument(
        "--collect", type=Path, nargs="+", metavar="FILE", help="show the files of many learners"
    )


def run(arguments: argparse.Namespace) -> int:
    """Shows, exports or collects progress; returns 0."""
    if arguments.collect:
        for line in collected([read_export(path) for path in arguments.collect]):
            print(line)
        return 0
    own = workspace.Workspace(workspace.folder_of(arguments.folder, arguments.learner))
    kept = record.Record(own.progress).read_strictly()
    now = overview.standings(find_course(Path.cwd()) / "notebooks", kept)
    if arguments.export:
        name = arguments.name or arguments.learner or getpass.getuser()
        write_whole(
            arguments.export, json.dumps(export(name, now, kept), indent=1, ensure_ascii=False) + "\n"
        )
        print(f"written: {arguments.export}")
        return 0
    for one in now:
        solved = f"{one.solved} of {len(one.exercises)} solved" if one.written else ""
        print(
            f"{one.lesson.stem:26} {one.lesson.minutes:3} min  {solved:12} {one.marks:8} {one.state}".rstrip()
        )
    print(f"kept in {own.progress}")
    return 0


def export(name: str, now: Sequence[overview.Standing], kept: overview.Kept) -> dict[str, Any]:
    """Return what a teacher may want to know of a learner: each exercise, with tries and hints, each prediction.

    Args:
        name: the learner's. now: their standing in each lesson. kept: their progress file.
    """
    fields = ("state", "tries", "hints", "solution_shown")
    exercises = {
        key: {field: kept["exercises"].get(key, {}).get(field) for field in fields}
        for one in now
        for key in one.exercises
    }
    return {
        "kind": KIND,
        "format": 1,
        "learner": name,
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "solved": sum(one.solved for one in now),
        "asked": len(exercises),
        "lessons": {
            one.lesson.stem: {"state": one.state, "solved": one.solved, "asked": len(one.exercises)}
            for one in now
            if one.written
        },
        "exercises": exercises,
        "predictions": {key: dict(entry) for key, entry in kept["predictions"].items()},
    }


def read_export(path: Path) -> dict[str, Any]:
    """Return what a learner handed in.

    Raises:
        CourseError: the file is missing, is no JSON, or was not written by ``dsv3 progress --export``.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CourseError(f"{path} cannot be read as a learner's progress: {error}") from error
    if (
        not isinstance(content, dict)
        or content.get("kind") != KIND
        or not isinstance(content.get("lessons"), dict)
    ):
        raise CourseError(
            f"{path} is no file of `dsv3 progress --export`: it has no kind {KIND!r} and lessons"
        )
    return content


def collected(handed_in: Sequence[dict[str, Any]]) -> list[str]:
    """Return a table: a line a learner, a column a lesson, solved of asked."""
    stems = sorted({stem for one in handed_in for stem in one["lessons"]})
    numbers = [lesson(stem).number for stem in stems]
    width = max([7, *(len(str(one["learner"])) for one in handed_in)])
    lines = [f"{'learner':{width}}  {'  '.join(f'{number:>5}' for number in numbers)}  together"]
    for one in sorted(handed_in, key=lambda each: str(each["learner"])):
        cells = [one["lessons"].get(stem) for stem in stems]
        solved = "  ".join(f"{c['solved']}/{c['asked']}".rjust(5) if c else "     " for c in cells)
        lines.append(f"{one['learner']!s:{width}}  {solved}  {one['solved']} of {one['asked']}")
    return lines
