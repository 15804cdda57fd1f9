"""Near-duplicate removal: MinHash-style sketches of byte shingles, and containment in what was kept before.

Text is compared by its shingles, all runs of 32 bytes, after lower-casing and joining white space. Of their
hashes only those that 32 divides are kept (a *modulo sketch*, or FracMinHash): the choice depends on nothing but
the shingle, so the share of a document's sketch that was seen before estimates the share of its text that was.
A document with 80 % or more seen before is dropped. One pass, in numpy, about 20 MB a second.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

SHINGLE_BYTES = 32  # a power of two: hashes are doubled up to it
SKETCH_ONE_IN = 32
NEAR_DUPLICATE = 0.8
_MULTIPLIER = 0x9E3779B97F4A7C15  # odd; 2^64 over the golden ratio
_MASK = (1 << 64) - 1
_NOT_LETTERS = re.compile(r"[\W\d_]+")


@dataclass(frozen=True)
class Redundancy:
    """How much of a domain was there twice.

    Args:
        documents, bytes: what was found. near_documents, near_bytes: dropped as near-duplicates.
        repeated_bytes: messages and paragraphs dropped within the documents that stayed.
    """

    documents: int
    bytes: int
    near_documents: int
    near_bytes: int
    repeated_bytes: int = 0

    @property
    def share(self) -> float:
        """Share of the bytes found that was dropped, 0 to 1."""
        return (self.near_bytes + self.repeated_bytes) / max(self.bytes, 1)


def shingle_hashes(text: str) -> np.ndarray:
    """64-bit hash of every run of ``SHINGLE_BYTES`` bytes of the normalised text, [n], uint64.

    h_{2w}(i) = h_w(i)·m^w + h_w(i + w): five doublings instead of 32 products. A shorter text has one.
    """
    data = " ".join(text.lower().split()).encode("utf-8", "replace").ljust(SHINGLE_BYTES, b"\0")
    hashes, width, power = np.frombuffer(data, dtype=np.uint8).astype(np.uint64) + 1, 1, _MULTIPLIER
    while width < SHINGLE_BYTES:
        hashes = hashes[:-width] * np.uint64(power) + hashes[width:]
        width, power = 2 * width, power * power & _MASK
    # The low bits of a product depend on low bits alone: mix the high ones in before anything is chosen by them.
    hashes ^= hashes >> np.uint64(29)
    hashes *= np.uint64(_MULTIPLIER)
    return hashes ^ (hashes >> np.uint64(32))


def sketch(text: str) -> list[int]:
    """The shingles of a text that stand for it: those whose hash ``SKETCH_ONE_IN`` divides, each once.

    A text with none is stood for by its smallest hash, so that nothing is without a sketch.
    """
    hashes = shingle_hashes(text)
    chosen = np.unique(hashes[hashes % np.uint64(SKETCH_ONE_IN) == 0])
    return (chosen if len(chosen) else hashes.min(keepdims=True)).tolist()


class Seen:
    """Remembers the sketches of what was kept, and says of each next text how much of it is new."""

    def __init__(self) -> None:
        self._hashes: set[int] = set()

    def is_near_duplicate(self, text: str) -> bool:
        """Whether ``NEAR_DUPLICATE`` of the text was seen before; if not, it counts as seen from now on."""
        hashes = sketch(text)
        known = sum(h in self._hashes for h in hashes)
        if known >= NEAR_DUPLICATE * len(hashes):
            return True
        self._hashes.update(hashes)
        return False


def drop_near_duplicates(
    names: Iterable[str], read: Callable[[str], str], repeated_bytes: int = 0
) -> tuple[list[str], Redundancy]:
    """Which documents stay: those of which less than ``NEAR_DUPLICATE`` stands in the documents before them.

    Args:
        names: of the documents, in the order in which the first of two alike stays.
        read: a document's text by its name.
        repeated_bytes: what was dropped inside the documents before, for the account.

    Returns:
        The names that stay, in their order, and how much was dropped.
    """
    seen, kept, total, documents, dropped = Seen(), [], repeated_bytes, 0, []
    for name in names:
        text = read(name)
        size = len(text.encode("utf-8", "replace"))
        documents, total = documents + 1, total + size
        if seen.is_near_duplicate(text):
            dropped.append(size)
        else:
            kept.append(name)
    return kept, Redundancy(documents, total, len(dropped), sum(dropped), repeated_bytes)


def message_key(text: str) -> str:
    """What two short messages share that differ only in case, digits, punctuation and placeholders' signs."""
    return _NOT_LETTERS.sub(" ", text.casefold()).strip()


def first_of_each(messages: Iterable[str], seen: set[str]) -> tuple[list[str], int]:
    """Messages (or paragraphs) whose ``message_key`` was not seen before, and the bytes of the others.

    Args:
        messages: in their order. seen: keys met so far; grows.
    """
    fresh, repeated = [], 0
    for message in messages:
        key = message_key(message)
        if not key or key in seen:
            repeated += len(message.encode("utf-8", "replace")) + 1
        else:
            seen.add(key)
            fresh.append(message)
    return fresh, repeated
