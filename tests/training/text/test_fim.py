"""Fill-in-the-middle: the order is PSM, and the document comes back whole from any two cuts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3lib.errors import InputError
from dsv3lib.training.text.fim import from_psm, to_psm
from dsv3lib.training.text.tokenizer import default_tokenizer

TOKENIZER = default_tokenizer()
fractions = st.floats(0.0, 1.0, exclude_max=True)


@given(text=st.text(max_size=200), first=fractions, second=fractions)
def test_psm_is_inverted(text, first, second):
    ids = to_psm(TOKENIZER, text, first, second)
    assert from_psm(TOKENIZER, ids) == text
    assert from_psm(TOKENIZER, [TOKENIZER.bos_id, *ids, TOKENIZER.eos_id]) == text


def test_the_order_is_prefix_suffix_middle():
    ids = to_psm(TOKENIZER, "abcdefghij", 0.25, 0.65)
    assert TOKENIZER.decode(ids, skip_special=False) == "<|fim_begin|>ab<|fim_hole|>hij<|fim_end|>cdefg"
    assert ids == to_psm(TOKENIZER, "abcdefghij", 0.65, 0.25)


def test_text_that_quotes_the_marks_is_no_mark():
    text = "see <|fim_hole|> and <|fim_end|>"
    assert from_psm(TOKENIZER, to_psm(TOKENIZER, text, 0.1, 0.5)) == text


def test_a_plain_document_and_a_broken_one():
    assert from_psm(TOKENIZER, TOKENIZER.encode("plain", bos=True, eos=True)) == "plain"
    with pytest.raises(InputError, match="FIM tokens"):
        from_psm(TOKENIZER, to_psm(TOKENIZER, "abc", 0.2, 0.5)[1:])
