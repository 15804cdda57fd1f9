"""Saving: what stood there before survives a failure, and what others wrote survives success."""

import errno
import json
import os
import re
import resource
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest
from checkpoint_folders import assert_same, state_of
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import build, small

from dsv3lib import DeepSeekV3
from dsv3lib.checkpoint import writing
from dsv3lib.errors import SaveError


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_full_disk_keeps_what_was_there(tmp_path: Path) -> None:
    """A real file system of 1 MiB where mounting is allowed, a limit on the size of files elsewhere."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    try:
        mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    try:
        build(small()).save_pretrained(disk, max_shard_bytes=40_000)
        before = files_of(disk)
        big = build(small(hidden_size=256, vocab_size=1000))
        if mounted:
            with pytest.raises(SaveError, match="disk is full.*free some space"):
                big.save_pretrained(disk, max_shard_bytes=200_000)
        else:
            with file_size_limit(500_000), pytest.raises(SaveError, match="not saved"):
                big.save_pretrained(disk)
        assert files_of(disk) == before, "earlier files changed, or temporary ones were left"
        assert_same(state_of(build(small())), state_of(DeepSeekV3.from_pretrained(disk)))
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=True)


class file_size_limit:
    """No file may grow past so many bytes; writing more fails as on a full disk, with another number."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def __enter__(self) -> None:
        self.handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.before[1]))

    def __exit__(self, *details: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)
        signal.signal(signal.SIGXFSZ, self.handler)


def test_a_write_that_fails_keeps_what_was_there(tmp_path: Path) -> None:
    build(small()).save_pretrained(tmp_path)
    before = files_of(tmp_path)
    big = build(small(hidden_size=256, vocab_size=1000))
    with file_size_limit(500_000), pytest.raises(SaveError, match="not saved"):
        big.save_pretrained(tmp_path)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("nth", [0, 2])
def test_a_disk_that_fills_up_midway_keeps_what_was_there(
    nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(small()).save_pretrained(tmp_path, max_shard_bytes=20_000)
    before, calls = files_of(tmp_path), []

    def filling(tensors: dict, path: Path, metadata: dict) -> None:
        calls.append(path)
        Path(path).write_bytes(b"half a file")
        if len(calls) > nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writing, "save_file", filling)
    with pytest.raises(SaveError, match="disk is full"):
        build(small(), seed=1).save_pretrained(tmp_path, max_shard_bytes=20_000)
    assert len(calls) == nth + 1 and files_of(tmp_path) == before


def test_an_interrupt_while_saving_leaves_no_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(small()).save_pretrained(tmp_path)
    before = files_of(tmp_path)

    def interrupted(tensors: dict, path: Path, metadata: dict) -> None:
        Path(path).write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(small(), seed=1).save_pretrained(tmp_path)
    assert files_of(tmp_path) == before


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "taken"
    path.write_text("a file")
    with pytest.raises(SaveError, match="taken"):
        build(small()).save_pretrained(path)
    assert path.read_text() == "a file"


OF_OTHERS = st.sampled_from([
    "model_lora.safetensors", "model-ema.safetensors", "model.fp16.safetensors", "model.safetensors.bak",
    "model-00001-of-00002.fp16.safetensors", "model-1-of-2.safetensors", "adapter_model.safetensors",
    "mtp-model-00001-of-00002.safetensors", "model.safetensors.tmp", "model.safetensors.index.json.old",
    "pytorch_model.bin", "tokenizer.json", "model-00001.safetensors", "MODEL.safetensors",
]) | st.from_regex(r"model[-_.a-z0-9]{0,12}\.safetensors", fullmatch=True).filter(
    lambda name: not re.fullmatch(r"model(-[0-9]{5,}-of-[0-9]{5,})?\.safetensors", name)
)  # fmt: skip


@given(
    names=st.sets(OF_OTHERS, max_size=4),
    limits=st.lists(st.sampled_from([3000, 20_000, 10**9]), min_size=1, max_size=3),
)
@settings(max_examples=8)
def test_files_of_others_stay(names: set[str], limits: list[int]) -> None:
    """Whatever is saved over whatever, in however many shards."""
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        for name in names:
            (folder / name).write_text(f"mine: {name}")
        for seed, limit in enumerate(limits):
            build(small(), seed).save_pretrained(folder, max_shard_bytes=limit)
        assert {name: (folder / name).read_text() for name in names} == {n: f"mine: {n}" for n in names}
        back = DeepSeekV3.from_pretrained(folder)
        assert_same(state_of(build(small(), len(limits) - 1)), state_of(back))
        ours = {p.name for p in folder.iterdir()} - names
        index = folder / "model.safetensors.index.json"
        held = (
            set(json.loads(index.read_text())["weight_map"].values())
            if index.exists()
            else {"model.safetensors"}
        )
        assert ours == held | {"config.json"} | ({index.name} if index.exists() else set())
