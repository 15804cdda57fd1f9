"""Fill-in-the-middle: a document told as prefix, suffix, then the middle (DeepSeek-V3 report, section 4.1).

    <|fim_begin|> prefix <|fim_hole|> suffix <|fim_end|> middle

This is the order PSM (prefix, suffix, middle). The model learns to write what stands between two texts, and
the loss stays the plain next-token loss. The cuts fall between characters, before tokenising, so that the
model also meets holes that begin inside a word.
"""

from dsv3lib.errors import InputError
from dsv3lib.training.text.tokenizer import Tokenizer


def to_psm(tokenizer: Tokenizer, text: str, first: float, second: float) -> list[int]:
    """Tokens of a document in PSM order, without BOS and EOS.

    Args:
        tokenizer: turns the three parts into tokens, each by itself.
        text: the document.
        first: one cut as a fraction of the text's length, 0 <= first < 1.
        second: the other cut; the smaller of the two comes first.

    Returns:
        Token ids with the three FIM tokens among them.
    """
    start, end = sorted(int(fraction * (len(text) + 1)) for fraction in (first, second))
    return [
        tokenizer.fim_begin_id,
        *tokenizer.encode(text[:start]),
        tokenizer.fim_hole_id,
        *tokenizer.encode(text[end:]),
        tokenizer.fim_end_id,
        *tokenizer.encode(text[start:end]),
    ]


def from_psm(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The document that ``to_psm`` told in PSM order: its inverse.

    Args:
        tokenizer: the one that made the ids.
        ids: token ids, BOS and EOS allowed around them; without FIM tokens they are a plain document.

    Returns:
        The text in its own order.

    Raises:
        InputError: the three FIM tokens are not there once each and in their order.
    """
    marks = (tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id)
    found = [(place, token) for place, token in enumerate(ids) if token in marks]
    if not found:
        return tokenizer.decode(ids)
    if tuple(token for _, token in found) != marks:
        raise InputError(
            f"FIM tokens are {[token for _, token in found]}, expected {list(marks)} once each in this "
            "order; give the tokens of one whole document"
        )
    (begin, _), (hole, _), (end, _) = found
    prefix, suffix, middle = ids[begin + 1 : hole], ids[hole + 1 : end], ids[end + 1 :]
    return tokenizer.decode(prefix) + tokenizer.decode(middle) + tokenizer.decode(suffix)
