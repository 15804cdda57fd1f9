"""Tokenizer: any text comes back, training repeats itself byte for byte, and transformers agrees."""

import errno
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dsv3lib.errors import DataError, InputError, SaveError
from dsv3lib.training.text import tokenizer as module
from dsv3lib.training.text.domains import builtin_domains
from dsv3lib.training.text.folder import folder_domains
from dsv3lib.training.text.tokenizer import (
    SPECIAL_TOKENS,
    Tokenizer,
    default_tokenizer,
    main,
    shipped_tokenizer_folder,
    train_tokenizer,
)

TOKENIZER = default_tokenizer()
# Text in general, and text made of what a tokenizer may stumble over.
awkward = st.lists(
    st.sampled_from(
        [
            *SPECIAL_TOKENS,
            " ",
            "  ",
            "\n",
            "\r\n",
            "\t",
            "\0",
            "\ufeff",
            "\ufffd",
            "é",
            "e\u0301",
            "12345",
            "٣٤",
            "Ⅷ",
            "語",
            "かな",
            "🏳️‍🌈",
            "self.x",
            "</s>",
            "ß",
            "\u2028",
            "\U0010ffff",
        ]
    ),
    max_size=20,
).map("".join)
texts = st.one_of(st.text(max_size=120), awkward)


@pytest.fixture(scope="module")
def oracle():
    return AutoTokenizer.from_pretrained(shipped_tokenizer_folder())


@given(text=texts)
def test_any_text_comes_back(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text == TOKENIZER.decode(ids, skip_special=False)
    assert all(len(SPECIAL_TOKENS) <= i < TOKENIZER.vocab_size for i in ids)


@given(text=texts)
def test_transformers_encodes_and_decodes_equally(oracle, text):
    ids = TOKENIZER.encode(text)
    assert oracle(text, add_special_tokens=False, split_special_tokens=True).input_ids == ids
    assert oracle(text, split_special_tokens=True).input_ids == TOKENIZER.encode(text, bos=True)
    assert oracle.decode(ids) == text


def test_the_shipped_tokenizer_is_the_promised_one(oracle):
    folder = shipped_tokenizer_folder()
    assert TOKENIZER.vocab_size == 4096 == len(oracle)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 400_000
    assert [TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.pad_id] == [0, 1, 2]
    assert [TOKENIZER.fim_begin_id, TOKENIZER.fim_hole_id, TOKENIZER.fim_end_id] == [3, 4, 5]
    assert [oracle.bos_token_id, oracle.eos_token_id, oracle.pad_token_id] == [0, 1, 2]
    assert oracle.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(6))


def test_it_compresses_every_domain():
    for domain in builtin_domains():
        text = "".join(domain.read(i).text for i in range(min(domain.count or 20, 20)))
        ratio = len(text.encode()) / len(TOKENIZER.encode(text))
        assert ratio > 2.0, (domain.name, ratio)


@given(number=st.integers(0, 10**30))
def test_no_token_holds_more_than_three_digits(number):
    pieces = [TOKENIZER.decode([i]) for i in TOKENIZER.encode(f"x{number}y")]
    digits = str(number)
    groups = [digits[i : i + 3] for i in range(0, len(digits), 3)]
    # Merges stay inside the groups of three counted from the left: a border of groups is a border of tokens.
    borders, length = set(), 0
    for piece in pieces:
        length += len(piece)
        borders.add(length)
    assert {1 + sum(map(len, groups[:k])) for k in range(len(groups) + 1)} <= borders


def test_training_never_merges_more_than_three_digits(tmp_path):
    # One number over and over: without the cut it would become a token of its own.
    (tmp_path / "a.txt").write_text("x 1234567 y\n" * 300)
    tokenizer = train_tokenizer(folder_domains(tmp_path)[0], 267)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("1234567")] == ["123", "456", "7"]


def test_bos_and_eos_stand_around():
    assert TOKENIZER.encode("hi", bos=True, eos=True) == [0, *TOKENIZER.encode("hi"), 1]
    assert TOKENIZER.decode([0, *TOKENIZER.encode("hi"), 1, 2]) == "hi"
    assert TOKENIZER.decode([0, 1], skip_special=False) == "<|begin_of_sentence|><|end_of_sentence|>"


