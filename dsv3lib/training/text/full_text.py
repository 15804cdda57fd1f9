"""The full built-in text: all that this machine and the course's own packages hold, near-duplicates dropped.

The small text (``domains.py``) opens at once and is what the lessons read. This one is ten to sixty times as
much in the domains that were poor: docstrings of the installed packages beside Python's help topics; Babel's
names and, where the system has them, the message catalogues of its programs beside JupyterLab's translations.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

from dsv3lib.errors import DataError
from dsv3lib.training.text import domains as small
from dsv3lib.training.text.catalogues import babel_names, system_catalogues, translations
from dsv3lib.training.text.docstrings import PACKAGES, docstrings, documented_files
from dsv3lib.training.text.domains import ArithmeticDomain, Domain, ListedDomain
from dsv3lib.training.text.duplicates import Redundancy, drop_near_duplicates, first_of_each

# The names of a language's folders in the system, and Babel's name for it.
_LOCALES = {
    "chinese": (("zh_CN", "zh_Hans"), "zh"),
    "german": (("de", "de_DE"), "de"),
    "french": (("fr", "fr_FR"), "fr"),
    "spanish": (("es", "es_ES"), "es"),
}
_PARAGRAPHS = re.compile(r"\n[ \t]*\n")
_DOCUMENT_CHARS = 4000
_SHORTEST_DOCUMENT = 40
# Shares of the training tokens: code and English make half, the four other languages a third.
FULL_WEIGHTS = {
    "code": 0.28,
    "docs": 0.22,
    "chinese": 0.09,
    "german": 0.09,
    "french": 0.09,
    "spanish": 0.09,
    "arithmetic": 0.14,
}


class DeduplicatedDomain(ListedDomain):
    """A listed domain without its near-duplicates.

    Attributes:
        redundancy: what was dropped. sources: bytes kept by where they came from.
    """

    def __init__(self, domain: Domain, repeated_bytes: int = 0) -> None:
        names = [domain.document_name(i) for i in range(domain.count)]
        texts: dict[str, str] = {}

        def read(name: str) -> str:
            texts[name] = domain.read(places[name]).text
            return texts[name]

        places = {name: i for i, name in enumerate(names)}
        kept, self.redundancy = drop_near_duplicates(names, read, repeated_bytes)
        sizes = {name: len(texts[name].encode("utf-8", "replace")) for name in kept}
        super().__init__(domain.name, sizes, lambda name: domain.read(places[name]).text)
        self.sources: dict[str, int] = {}
        for name, size in sizes.items():
            source = name.split("/")[0]
            self.sources[source] = self.sources.get(source, 0) + size


def full_domains(names: Sequence[str], seed: int = 0) -> list[Domain]:
    """The built-in domains with all their text.

    Args:
        names: which of ``BUILTIN_DOMAINS``. seed: of the generated arithmetic.

    Raises:
        DataError: the sources or a language pack are not installed.
    """
    makers = {"code": _code, "docs": _docs, "arithmetic": lambda: ArithmeticDomain(seed)}
    return [makers[name]() if name in makers else _language(name) for name in names]


def _code() -> Domain:
    return DeduplicatedDomain(small.code_domain())


def _docs() -> Domain:
    """Python's help topics and the docstrings of installed packages; a paragraph counts where it is first met.

    Docstrings repeat whole paragraphs (of `axis`, of `dtype`) from function to function.
    """
    texts = _texts_of(small.docs_domain(), "python")
    seen: set[str] = set()
    for text in texts.values():
        first_of_each(_PARAGRAPHS.split(text), seen)
    repeated = 0
    for package in PACKAGES:
        for name, path in documented_files(package).items():
            found = docstrings(path.read_text(encoding="utf-8", errors="replace"))
            paragraphs, again = first_of_each([p for text in found for p in _PARAGRAPHS.split(text)], seen)
            repeated += again
            for part, text in enumerate(_joined(paragraphs, "\n\n")):
                texts[f"{name}/{part:03d}"] = text
    return DeduplicatedDomain(small.held_in_memory("docs", texts), repeated)


def _language(name: str) -> Domain:
    """JupyterLab's translations, Babel's names, and the system's message catalogues, each message once."""
    locales, babel = _LOCALES[name]
    texts = _texts_of(small.language_domain(name), "jupyterlab")
    seen: set[str] = set()
    for text in texts.values():
        first_of_each(text.splitlines(), seen)
    repeated = 0
    groups = {f"babel/{section}": messages for section, messages in babel_names(babel).items()}
    for path in system_catalogues(locales):
        groups[f"system/{path.stem}"] = _readable(path)
    for group, messages in groups.items():
        fresh, again = first_of_each(messages, seen)
        repeated += again
        for part, text in enumerate(_joined(fresh, "\n")):
            texts[f"{group}/{part:03d}"] = text
    return DeduplicatedDomain(small.held_in_memory(name, texts), repeated)


def _readable(path: Path) -> list[str]:
    """A system catalogue's messages; one that is damaged is another program's business, and is passed over."""
    try:
        return list(translations(path))
    except DataError as error:
        warnings.warn(f"passed over: {error}", stacklevel=2)
        return []


def _texts_of(domain: Domain, source: str) -> dict[str, str]:
    documents = (domain.read(i) for i in range(domain.count))
    return {f"{source}/{document.name}": document.text for document in documents}


def _joined(parts: list[str], separator: str) -> list[str]:
    """Parts put together in their order to documents of about ``_DOCUMENT_CHARS``; crumbs are left out."""
    documents, current, length = [], [], 0
    for part in parts:
        if current and length + len(part) > _DOCUMENT_CHARS:
            documents.append(current)
            current, length = [], 0
        current.append(part)
        length += len(part) + len(separator)
    documents.append(current)
    texts = [separator.join(document) + "\n" for document in documents]
    return [text for text in texts if len(text) > _SHORTEST_DOCUMENT]


def redundancy(domain: Domain) -> Redundancy | None:
    """What was dropped from a domain as already there; None where nothing was looked for."""
    return getattr(domain, "redundancy", None)
