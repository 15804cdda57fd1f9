"""Message catalogues: gettext ``.mo`` files of this machine, and the names that Babel carries (Unicode CLDR).

A catalogue maps an English message to its translation. Only translations are read, and only those that differ
from the English. Babel comes with JupyterLab; the system's own catalogues (``/usr/share/locale`` on Linux) are
there on most Linux machines and on no Mac, so a domain must be complete without them.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from dsv3lib.errors import DataError

SYSTEM_ROOTS = (Path("/usr/share/locale"), Path("/usr/local/share/locale"))
# Lists of thousands of names (languages of the world, provinces, currencies): no sentences, and most of them
# the same in every language.
_LISTS_OF_NAMES = ("iso_", "iso-", "xkeyboard-config")
_MAGIC = 0x950412DE
_CHARSET = re.compile(rb"charset=([\w-]+)")
_CONTEXT, _PLURAL = "\x04", "\0"
# Sections of Babel's locale data that hold words; the others hold patterns of digits and times.
_BABEL_SECTIONS = (
    "languages", "territories", "scripts", "variants", "currency_names", "currency_names_plural", "meta_zones",
    "time_zones", "unit_display_names", "unit_patterns", "compound_unit_patterns", "date_fields",
)  # fmt: skip


def read_gettext(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Messages of one compiled gettext catalogue (``.mo``), in its order, with their translations.

    Args:
        path: the file.

    Yields:
        (English message without its context, translations: one, or one for each plural form).

    Raises:
        DataError: the file is no catalogue, is cut off, or not in the charset that it names.
    """
    try:
        data = path.read_bytes()
        order = "<" if data[:4] == struct.pack("<I", _MAGIC) else ">"
        magic, _, count, originals, translations, _, _ = struct.unpack_from(f"{order}7I", data)
        if magic != _MAGIC:
            raise ValueError(f"it begins with {data[:4]!r}, expected the magic number of gettext")
        charset = "utf-8"
        for i in range(count):
            pair = []
            for table in (originals, translations):
                length, offset = struct.unpack_from(f"{order}2I", data, table + 8 * i)
                if offset + length > len(data):
                    raise ValueError(f"message {i} lies behind the file's end")
                pair.append(data[offset : offset + length])
            if pair[0]:
                source, translated = (text.decode(charset) for text in pair)
                yield source.split(_PLURAL)[0].rpartition(_CONTEXT)[2], translated.split(_PLURAL)
            elif named := _CHARSET.search(pair[1]):  # the empty message, always the first, is the header
                charset = named.group(1).decode()
    except (OSError, struct.error, ValueError, LookupError) as error:  # LookupError: an unknown charset
        raise DataError(
            f"catalogue {path}: cannot be read as a gettext file ({error}); remove it or install its package "
            "again"
        ) from error


def system_catalogues(locales: tuple[str, ...], roots: tuple[Path, ...] = SYSTEM_ROOTS) -> list[Path]:
    """The gettext files of this machine in one language, sorted by name; none where there are none.

    Args:
        locales: names of the language's folders, such as ("zh_CN", "zh_Hans").
        roots: where catalogues lie.
    """
    found: dict[str, Path] = {}
    for root in roots:
        for locale in locales:
            for path in sorted((root / locale / "LC_MESSAGES").glob("*.mo")):
                if not path.name.startswith(_LISTS_OF_NAMES):
                    found.setdefault(path.stem, path)
    return [found[name] for name in sorted(found)]


def translations(path: Path) -> Iterator[str]:
    """What one gettext file says in its language: translations that are not the English message itself."""
    for source, forms in read_gettext(path):
        for form in forms:
            if form.strip() and form.strip() != source.strip():
                yield form


def babel_names(locale: str) -> dict[str, list[str]]:
    """Names and phrases of a language as Babel carries them: section -> texts, each once.

    Args:
        locale: Babel's name, such as "de" or "zh".

    Returns:
        Languages, countries, currencies, units and their plurals, time zones; nothing where Babel is missing.
    """
    try:
        from babel import localedata
    except ImportError:
        return {}
    if not localedata.exists(locale):
        return {}
    data = localedata.load(locale)
    return {name: list(dict.fromkeys(_words(data.get(name, {})))) for name in _BABEL_SECTIONS}


def _words(value: object) -> Iterator[str]:
    """Strings of at least two letters, depth first, in the data's order."""
    if isinstance(value, Mapping):
        for part in value.values():
            yield from _words(part)
    elif isinstance(value, str) and sum(map(str.isalpha, value)) >= 2:
        yield value
