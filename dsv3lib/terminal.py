"""Writing to a terminal: names as they are, whatever they hold, and whatever the terminal can show.

rich reads ``[slug]`` in a string as markup and ``:cat:`` as a picture; a folder may bear either name. A terminal may be
latin-1 or ASCII, and a file's name need be no text at all (Python then holds its bytes as lone surrogates). None of
that may swallow a letter of a command that is to be copied, or end the program.
"""

from __future__ import annotations

import codecs
import io
import sys
from typing import Any

from rich.console import Console

_ANY = "dsv3lib.any"  # the error handler's name
_FIRST_BYTE, _LAST_BYTE = 0xDC80, 0xDCFF  # how Python holds the bytes 0x80 to 0xFF of a name that is no UTF-8


def plain_console(**settings: Any) -> Console:
    """A rich console that prints strings as they are.

    Args:
        settings: of ``rich.console.Console``.
    """
    return Console(**{"soft_wrap": True, "markup": False, "emoji": False, "highlight": False, **settings})


def write_anything() -> None:
    """Let the standard streams take any string: a name's bytes as they were, a letter they lack as a question mark."""
    codecs.register_error(_ANY, _replace)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ANY)


def displayable(name: str) -> str:
    """A file's name as text: bytes that are no UTF-8 become question marks, for pages and figures."""
    return name.encode("utf-8", "replace").decode("utf-8")


def _replace(error: UnicodeError) -> tuple[bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return b"".join(map(_bytes_of, error.object[error.start : error.end])), error.end


def _bytes_of(letter: str) -> bytes:
    code = ord(letter)
    return bytes([code - 0xDC00]) if _FIRST_BYTE <= code <= _LAST_BYTE else b"?"
