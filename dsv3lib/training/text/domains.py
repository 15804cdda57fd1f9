"""Text that is already on the learner's machine, as named domains of numbered documents.

Nothing is downloaded and nothing foreign is shipped: the Python standard library's sources, its help
topics, JupyterLab's language packs, and generated arithmetic. A *domain* is all that training asks for: how
many documents there are, what document ``i`` is called, and its text. A domain never holds its texts if it
can read them again, so its memory does not grow with its size.
"""

import hashlib
import importlib.util
import json
import pydoc_data.topics
import re
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dsv3lib.errors import DataError
from dsv3lib.training.text.arithmetic import word_problem

BuiltinText = Literal["small", "full"]
LANGUAGE_PACKS = {"chinese": "zh_CN", "german": "de_DE", "french": "fr_FR", "spanish": "es_ES"}
BUILTIN_DOMAINS = ("code", "docs", "chinese", "german", "french", "spanish", "arithmetic")
# Shares of the training tokens. The language packs are small (27 to 140 KB): an equal share would repeat them
# dozens of times in a short run.
DEFAULT_WEIGHTS = {
    "code": 0.32,
    "docs": 0.20,
    "chinese": 0.10,
    "german": 0.05,
    "french": 0.10,
    "spanish": 0.05,
    "arithmetic": 0.18,
}

# Tests and tables are most of the library's bytes and little of its sense; pydoc_data is the `docs` domain;
# site-packages is not Python's; the config-* folder and _sysconfigdata differ from build to build.
_STDLIB_SKIPPED = {
    "test",
    "tests",
    "idle_test",
    "lib2to3",
    "encodings",
    "pydoc_data",
    "site-packages",
    "dist-packages",
    "__pycache__",
}
_STDLIB_MIN_BYTES = 64
_MESSAGES_PER_DOCUMENT = 32
_DOCS_MAX_CHARS = 4000


@dataclass(frozen=True)
class Document:
    """One text with the domain it belongs to and a name that is unique within that domain."""

    text: str
    domain: str
    name: str


class Domain(ABC):
    """A named, numbered source of documents; ``count`` is None where it never ends."""

    name: str
    count: int | None
    size_bytes: int | None

    @abstractmethod
    def document_name(self, index: int) -> str:
        """Name of document ``index``, found without reading its text."""

    @abstractmethod
    def read(self, index: int) -> Document:
        """Text of document ``index``, read now and not kept."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Short hash that changes when documents are added, removed or change their length."""


class ListedDomain(Domain):
    """Documents whose names are listed and whose texts are read on demand.

    Args:
        name: the domain's name.
        sizes: document name -> size in bytes, in a fixed order.
        reader: takes a document's name, returns its text.
    """

    def __init__(self, name: str, sizes: dict[str, int], reader) -> None:
        self.name = name
        self.count = len(sizes)
        self.size_bytes = sum(sizes.values())
        self._names = list(sizes)
        self._reader = reader
        listing = "\n".join(f"{key}\t{size}" for key, size in sizes.items())
        self._fingerprint = hashlib.blake2b(listing.encode(), digest_size=8).hexdigest()

    def document_name(self, index: int) -> str:
        return self._names[index]

    def read(self, index: int) -> Document:
        name = self._names[index]
        return Document(self._reader(name), self.name, name)

    def fingerprint(self) -> str:
        return self._fingerprint


class ArithmeticDomain(Domain):
    """Word problems without end; document ``i`` is made from the seed and ``i`` alone."""

    name = "arithmetic"
    count = None
    size_bytes = None

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def document_name(self, index: int) -> str:
        return f"{self.seed}/{index}"

    def read(self, index: int) -> Document:
        return Document(word_problem(self.seed, index), self.name, self.document_name(index))

    def fingerprint(self) -> str:
        return f"seed-{self.seed}"


def held_in_memory(name: str, texts: dict[str, str]) -> ListedDomain:
    """A domain whose texts are few enough to be kept."""
    return ListedDomain(name, {key: len(text.encode()) for key, text in texts.items()}, texts.__getitem__)


