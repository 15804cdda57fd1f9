"""What a learner has done, kept in one small JSON file that is never half-written.

The file lies where the platform keeps a user's state, or where ``DSV3_PROGRESS`` says. Two notebooks may
be open at once, so each change reads the file, changes one entry and replaces the file. One that cannot
be read is set aside under another name, never overwritten.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3lib.errors import CourseError
from dsv3lib.files import write_whole

HIDDEN, FILE = ".dsv3", "progress.json"
"""Where the progress lies in a learner's folder."""

VARIABLE = "DSV3_PROGRESS"
"""Environment variable that names the progress file."""

_FORMAT = 1
_SECTIONS = ("predictions", "exercises")


def progress_path(environment: Mapping[str, str] | None = None, platform: str = sys.platform) -> Path:
    """Return where this learner's progress is kept on this platform."""
    env = os.environ if environment is None else environment
    if env.get(VARIABLE):
        return Path(env[VARIABLE]).expanduser()
    home = Path(env.get("HOME") or env.get("USERPROFILE") or Path.home())
    if platform == "darwin":
        base = home / "Library" / "Application Support"
    elif platform == "win32":
        base = Path(env.get("LOCALAPPDATA") or home / "AppData" / "Local")
    else:
        base = Path(env.get("XDG_STATE_HOME") or home / ".local" / "state")
    return base / "dsv3lib" / "progress.json"


@dataclass(frozen=True)
class Record:
    """The progress file. The course goes on without it: a full disk must not stop a lesson."""

    path: Path

    def read(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Return all entries: ``{"predictions": {key: entry}, "exercises": {key: entry}}``."""
        try:
            raw = json.loads(self.path.read_text(encoding="utf-8"))
            return {section: _entries(raw, section) for section in _SECTIONS}
        except FileNotFoundError:
            return {section: {} for section in _SECTIONS}
        except (ValueError, TypeError):
            self._set_aside()
            return {section: {} for section in _SECTIONS}
        except OSError:
            return {section: {} for section in _SECTIONS}

    def read_strictly(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Return all entries, as :meth:`read` does, for a command that a learner waits for.

        Raises:
            CourseError: the file is there and cannot be read; it is left as it is.
        """
        try:
            raw = json.loads(self.path.read_text(encoding="utf-8"))
            return {section: _entries(raw, section) for section in _SECTIONS}
        except FileNotFoundError:
            return {section: {} for section in _SECTIONS}
        except (OSError, ValueError, TypeError) as error:
            raise CourseError(
                f"the progress file {self.path} cannot be read ({error}); expected JSON with the tables "
                f"{' and '.join(_SECTIONS)}. Mend it, or move it away to begin without progress"
            ) from error

    def forget(self, lesson: str) -> dict[str, dict[str, dict[str, Any]]]:
        """Take a lesson's entries out of the file; return them.

        Args:
            lesson: its short name, as in ``"mla"``.

        Raises:
            SaveError: the file cannot be written.
        """
        everything = self.read()
        taken: dict[str, dict[str, dict[str, Any]]] = {}
        for section, entries in everything.items():
            taken[section] = {key: entry for key, entry in entries.items() if key.partition(".")[0] == lesson}
            everything[section] = {key: entry for key, entry in entries.items() if key not in taken[section]}
        if any(taken.values()):
            self._write({"format": _FORMAT, **everything})
        return taken

    def entry(self, section: str, key: str) -> dict[str, Any]:
        """Return one entry, or an empty one."""
        return dict(self.read()[section].get(key, {}))

    def update(self, section: str, key: str, **changes: Any) -> str:
        """Change fields of one entry and replace the file; return "" or the sentence that says why not."""
        everything = self.read()
        entry = {**everything[section].get(key, {}), **changes}
        everything[section][key] = entry
        try:
            self._write({"format": _FORMAT, **everything})
        except OSError as error:
            return f"Your progress could not be kept: {error}."
        from dsv3lib.course import overview  # it reads this file

        overview.refresh(self.path)
        return ""

    def _write(self, content: dict[str, Any]) -> None:
        write_whole(self.path, json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True))

    def _set_aside(self) -> None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        for number in range(100):
            aside = self.path.with_name(f"{self.path.stem}.unreadable-{stamp}-{number}{self.path.suffix}")
            if not aside.exists():
                try:
                    os.replace(self.path, aside)
                except OSError:
                    pass  # nowhere to put it: the next write would fail too, and says so
                return


def learner() -> Record:
    """Return the record of whoever runs this kernel."""
    return Record(progress_path())


def _entries(raw: Any, section: str) -> dict[str, dict[str, Any]]:
    if not isinstance(raw, dict) or not isinstance(raw.get(section, {}), dict):
        raise ValueError(f"the progress file has no table {section!r}")
    entries = raw.get(section, {})
    if not all(isinstance(entry, dict) for entry in entries.values()):
        raise ValueError(f"the progress file's table {section!r} holds something that is no entry")
    return entries
