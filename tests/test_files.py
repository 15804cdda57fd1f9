"""A file is there whole or as it was: whatever happens while it is written."""

import errno
import os
import stat

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv3lib.errors import SaveError
from dsv3lib.files import write_whole


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(codec="utf-8")))
def test_what_is_written_is_what_is_read(tmp_path, text):
    path = tmp_path / "a folder" / "file.txt"
    write_whole(path, text)
    assert path.read_bytes() == text.encode("utf-8")
    assert os.listdir(path.parent) == ["file.txt"]


def test_others_may_read_it(tmp_path):
    write_whole(tmp_path / "file", "x")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644


@pytest.mark.parametrize("broken", ["fsync", "replace", "chmod"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, broken):
    path = tmp_path / "file"
    write_whole(path, "old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, broken, full)
    with pytest.raises(SaveError, match="No space left on device.*intact"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_an_interrupt_leaves_the_old_file_and_goes_on(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, "old")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