def code_domain() -> Domain:
    """Sources of Python's standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    sizes = {}
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        if _STDLIB_SKIPPED.intersection(relative.parts) or relative.parts[0].startswith(
            ("config-", "_sysconfigdata")
        ):
            continue
        if (size := file.stat().st_size) >= _STDLIB_MIN_BYTES:
            sizes[relative.as_posix()] = size
    if not sizes:
        raise DataError(
            f"domain 'code': no Python sources of the standard library under {root}; this Python is "
            "packed without them. Use another Python, or go on without it: --without code, "
            "in Python without=('code',)"
        )
    return ListedDomain(
        "code", sizes, lambda name: (root / name).read_text(encoding="utf-8", errors="replace")
    )


def docs_domain() -> Domain:
    """Python's help topics. Long topics quote short ones, so a paragraph counts only where it is met first.

    Without this the same paragraph could be in training and in validation.
    """
    texts, seen = {}, set()
    for topic, body in sorted(pydoc_data.topics.topics.items(), key=lambda item: (-len(item[1]), item[0])):
        paragraphs, length, part = [], 0, 0
        for paragraph in re.split(r"\n[ \t]*\n", body.strip("\n")):
            if paragraph in seen or not paragraph.strip():
                continue
            seen.add(paragraph)
            if paragraphs and length + len(paragraph) > _DOCS_MAX_CHARS:
                texts[f"{topic}/{part:03d}"] = "\n\n".join(paragraphs) + "\n"
                paragraphs, length, part = [], 0, part + 1
            paragraphs.append(paragraph)
            length += len(paragraph)
        if paragraphs:
            texts[f"{topic}/{part:03d}"] = "\n\n".join(paragraphs) + "\n"
    return held_in_memory("docs", texts)


def _translations(catalogue: Path) -> Iterable[str]:
    """Translated messages of one catalogue in its order; what was left in English is passed over."""
    try:
        entries = json.loads(catalogue.read_text(encoding="utf-8"))
        if not isinstance(entries, dict):
            raise ValueError(f"a {type(entries).__name__} where an object is expected")
    except ValueError as error:
        raise DataError(
            f"language pack: {catalogue} is not a readable JSON catalogue ({error}); "
            "install the language pack again"
        ) from error
    for source, forms in entries.items():
        if source == "":  # the catalogue's header
            continue
        for form in forms if isinstance(forms, list) else [forms]:
            # A key may be "context\x04message".
            if isinstance(form, str) and form.strip() and form != source.rpartition("\x04")[2]:
                yield form


def language_domain(name: str) -> Domain:
    """JupyterLab's translations into one language, 32 messages a document."""
    locale = LANGUAGE_PACKS[name]
    module = f"jupyterlab_language_pack_{locale}"
    package = f"jupyterlab-language-pack-{locale.replace('_', '-')}"
    way_out = (
        f"Install it with `python -m pip install {package}`, or go on without this language: "
        f"--without {name}, in Python without=('{name}',)"
    )
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"domain {name!r}: the package {package} is not installed. {way_out}")
    texts, seen = {}, set()
    for root in spec.submodule_search_locations:
        for catalogue in sorted(Path(root).rglob("*.json")):
            fresh = [m for m in dict.fromkeys(_translations(catalogue)) if m not in seen]
            seen.update(fresh)
            for start in range(0, len(fresh), _MESSAGES_PER_DOCUMENT):
                chunk = fresh[start : start + _MESSAGES_PER_DOCUMENT]
                texts[f"{catalogue.stem}/{start // _MESSAGES_PER_DOCUMENT:03d}"] = "\n".join(chunk) + "\n"
    if not texts:
        raise DataError(f"domain {name!r}: the package {package} holds no message catalogue. {way_out}")
    return held_in_memory(name, texts)


def builtin_domains(
    names: Sequence[str] = BUILTIN_DOMAINS,
    without: Sequence[str] = (),
    seed: int = 0,
    text: BuiltinText = "small",
) -> list[Domain]:
    """The domains made from text that comes with Python, JupyterLab and, if asked for, the rest of the machine.

    Args:
        names: which of ``BUILTIN_DOMAINS``, in the order wanted.
        without: names to leave out, for a machine that lacks one.
        seed: of the generated arithmetic; the others do not depend on it.
        text: "small" opens at once; "full" is all there is, near-duplicates dropped (``full_text.py``), and
            takes some seconds.

    Returns:
        One ``Domain`` for each name.

    Raises:
        DataError: an unknown name, nothing left, or a language pack or the sources are not installed.
    """
    for name in (*names, *without):
        if name not in BUILTIN_DOMAINS:
            raise DataError(f"unknown domain {name!r}; the built-in ones are {', '.join(BUILTIN_DOMAINS)}")
    wanted = [name for name in dict.fromkeys(names) if name not in without]
    if not wanted:
        raise DataError(
            f"no domain is left of names={tuple(names)} after without={tuple(without)}; keep at least one"
        )
    if text == "full":
        from dsv3lib.training.text.full_text import full_domains  # it stands on this file

        return full_domains(wanted, seed)
    makers = {"code": code_domain, "docs": docs_domain, "arithmetic": lambda: ArithmeticDomain(seed)}
    return [makers[name]() if name in makers else language_domain(name) for name in wanted]
