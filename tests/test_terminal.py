"""What is printed: any name a file system allows, in any locale, to the letter."""

import io
import shlex
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3lib import cli, terminal
from dsv3lib.terminal import displayable, plain_console, write_anything

# Python's form of any name that Linux allows: any bytes but a slash and NUL (control characters aside).
NAMES = st.binary(min_size=1, max_size=12).map(lambda raw: raw.decode("utf-8", "surrogateescape")).filter(
    lambda name: "/" not in name and name.isprintable() or any(0xDC80 <= ord(c) <= 0xDCFF for c in name)
) | st.sampled_from(["[slug]", "a[/b]", "[bold]x[/bold]", ":cat:", "[red", "a\\[b]", "γ", "'", "[link=x]"])  # fmt: skip
ENCODINGS = st.sampled_from(["utf-8", "latin-1", "ascii", "cp1252"])


@pytest.fixture
def streams(monkeypatch):
    """Gives the standard output an encoding and collects its bytes."""

    def encoded(encoding):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
        monkeypatch.setattr(sys, "stdout", stream)
        write_anything()
        return stream

    return encoded


@given(name=NAMES, encoding=ENCODINGS)
def test_a_name_is_printed_as_it_is(name: str, encoding: str) -> None:
    """A command to copy holds the name's own bytes; only letters that the terminal lacks are lost."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict", newline="")
    before, sys.stdout = sys.stdout, stream
    try:
        write_anything()
        plain_console(file=stream, width=500).print(f"dsv3 generate {shlex.quote(name)}")
        stream.flush()
    finally:
        sys.stdout = before
    printed = stream.buffer.getvalue()
    if any(ord(c) < 32 or ord(c) == 127 for c in name):
        return  # rich takes control characters out, which must not reach a terminal
    expected = b"".join(letter_in(encoding, c) for c in f"dsv3 generate {shlex.quote(name)}\n")
    assert printed == expected


def letter_in(encoding: str, letter: str) -> bytes:
    if 0xDC80 <= ord(letter) <= 0xDCFF:
        return bytes([ord(letter) - 0xDC00])
    try:
        return letter.encode(encoding)
    except UnicodeEncodeError:
        return b"?"


def test_the_check_rejects_markup() -> None:
    """The control: rich's own console swallows the name."""
    out = io.StringIO()
    plain_console(file=out, markup=True).print("runs/[slug]")
    assert out.getvalue() == "runs/\n"


@given(name=NAMES)
def test_a_page_shows_any_name(name: str) -> None:
    displayable(name).encode("utf-8")
    assert len(displayable(name)) == len(name)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_help_is_printed_in_any_locale(command: str, encoding: str, streams) -> None:
    stream = streams(encoding)
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    stream.flush()
    assert f"dsv3 {command}".encode() in stream.buffer.getvalue()


def test_an_ascii_terminal_in_earnest() -> None:
    """A process of its own, whose locale Python itself has read."""
    environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
                   "PYTHONIOENCODING": "ascii:strict", "PYTHONPATH": ":".join(sys.path)}  # fmt: skip
    command = [sys.executable, "-m", "dsv3lib.cli", "train", "--help"]
    ended = subprocess.run(command, capture_output=True, env=environment)
    assert ended.returncode == 0, ended.stderr.decode()
    assert b"? of the routers' bias" in ended.stdout


def test_other_streams_are_left_alone(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    write_anything()
    with pytest.raises(UnicodeDecodeError):
        b"\xff".decode("utf-8", terminal._ANY)
