"""Anybody's own text: a folder of any size, as domains of pieces that are read when their turn comes.

Only paths and sizes are held. A file up to ``PIECE_BYTES`` is one document; a longer one is cut into pieces
near every multiple of ``PIECE_BYTES``, at the first line end after it. The cut is found by looking at a
small window there, so piece ``i`` of a file of any size is reached without reading what stands before it,
and a file without line ends is cut between two characters instead.
"""

import codecs
import hashlib
import os
import stat
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dsv3lib.errors import DataError
from dsv3lib.training.text.domains import BuiltinText, Document, Domain, builtin_domains

PIECE_BYTES = 64 * 1024
_CUT_WINDOW_BYTES = 8 * 1024  # how far after a multiple of PIECE_BYTES a line end is looked for
_SNIFF_BYTES = 8 * 1024  # how much of a file is looked at to tell text from binary
_MAX_DOMAINS = 32  # more sub-folders than this are one domain: a table of hundreds teaches nothing
_EXAMPLES = 3  # skipped files named in a note


class FolderDomain(Domain):
    """Text files of one folder, read piece by piece.

    Args:
        name: the domain's name.
        root: folder that the paths are relative to.
        files: (path relative to ``root`` with forward slashes, size in bytes), sorted.
    """

    def __init__(self, name: str, root: Path, files: list[tuple[str, int]]) -> None:
        self.name = name
        self._root = root
        self._paths = [path for path, _ in files]
        self._sizes = array("q", (size for _, size in files))
        self._firsts = array("q")  # number of the first piece of each file
        count = 0
        for size in self._sizes:
            self._firsts.append(count)
            count += max(1, -(-size // PIECE_BYTES))
        self.count = count
        self.size_bytes = sum(self._sizes)

    def _locate(self, index: int) -> tuple[int, int]:
        file = bisect_right(self._firsts, index) - 1
        return file, index - self._firsts[file]

    def document_name(self, index: int) -> str:
        file, piece = self._locate(index)
        return self._paths[file] if self._sizes[file] <= PIECE_BYTES else f"{self._paths[file]}#{piece}"

    def read(self, index: int) -> Document:
        file, piece = self._locate(index)
        path, size = self._root / self._paths[file], self._sizes[file]
        try:
            with open(path, "rb") as stream:
                start, end = _cut(stream, piece, size), _cut(stream, piece + 1, size)
                stream.seek(start)
                raw = stream.read(end - start)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read any more ({error.strerror}); put it back, or start again without it"
            ) from error
        if len(raw) != end - start:
            raise DataError(
                f"{path}: has shrunk below the {size} bytes it had when training began; "
                "leave the data folder alone during a run, or start again"
            )
        return Document(
            _decode(raw, first=piece == 0, last=end == size), self.name, self.document_name(index)
        )

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=8)
        for path, size in zip(self._paths, self._sizes, strict=True):
            digest.update(f"{path}\t{size}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def _cut(stream, piece: int, size: int) -> int:
    """Byte at which a piece starts: after a line end where one is near, else between two characters."""
    nominal = piece * PIECE_BYTES
    if piece == 0 or nominal >= size:
        return min(nominal, size)
    stream.seek(nominal)
    window = stream.read(_CUT_WINDOW_BYTES)
    line_end = window.find(b"\n")
    if line_end >= 0:
        return nominal + line_end + 1
    # A continuation byte of UTF-8 is 10xxxxxx; a character has at most three.
    skip = next((i for i, byte in enumerate(window[:4]) if byte & 0xC0 != 0x80), 0)
    return nominal + skip


def _decode(raw: bytes, first: bool, last: bool) -> str:
    """UTF-8 text; a character cut off by the end of the file is dropped, other wrong bytes become U+FFFD."""
    if first:
        raw = raw.removeprefix(codecs.BOM_UTF8)
    return codecs.getincrementaldecoder("utf-8")("replace").decode(raw, final=not last)


def _reason_to_skip(path: Path) -> tuple[str, int]:
    """Why a file is not text ("" if it is), and its size in bytes."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            return "not a regular file", 0
        with open(path, "rb") as stream:
            head = stream.read(_SNIFF_BYTES)
    except OSError as error:
        return f"unreadable ({error.strerror})", 0
    if not head.strip() and status.st_size <= _SNIFF_BYTES:
        return "empty", 0
    if b"\0" in head:
        return "binary", 0
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head, final=False)
    except UnicodeDecodeError:
        return "not UTF-8", 0
    return "", status.st_size


def _walk(root: Path, notes: list[tuple[str, str]]):
    """All files below ``root`` in a fixed order; hidden ones (.git and the like) are left out."""

    def failed(error: OSError) -> None:
        notes.append((f"unreadable ({error.strerror})", str(error.filename)))

    for folder, subfolders, files in os.walk(root, onerror=failed):
        subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
        for file in sorted(f for f in files if not f.startswith(".")):
            yield Path(folder) / file


def folder_domains(folder: str | os.PathLike, own_name: str | None = None) -> tuple[list[Domain], list[str]]:
    """Make domains from any folder of UTF-8 text: one for each sub-folder on the first level.

    Files beside those sub-folders form a domain with the folder's own name. Files are told from binary ones
    by their bytes, not by their ending. With more than 32 sub-folders everything is one domain.

    Args:
        folder: a folder, or a single text file.
        own_name: of the domain of files beside the sub-folders, by default the folder's.

    Returns:
        The domains, sorted by name, and notes for the user on what was skipped and why.

    Raises:
        DataError: it does not exist, is empty, or holds no text.
    """
    top = Path(folder).expanduser()
    if not top.exists():
        raise DataError(
            f"data folder {top} does not exist; check the path, or leave --data out to train on the text "
            "of this machine"
        )
    top = top.resolve()
    root, candidates, skipped = top, [], []
    if top.is_dir():
        candidates = _walk(top, skipped)
    else:
        root, candidates = top.parent, [top]
    groups: dict[str, list[tuple[str, int]]] = {}
    own_name = own_name or top.name or "text"
    for path in candidates:
        reason, size = _reason_to_skip(path)
        relative = path.relative_to(root)
        if reason:
            skipped.append((reason, relative.as_posix()))
            continue
        group = relative.parts[0] if len(relative.parts) > 1 else own_name
        groups.setdefault(group, []).append((relative.as_posix(), size))
    notes = _notes(skipped)
    if not groups:
        found = "; ".join(notes) if notes else "it is empty"
        raise DataError(
            f"data folder {top} holds no text to learn from: {found}. Put UTF-8 text files "
            "(.txt, .md, .py, …) into it, or leave --data out to train on the text of this machine"
        )
    if len(groups) > _MAX_DOMAINS:
        notes.append(
            f"{len(groups)} sub-folders are taken as one domain, {own_name!r} (at most {_MAX_DOMAINS} apart)"
        )
        groups = {own_name: sorted(file for files in groups.values() for file in files)}
    return [FolderDomain(name, root, sorted(groups[name])) for name in sorted(groups)], notes


def _notes(skipped: list[tuple[str, str]]) -> list[str]:
    """One sentence for each reason, with a few file names."""
    notes = []
    for reason, count in Counter(reason for reason, _ in skipped).items():
        names = [name for why, name in skipped if why == reason][:_EXAMPLES]
        more = ", …" if count > len(names) else ""
        notes.append(f"skipped {count} file{'s' if count > 1 else ''}, {reason}: {', '.join(names)}{more}")
    return notes


def open_domains(
    data: str | os.PathLike | None = None,
    without: Sequence[str] = (),
    seed: int = 0,
    text: BuiltinText = "small",
    own_name: str | None = None,
) -> tuple[list[Domain], list[str]]:
    """The text to train on: the built-in domains, or those of a folder where one is given.

    Args:
        data: folder of anybody's own text, or None for the text of this machine.
        without: built-in domains to leave out.
        seed: of the generated arithmetic.
        text: how much of the built-in text, see ``builtin_domains``.
        own_name: of the domain of files beside the folder's sub-folders, by default the folder's; a run that goes on
            knows it by the name that it had.

    Returns:
        The domains, and notes for the user on what was skipped.

    Raises:
        DataError: there is no text to learn from; the message names the way out.
    """
    if data is not None:
        return folder_domains(data, own_name)
    return builtin_domains(without=without, seed=seed, text=text), []
