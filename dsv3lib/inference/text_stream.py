"""Text from tokens as they come, where a token may end in the middle of a character."""

from __future__ import annotations

from collections.abc import Iterable

import tokenizers

REPLACEMENT = "\ufffd"  # what the decoder writes for bytes that are no character, or not yet one


class TextStream:
    """Gives each piece of text as soon as it cannot change any more.

    In UTF-8 a character takes up to four bytes, and a byte-level token may hold any part of it. A sequence
    that has begun and not ended is decoded to one U+FFFD, at the very end; it alone is held back. So the
    pieces, joined, are the text of all tokens decoded at once.

    Args:
        tokenizer: of the `tokenizers` library. Special tokens are left out.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = 0  # characters of their text that were given out

    def add(self, ids: Iterable[int]) -> str:
        """The text that these tokens complete; may be empty."""
        self._ids += ids
        text = self.tokenizer.decode(self._ids, skip_special_tokens=True)
        if text.endswith(REPLACEMENT):
            return self._give(text[:-1])
        piece = self._give(text)
        # No character is open: the last token is context enough for the next (some decoders treat the first
        # token of a text differently), and the work per token does not grow with the text.
        self._ids = self._ids[-1:]
        self._given = len(self.tokenizer.decode(self._ids, skip_special_tokens=True))
        return piece

    def finish(self) -> str:
        """What is left when no token follows: at most one broken character."""
        return self._give(self.tokenizer.decode(self._ids, skip_special_tokens=True))

    def _give(self, text: str) -> str:
        piece = text[self._given :]
        self._given = max(self._given, len(text))
        return piece
