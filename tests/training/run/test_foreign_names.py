"""`dsv3 train` on somebody's own folder and configuration: odd names, other special tokens, a renamed folder."""

import contextlib
import io
import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from dsv3lib import DeepSeekV3, ModelConfig
from dsv3lib.cli import main
from dsv3lib.training.run.log import read_log

ODD_BYTES = os.fsdecode(b"\xff\xfe")  # a name that is no UTF-8
TEXT = "The mean of two numbers lies between them, and so does every other.\n" * 400
SHORT = ("--seq-len", "16", "--batch-size", "1", "--threads", "1")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A data folder with names that rich, a locale or a glob could trip over; beside it a foreign configuration."""
    folder = tmp_path_factory.mktemp("[place]")
    data = folder / "[slug]"
    for name in ("[bold]one", f"two{ODD_BYTES}"):
        (data / name).mkdir(parents=True)
        for number in range(6):
            (data / name / f"{number}*{ODD_BYTES}.txt").write_text(f"{name!a} {number}\n{TEXT}")
    for number in range(6):
        (data / f"own {number}.txt").write_text(f"{number}\n{TEXT}")
    fields = ModelConfig.preset("nano").to_dict() | {"num_hidden_layers": 1, "vocab_size": 50_000}
    fields |= {"bos_token_id": 49_000, "eos_token_id": [49_001, 7], "pad_token_id": None}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def run_of(place: Path) -> Path:
    return place / f"a[/b]{ODD_BYTES}"


def dsv3(*words: object) -> tuple[int, str, str]:
    """A command's status, and what it says on both streams (which capture as text any name that there is)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(word) for word in words])
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def told(place: Path) -> str:
    """What a run says; it is made once."""
    where = ("--config", place / "config.json", "--data", place / "[slug]", "--out", run_of(place))
    status, out, _ = dsv3("train", *where, "--steps", 3, "--checkpoint-every", 2, *SHORT)
    assert status == 0
    return out


def test_every_name_is_told_as_it_is(place: Path, told: str) -> None:
    assert "text: [bold]one, [slug], two" in told
    model = shlex.quote(str(run_of(place) / "model"))
    assert f"dsv3 generate {model}" in told
    assert len(read_log(run_of(place)).steps) == 3


def test_special_tokens_are_the_tokenizer_s(place: Path, told: str) -> None:
    assert (
        "note: special tokens as in the tokenizer: bos_token_id 49000 -> 0, eos_token_id (49001, 7) -> 1"
        in told
    )
    config = DeepSeekV3.from_pretrained(run_of(place) / "model").config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 1, 2)
    assert config.vocab_size < 50_000


def test_a_run_goes_on_with_its_folder_under_another_name(place: Path, told: str) -> None:
    shutil.copytree(place / "[slug]", place / "renamed")
    again = ("train", "--resume", run_of(place), "--data", place / "renamed")
    assert dsv3(*again)[0] == 0
    (place / "renamed" / "own 0.txt").write_text("another text\n" * 300)
    status, _, error = dsv3(*again)
    assert status == 2 and "stream.domains.[slug]" in error and "resumed with None" not in error


def test_a_damaged_save_point_says_what_to_remove(place: Path, told: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_of(place), run)
    newest = sorted((run / "checkpoints").iterdir())[-1]
    content = (newest / "model.safetensors").read_bytes()
    (newest / "model.safetensors").write_bytes(content[: len(content) // 2])
    for command in (("train", "--resume", run), ("generate", newest)):
        status, _, error = dsv3(*command)
        assert (
            status == 2 and f"{newest}: this save point is damaged" in error and "remove its folder" in error
        )
    shutil.rmtree(newest)
    assert dsv3("train", "--resume", run)[0] == 0
