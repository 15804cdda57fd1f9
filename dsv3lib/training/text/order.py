"""In which order documents are read, and which of them are for validation.

Both are functions of numbers, not lists: a document's side follows from a hash of its name, and the
shuffled order of an epoch is a keyed permutation that is computed place by place. So a folder of millions
of pieces costs no memory, and a run is resumed at any document by its place alone.
"""

import hashlib
from collections.abc import Iterator
from typing import Literal

from dsv3lib.errors import DataError
from dsv3lib.training.text.domains import Domain

DEFAULT_VALIDATION_SHARE = 0.1
_FEISTEL_ROUNDS = 4

Part = Literal["train", "validation"]


def derive_seed(seed: int, *labels: str | int) -> int:
    """A 64-bit number that depends on the seed and on every label: one seed serves the whole stream."""
    text = "/".join(map(str, (seed, *labels)))
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest())


def permuted(position: int, count: int, key: int) -> int:
    """Place ``position`` of the permutation of 0 … count-1 that ``key`` names, in constant memory.

    A Feistel network permutes the next power of four; what falls outside [0, count) is permuted again until
    it falls inside (cycle walking), which keeps it a permutation and takes fewer than four rounds on
    average.

    Args:
        position: 0 <= position < count.
        count: how many there are.
        key: 64-bit number, one permutation each.

    Returns:
        A number in [0, count), another one for every position.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    value = position
    while True:
        left, right = value >> half, value & mask
        for turn in range(_FEISTEL_ROUNDS):
            block = b"%d/%d/%d" % (key, turn, right)
            mixed = int.from_bytes(hashlib.blake2b(block, digest_size=8).digest())
            left, right = right, left ^ (mixed & mask)
        value = left << half | right
        if value < count:
            return value


def name_fraction(name: str) -> float:
    """Stable hash of a document's name, as a number in [0, 1)."""
    # 53 bits: what a float holds exactly, so that the result stays below 1.
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) / 2**53


class Split:
    """Which documents of one domain are for training and which for validation.

    A document is for validation where ``name_fraction(name) < share``. Two exceptions keep a small domain
    usable: with no training document by that rule, the one with the largest fraction trains; with no
    validation document and at least two in all, the one with the smallest fraction validates. A domain of
    one document only trains.

    Args:
        domain: the documents.
        share: share of documents for validation, 0 <= share < 1; 0 means none.

    Raises:
        DataError: ``share`` is out of range.
    """

    def __init__(self, domain: Domain, share: float = DEFAULT_VALIDATION_SHARE) -> None:
        if not 0.0 <= share < 1.0:
            raise DataError(f"validation share is {share}; it must be at least 0 and below 1")
        self.domain, self.share = domain, share
        self._always: dict[int, Part] = {}
        if domain.count is None or share == 0.0:
            return
        lowest, highest, sides = (2.0, -1), (-1.0, -1), set()
        for index in range(domain.count):
            fraction = name_fraction(domain.document_name(index))
            sides.add(fraction < share)
            if len(sides) == 2:
                return
            lowest, highest = min(lowest, (fraction, index)), max(highest, (fraction, index))
        if True in sides:  # all would validate
            self._always[highest[1]] = "train"
        elif domain.count >= 2:
            self._always[lowest[1]] = "validation"

    def part(self, index: int) -> Part:
        """Side of document ``index``."""
        forced = self._always.get(index)
        if forced is not None:
            return forced
        return "validation" if name_fraction(self.domain.document_name(index)) < self.share else "train"

    def has_validation(self) -> bool:
        """Whether there is any validation document."""
        if self.domain.count is None:
            return self.share > 0.0
        return self.share > 0.0 and self.domain.count >= 2


class DocumentOrder:
    """The documents of one side of a domain, shuffled anew for each epoch where the domain is finite.

    An endless domain has one epoch, in its own order.

    Args:
        domain: the documents.
        split: which are for training and which for validation.
        part: the side wanted.
        seed: of the shuffle.
    """

    def __init__(self, domain: Domain, split: Split, part: Part, seed: int) -> None:
        self.domain, self.split, self.part, self.seed = domain, split, part, seed

    def next_place(self, epoch: int, position: int) -> tuple[int, int, int]:
        """First document of this side at or after a place.

        Args:
            epoch: 0 for the first pass.
            position: place in that epoch's order, counted over both sides.

        Returns:
            (epoch, position, index): the place found, and the number of the document there.

        Raises:
            DataError: the domain has no document on this side.
        """
        count = self.domain.count
        tried = 0
        # What is left of this epoch may hold none, and the next one its first at its very end.
        while count is None or tried < 2 * count:
            if count is not None and position >= count:
                epoch, position = epoch + 1, 0
            index = position if count is None else permuted(position, count, self._key(epoch))
            if self.split.part(index) == self.part:
                return epoch, position, index
            position, tried = position + 1, tried + 1
        raise DataError(
            f"domain {self.domain.name!r} has no document for {self.part}; "
            "give more documents or another validation share"
        )

    def epoch(self, epoch: int) -> Iterator[int]:
        """Numbers of all documents of this side in one epoch's order."""
        position = 0
        while True:
            found, position, index = self.next_place(epoch, position)
            if found != epoch:
                return
            yield index
            position += 1

    def _key(self, epoch: int) -> int:
        return derive_seed(self.seed, "order", self.domain.name, epoch)
