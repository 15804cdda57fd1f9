"""Anybody's own text: read whole and once, in little memory; binary, broken and empty files do no harm."""

import os
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3lib.errors import DataError
from dsv3lib.training.text.folder import PIECE_BYTES, folder_domains, open_domains


def write(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def whole(domain) -> str:
    return "".join(domain.read(index).text for index in range(domain.count))


def test_sub_folders_become_domains_and_binaries_are_noted(tmp_path):
    write(
        tmp_path,
        {
            "poems/a.txt": "roses\n",
            "poems/deep/er/b.md": "violets\n",
            "code/x.py": "print(1)\n",
            "top.rst": "top\n",
            "code/lib.so": b"\x7fELF\0\0",
            "latin.txt": "café".encode("latin-1") * 3,
            "empty.txt": "",
            ".hidden/c.txt": "no",
            "poems/utf16.txt": "text".encode("utf-16"),
        },
    )
    domains, notes = folder_domains(tmp_path)
    assert {d.name: whole(d) for d in domains} == {
        "poems": "roses\nviolets\n",
        "code": "print(1)\n",
        tmp_path.name: "top\n",
    }
    assert [d.name for d in domains] == sorted(d.name for d in domains)
    text = "\n".join(notes)
    assert "2 files, binary: code/lib.so, poems/utf16.txt" in text
    assert "not UTF-8: latin.txt" in text and "empty: empty.txt" in text
    assert domains[0].fingerprint() == folder_domains(tmp_path)[0][0].fingerprint()


def test_a_single_file_is_taken_too(tmp_path):
    write(tmp_path, {"book.txt": "once\n", "other.txt": "upon\n"})
    (domain,), notes = folder_domains(tmp_path / "book.txt")
    assert domain.name == "book.txt" and whole(domain) == "once\n" and notes == []


@pytest.mark.parametrize(
    "files, why",
    [
        ({}, "it is empty"),
        ({"a.bin": b"\0\1", "b.txt": ""}, "binary: a.bin; skipped 1 file, empty: b.txt"),
        ({"blank.txt": " \n\n"}, "empty: blank.txt"),
    ],
)
def test_a_folder_without_text_says_what_to_do(tmp_path, files, why):
    with pytest.raises(DataError, match=f"no text to learn from: .*{why}.*UTF-8 text files"):
        folder_domains(write(tmp_path, files))


def test_a_missing_folder_says_so(tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist"):
        open_domains(tmp_path / "nowhere")


def test_open_domains_chooses(tmp_path):
    assert [d.name for d in open_domains(write(tmp_path, {"a/b.txt": "c"}))[0]] == ["a"]
    assert [d.name for d in open_domains(without=["code", "docs"])[0]] == [
        "chinese",
        "german",
        "french",
        "spanish",
        "arithmetic",
    ]


@given(
    lines=st.lists(
        st.sampled_from(["", "kurz", "ü" * 70, "一行" * 2000, "x" * 40_000, "🙂" * 21_001]), max_size=12
    ),
    end=st.sampled_from(["", "\n"]),
)
def test_pieces_put_together_are_the_file(tmp_path_factory, lines, end):
    content = "start\n" + "\n".join(lines) + end
    (domain,), _ = folder_domains(write(tmp_path_factory.mktemp("data"), {"a.txt": content}))
    pieces = [domain.read(index).text for index in range(domain.count)]
    assert "".join(pieces) == content
    assert all(len(piece.encode()) <= PIECE_BYTES + 8 * 1024 + 4 for piece in pieces)
    names = {domain.document_name(index) for index in range(domain.count)}
    assert len(names) == domain.count


def test_pieces_are_cut_at_line_ends_where_there_are_any(tmp_path):
    content = "".join(f"line {i}\n" for i in range(30_000))
    (domain,), _ = folder_domains(write(tmp_path, {"a.txt": content}))
    assert domain.count > 3
    assert all(domain.read(index).text.endswith("\n") for index in range(domain.count))


def test_a_huge_line_is_cut_between_characters(tmp_path):
    content = "ab" + "語" * 400_000
    (domain,), _ = folder_domains(write(tmp_path, {"line.txt": content}))
    assert domain.count > 10 and whole(domain) == content


def test_truncated_and_wrong_utf8(tmp_path):
    write(
        tmp_path,
        {
            "cut.txt": "naïve 日本".encode()[:-1],
            "wrong.txt": b"a" * 9000 + b"\xff\xfe" + b"b" * 10,
            "bom.txt": b"\xef\xbb\xbfhello",
        },
    )
    (domain,), _ = folder_domains(tmp_path)
    texts = {domain.document_name(i): domain.read(i).text for i in range(domain.count)}
    assert texts == {
        "bom.txt": "hello",
        "cut.txt": "naïve 日",
        "wrong.txt": "a" * 9000 + "\ufffd\ufffd" + "b" * 10,
    }


def test_a_folder_larger_than_the_bound_is_streamed(tmp_path):
    bound, megabyte = 2 * 2**20, ("all work and no play\n" * 50_000)[: 2**20]
    write(tmp_path, {f"{i % 3}/{i}.txt": megabyte * (6 if i == 0 else 1) for i in range(12)})
    tracemalloc.start()
    try:
        domains, _ = folder_domains(tmp_path)
        total = sum(len(d.read(index).text) for d in domains for index in range(d.count))
        peak = tracemalloc.get_traced_memory()[1]
        kept = [d.read(index).text for d in domains for index in range(min(d.count, 40))]
        reader_that_keeps = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 17 * 2**20 and kept
    assert peak < bound < reader_that_keeps  # the bound would catch one that holds its texts


@pytest.mark.skipif(
    not hasattr(os, "mkfifo"), reason="Windows has no named pipes, so there is nothing to wait on"
)
def test_a_pipe_does_not_hang(tmp_path):
    write(tmp_path, {"a.txt": "text"})
    os.mkfifo(tmp_path / "pipe.txt")
    (domain,), notes = folder_domains(tmp_path)
    assert whole(domain) == "text" and notes == ["skipped 1 file, not a regular file: pipe.txt"]


def test_a_loop_of_links_and_a_dangling_one_do_no_harm(tmp_path):
    write(tmp_path, {"a.txt": "text"})
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (domain,), notes = folder_domains(tmp_path)
    assert whole(domain) == "text" and "unreadable" in notes[0] and "gone.txt" in notes[0]


def test_files_that_vanish_or_shrink_during_a_run_are_named(tmp_path):
    (domain,), _ = folder_domains(write(tmp_path, {"a.txt": "long enough", "b.txt": "text"}))
    (tmp_path / "a.txt").write_text("short")
    (tmp_path / "b.txt").unlink()
    with pytest.raises(DataError, match="a.txt: has shrunk"):
        domain.read(0)
    with pytest.raises(DataError, match="b.txt: cannot be read any more"):
        domain.read(1)


def test_hundreds_of_sub_folders_are_one_domain(tmp_path):
    write(tmp_path, {f"{i}/a.txt": f"{i}\n" for i in range(40)})
    domains, notes = folder_domains(tmp_path)
    assert len(domains) == 1 and domains[0].count == 40 and "40 sub-folders" in notes[0]
