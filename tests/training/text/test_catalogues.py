"""Message catalogues: what is read, in which charset, and what a damaged one is told."""

import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3lib.errors import DataError
from dsv3lib.training.text.catalogues import babel_names, read_gettext, system_catalogues, translations

words = st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters="\0\x04"), min_size=1, max_size=30
)


def catalogue(messages: dict[str, str], charset: str = "utf-8", order: str = "<") -> bytes:
    """A gettext file, written by hand."""
    messages = {"": f"Content-Type: text/plain; charset={charset}\n"} | messages
    keys = sorted(messages, key=lambda key: key.encode(charset))
    blobs = [key.encode(charset) for key in keys] + [messages[key].encode(charset) for key in keys]
    offset, tables, data = 28 + 16 * len(keys), b"", b""
    for blob in blobs:
        tables += struct.pack(f"{order}2I", len(blob), offset + len(data))
        data += blob + b"\0"
    n = len(keys)
    return struct.pack(f"{order}7I", 0x950412DE, 0, n, 28, 28 + 8 * n, 0, 0) + tables + data


@given(st.dictionaries(words, words, max_size=8), st.sampled_from("<>"))
def test_what_is_written_is_read_in_either_byte_order(tmp_path_factory, messages, order):
    path = tmp_path_factory.mktemp("mo") / "program.mo"
    path.write_bytes(catalogue(messages, order=order))
    assert {source: forms for source, forms in read_gettext(path)} == {k: [v] for k, v in messages.items()}
    said = list(translations(path))
    assert sorted(said) == sorted(v for k, v in messages.items() if v.strip() and v.strip() != k.strip())


def test_the_charset_of_the_header_plural_forms_and_contexts(tmp_path):
    path = tmp_path / "program.mo"
    messages = {"menu\x04Open": "Öffnen", "%d file\0%d files": "%d Datei\0%d Dateien", "same": "same"}
    path.write_bytes(catalogue(messages, charset="iso-8859-1"))
    assert dict(read_gettext(path))["Open"] == ["Öffnen"]
    assert list(translations(path)) == ["%d Datei", "%d Dateien", "Öffnen"]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda data: data[:60], "behind the file's end"),
        (lambda data: b"PK" + data[2:], "magic number"),
        (lambda data: data[:10], "cannot be read"),
        (lambda data: data.replace(b"charset=utf-8", b"charset=ascii"), "ascii"),
    ],
)
def test_a_damaged_catalogue_is_named(tmp_path, damage, told):
    path = tmp_path / "program.mo"
    path.write_bytes(damage(catalogue({"Open": "Öffnen"})))
    with pytest.raises(DataError, match=r"program\.mo.*" + told):
        list(read_gettext(path))


def test_the_systems_catalogues_are_sorted_once_each_and_without_lists_of_names(tmp_path):
    for place in ("a/de", "a/de_DE", "b/de", "a/fr"):
        (tmp_path / place / "LC_MESSAGES").mkdir(parents=True)
    for place in ("a/de/LC_MESSAGES/git.mo", "a/de_DE/LC_MESSAGES/bash.mo", "b/de/LC_MESSAGES/git.mo",
                  "a/de/LC_MESSAGES/iso_3166.mo", "a/fr/LC_MESSAGES/tar.mo"):  # fmt: skip
        (tmp_path / place).write_bytes(b"")
    found = system_catalogues(("de", "de_DE"), (tmp_path / "a", tmp_path / "b", tmp_path / "none"))
    assert [p.relative_to(tmp_path).as_posix() for p in found] == [
        "a/de_DE/LC_MESSAGES/bash.mo",
        "a/de/LC_MESSAGES/git.mo",
    ]
    assert system_catalogues(("de",), (tmp_path / "none",)) == []


def test_babel_names_countries_in_their_language_and_nothing_where_it_is_missing():
    assert "Deutschland" in babel_names("de")["territories"]
    assert babel_names("no such language") == {}
    code = (
        "import sys; sys.modules['babel'] = None\n"
        "from dsv3lib.training.text.catalogues import babel_names; print(babel_names('de'))"
    )
    root = Path(__file__).parents[3]
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert said.stdout.strip() == "{}"
