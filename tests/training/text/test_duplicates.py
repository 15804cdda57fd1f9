"""Near-duplicates: what is found, what is left alone, and that the fast hashes are what they claim to be."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3lib.training.text.duplicates import (
    _MULTIPLIER,
    SHINGLE_BYTES,
    Seen,
    drop_near_duplicates,
    first_of_each,
    message_key,
    shingle_hashes,
    sketch,
)

VOCABULARY = ["".join(random.Random(i).choices("abcdefghij", k=2 + i % 9)) for i in range(500)]


def prose(seed: int, words: int = 600) -> list[str]:
    return random.Random(seed).choices(VOCABULARY, k=words)


def slow_hashes(text: str) -> list[int]:
    """The same polynomial, one product after the other."""
    data = " ".join(text.lower().split()).encode().ljust(SHINGLE_BYTES, b"\0")
    found = []
    for start in range(len(data) - SHINGLE_BYTES + 1):
        value = 0
        for byte in data[start : start + SHINGLE_BYTES]:
            value = (value * _MULTIPLIER + byte + 1) % 2**64
        value ^= value >> 29
        value = value * _MULTIPLIER % 2**64
        found.append(value ^ value >> 32)
    return found


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=90))
def test_doubled_hashes_equal_those_computed_byte_by_byte(text):
    assert shingle_hashes(text).tolist() == slow_hashes(text)


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=200))
def test_case_and_white_space_make_no_difference_and_no_text_is_without_a_sketch(text):
    assert sketch(text)
    assert sketch("  \n" + text.replace(" ", "\t ") + " ") == sketch(text)


def test_the_sketch_keeps_about_one_shingle_in_thirty_two():
    text = " ".join(prose(1, 20_000))
    share = len(sketch(text)) / len(np.unique(shingle_hashes(text)))
    assert share == pytest.approx(1 / 32, rel=0.15)


@given(st.integers(0, 1000))
def test_a_copy_with_a_few_words_changed_goes_and_another_text_stays(seed):
    words = prose(seed)
    near = list(words)
    for place in range(0, 600, 150):
        near[place] = "changed"
    half = words[:300] + prose(seed + 5000, 300)
    texts = {"first": words, "near": near, "half": half, "other": prose(seed + 10_000)}
    kept, account = drop_near_duplicates(texts, lambda name: " ".join(texts[name]))
    assert kept == ["first", "half", "other"]
    assert (account.documents, account.near_documents) == (4, 1)
    assert account.near_bytes == len(" ".join(near)) and 0.2 < account.share < 0.3


def test_an_extract_of_what_was_kept_goes_too_but_not_the_other_way_round():
    whole, part = " ".join(prose(3)), " ".join(prose(3)[100:400])
    seen = Seen()
    assert not seen.is_near_duplicate(whole) and seen.is_near_duplicate(part)
    seen = Seen()
    assert not seen.is_near_duplicate(part) and not seen.is_near_duplicate(whole)


def test_messages_are_the_same_up_to_case_digits_and_signs():
    assert message_key("Could not open “%s”: error 12") == message_key("could NOT open %s - error 7!")
    assert message_key("无法打开文件") != message_key("无法关闭文件")
    fresh, repeated = first_of_each(["Open 1", "open 2!", "Close", "..."], seen := {"close"})
    assert fresh == ["Open 1"] and repeated == len("open 2!") + len("Close") + len("...") + 3
    assert seen == {"close", "open"}
