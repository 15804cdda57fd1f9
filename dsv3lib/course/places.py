"""Where the project keeps what lessons read, whichever folder a learner's copy of them lies in."""

from __future__ import annotations

import sys
from pathlib import Path

from dsv3lib.errors import CourseError

_CHECKOUT = Path(__file__).resolve().parents[2]
_INSTALLED = Path(sys.prefix) / "share" / "dsv3lib"


def data_folder(checkout: Path = _CHECKOUT, installed: Path = _INSTALLED) -> Path:
    """Return the project's ``data/`` folder: recorded runs and measured results.

    A lesson reads through this and never by a relative path, because a learner's copy lies elsewhere.

    Raises:
        CourseError: there is none, neither in a checkout nor installed.
    """
    for folder in (checkout / "data", installed / "data"):
        if folder.is_dir():
            return folder
    raise CourseError(
        f"the project's data folder was not found: looked in {checkout / 'data'} and {installed / 'data'}. "
        "Run the course from a clone of the project."
    )
