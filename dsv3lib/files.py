"""Writing files so that nothing is ever lost: the old one stands until the new one is whole."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

from .errors import SaveError


def write_whole(path: str | Path, text: str) -> None:
    """Write a text file under a temporary name beside it, flush it to the disk, and rename it.

    A reader, or a crash at any moment, finds the old content or the new, never a part. Missing folders are made.

    Args:
        path: the file. text: its whole content; written as UTF-8 with the line ends as given.

    Raises:
        SaveError: the disk is full or the folder cannot be written; what stood there is intact.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it readable by its owner alone
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            why = error.strerror or error
            raise SaveError(f"{path}: cannot be written ({why}); what stood there is intact") from error
        raise


def with_utf8_name(path: Path, stack: ExitStack) -> Path:
    """A path to the same file whose every letter is UTF-8, for libraries that take no other name.

    Args:
        path: of an existing file. stack: takes the link away, where one was needed.
    """
    try:
        str(path).encode()
        return path
    except UnicodeEncodeError:
        link = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "file"
        link.symlink_to(path.absolute())
        return link