def test_saving_and_reading_changes_nothing(tmp_path):
    TOKENIZER.save(tmp_path / "new" / "folder")
    again = Tokenizer.from_pretrained(tmp_path / "new" / "folder")
    assert again.fingerprint() == TOKENIZER.fingerprint()
    again.save(tmp_path)
    for file in shipped_tokenizer_folder().iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == [
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def small_text(folder):
    for i in range(30):
        (folder / f"{i}.txt").write_text(
            f"the cat number {i} sat on mat {i * i}, and then another cat came\n" * 5
        )
    return folder


def test_training_repeats_itself_in_other_processes_with_other_threads(tmp_path):
    small_text(tmp_path)
    command = [
        sys.executable,
        "-m",
        "dsv3lib.training.text.tokenizer",
        "--vocab-size",
        "300",
        "--data",
        str(tmp_path),
    ]
    written = []
    for number, threads in (("0", "1"), ("1", "4")):
        out = tmp_path.parent / f"{tmp_path.name}-{number}"
        environment = os.environ | {"PYTHONHASHSEED": number, "RAYON_NUM_THREADS": threads}
        subprocess.run(
            [*command, "--out", str(out)], check=True, env=environment, capture_output=True, timeout=120
        )
        written.append((out / "tokenizer.json").read_bytes())
    assert written[0] == written[1]


def test_another_seed_gives_another_sample():
    domains = builtin_domains(["code"])
    prints = {
        train_tokenizer(domains, 400, seed=seed, sample_bytes=60_000).fingerprint() for seed in (0, 0, 1)
    }
    assert len(prints) == 2


def test_validation_text_is_not_trained_on(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"{chr(0x4E00 + i)}{chr(0x5E00 + i)}\n" * 50)
    domains, _ = folder_domains(tmp_path)
    split = module.Split(domains[0])
    held = [i for i in range(40) if split.part(i) == "validation"]
    assert 0 < len(held) < 20
    tokenizer = train_tokenizer(domains, 340)
    joined = [len(tokenizer.encode(domains[0].read(i).text[:2])) for i in range(40)]
    seen = [length for i, length in enumerate(joined) if i not in held]
    assert min(joined[i] for i in held) > min(seen)
    assert sum(joined[i] for i in held) / len(held) > sum(seen) / len(seen)


def test_sizes_that_cannot_be_are_refused(tmp_path):
    domains, _ = folder_domains(small_text(tmp_path))
    with pytest.raises(DataError, match="vocab_size is 261.*need 262"):
        train_tokenizer(domains, 261)
    with pytest.raises(DataError, match="only enough for"):
        train_tokenizer(domains, 4096)
    with pytest.raises(DataError, match="no domain"):
        train_tokenizer([], 300)


@pytest.mark.parametrize("text, position", [("\ud800", 0), ("ok \udfff", 3)])
def test_lone_surrogates_are_refused(text, position):
    with pytest.raises(InputError, match=f"lone surrogate .* at position {position}"):
        TOKENIZER.encode(text)


@pytest.mark.parametrize("bad", [-1, 4096])
def test_ids_out_of_range_are_refused(bad):
    with pytest.raises(InputError, match=f"token id {bad} at position 1"):
        TOKENIZER.decode([5, bad])


def test_bad_files_are_named(tmp_path):
    with pytest.raises(DataError, match="tokenizer.json does not exist"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(
        (shipped_tokenizer_folder() / "tokenizer.json").read_bytes()[:5000]
    )
    with pytest.raises(DataError, match="tokenizer.json is not a tokenizer"):
        Tokenizer.from_pretrained(tmp_path)
    foreign = json.loads((shipped_tokenizer_folder() / "tokenizer.json").read_text())
    foreign["added_tokens"] = foreign["added_tokens"][:3]
    for token in SPECIAL_TOKENS[3:]:
        foreign["model"]["vocab"][token.upper()] = foreign["model"]["vocab"].pop(token)
    (tmp_path / "tokenizer.json").write_text(json.dumps(foreign))
    with pytest.raises(DataError, match="special tokens"):
        Tokenizer.from_pretrained(tmp_path)


def test_a_full_disk_leaves_the_old_files(tmp_path, monkeypatch):
    TOKENIZER.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "replace", full)
    with pytest.raises(SaveError, match="No space left"):
        TOKENIZER.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_without_the_shipped_files_one_is_trained(monkeypatch):
    monkeypatch.setattr(module, "shipped_tokenizer_folder", lambda: None)
    trained = default_tokenizer(builtin_domains(["docs", "arithmetic"]))
    assert trained.vocab_size == 4096 and trained.fingerprint() != TOKENIZER.fingerprint()


def test_the_command_line_tells_what_is_wrong(tmp_path, capsys):
    assert main(["--out", str(tmp_path), "--data", str(tmp_path / "nowhere")]) == 1
    assert "does not exist" in capsys.readouterr().err
    small_text(tmp_path)
    (tmp_path / "x.bin").write_bytes(b"\0")
    assert main(["--out", str(tmp_path / "out"), "--data", str(tmp_path), "--vocab-size", "280"]) == 0
    printed = capsys.readouterr()
    assert "280 tokens" in printed.out and "x.bin" in printed.err
