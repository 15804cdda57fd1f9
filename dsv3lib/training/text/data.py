"""An endless stream of training batches, packed from documents, that can stop and go on at any token.

Each row of a batch comes from one domain. A domain's documents, framed by BOS and EOS, stand back to back
in one long line of tokens, and each row takes the next T of them: nothing is padded, lost or repeated, and
a document cut at the end of a row goes on in that domain's next row. Because a row holds exactly T tokens
of one domain, the mixture weights hold in tokens, to within one row at any moment.

Nothing is drawn from a generator that moves along. Which document comes next, whether it is told in FIM
order and where it is cut all follow from the seed and the document's place. So the whole state is a few
numbers for each domain, and what is half read is read and tokenised again on resuming.

Differs from the paper: the domains are balanced by row, not by document, so that a long document of one
domain does not fill whole batches of a small run.
"""

import copy
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from dsv3lib.errors import DataError
from dsv3lib.training.text.domains import DEFAULT_WEIGHTS, Document, Domain
from dsv3lib.training.text.fim import to_psm
from dsv3lib.training.text.order import DEFAULT_VALIDATION_SHARE, DocumentOrder, Split, derive_seed
from dsv3lib.training.text.tokenizer import Tokenizer

IGNORED_LABEL = -100  # Hugging Face's value for "no target here"
DEFAULT_FIM_RATE = 0.1  # section 4.1
DEFAULT_BATCH_SIZE = 8
_STATE_VERSION = 1
# One long file must not fill a whole validation set.
_VALIDATION_ROWS_PER_DOCUMENT = 4


@dataclass(frozen=True)
class Batch:
    """Token ids of B rows of T tokens, with what each token belongs to.

    ``labels`` equals ``input_ids`` where there is a target and -100 on padding; the model shifts them.
    ``document_ids`` is one number for each document, never falling along a row: where it changes there is a
    border. ``domain_ids`` is the place of the token's domain in the stream's ``domain_names``.
    """

    input_ids: Int64[Tensor, "B T"]
    labels: Int64[Tensor, "B T"]
    document_ids: Int64[Tensor, "B T"]
    domain_ids: Int64[Tensor, "B T"]


@dataclass
class _Cursor:
    """How far one domain has been read; copied shallowly to undo a batch that was interrupted."""

    epoch: int = 0
    position: int = 0  # place in the epoch's order of the document being read, or of the next one
    offset: int = 0  # tokens of that document already given out
    document_id: int = -1
    rows: int = 0
    tokens: np.ndarray | None = None  # the document being read, None between two documents


class PackedStream:
    """Endless, streaming, resumable batches from weighted domains.

    Args:
        domains: where the text comes from; names must differ.
        tokenizer: turns it into ids.
        seq_len: T, tokens in a row, at least 2.
        batch_size: B of ``next(stream)``; ``next_batch`` takes any.
        weights: domain name -> share of the training tokens (any scale; names left out get none). By default
            ``DEFAULT_WEIGHTS`` for built-in domains, else shares by size in bytes.
        seed: the one seed of order and FIM.
        fim_rate: share of the documents told in FIM order, 0 to 1.
        validation_share: share of the documents kept for validation, 0 <= share < 1.

    Raises:
        DataError: an argument is out of range, or a domain has no text.
    """

    def __init__(
        self,
        domains: Sequence[Domain],
        tokenizer: Tokenizer,
        seq_len: int,
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        weights: Mapping[str, float] | None = None,
        seed: int = 0,
        fim_rate: float = DEFAULT_FIM_RATE,
        validation_share: float = DEFAULT_VALIDATION_SHARE,
    ) -> None:
        self.domain_names = [domain.name for domain in domains]
        if not domains or len(set(self.domain_names)) != len(domains):
            raise DataError(
                f"domains are {self.domain_names}; at least one is needed and their names must differ"
            )
        _at_least("seq_len", seq_len, 2)
        _at_least("batch_size", batch_size, 1)
        if not 0.0 <= fim_rate <= 1.0:
            raise DataError(
                f"fim_rate is {fim_rate}; it must be between 0 and 1 (the paper's is {DEFAULT_FIM_RATE})"
            )
        self.domains, self.tokenizer = list(domains), tokenizer
        self.seq_len, self.batch_size, self.seed, self.fim_rate = seq_len, batch_size, seed, fim_rate
        self.validation_share = validation_share
        self.weights = _normalised(self.domains, weights)
        self.splits = [Split(domain, validation_share) for domain in self.domains]
        self._orders = [
            DocumentOrder(domain, split, "train", seed)
            for domain, split in zip(self.domains, self.splits, strict=True)
        ]
        self._cursors = [_Cursor() for _ in self.domains]
        self._documents = 0  # documents begun so far, over all domains

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self.next_batch(self.batch_size)

    def next_batch(self, batch_size: int) -> Batch:
        """The next ``batch_size`` rows; the rows do not depend on how they are grouped into batches.

        If it fails or is interrupted, the stream stands where it stood before.

        Args:
            batch_size: B, rows wanted, at least 1.

        Returns:
            A ``Batch`` of shape [B, T], int64.

        Raises:
            DataError: ``batch_size`` is below 1, or a file can no longer be read.
        """
        _at_least("batch_size", batch_size, 1)
        shape = (batch_size, self.seq_len)
        ids, documents, domains = (np.empty(shape, dtype=np.int64) for _ in range(3))
        before = [copy.copy(cursor) for cursor in self._cursors], self._documents
        try:
            for row in range(batch_size):
                which = self._next_domain()
                domains[row] = which
                self._fill_row(which, ids[row], documents[row])
        except BaseException:  # Ctrl-C too: a checkpoint written now must not skip the rows that were lost
            self._cursors, self._documents = before
            raise
        input_ids = torch.from_numpy(ids)
        return Batch(input_ids, input_ids.clone(), torch.from_numpy(documents), torch.from_numpy(domains))

    def _next_domain(self) -> int:
        """The domain that is furthest behind its share of the rows."""
        total = 1 + sum(cursor.rows for cursor in self._cursors)
        behind = [
            weight * total - cursor.rows for weight, cursor in zip(self.weights, self._cursors, strict=True)
        ]
        return max(
            (which for which, weight in enumerate(self.weights) if weight > 0.0), key=behind.__getitem__
        )

    def _fill_row(self, which: int, ids: np.ndarray, documents: np.ndarray) -> None:
        cursor, filled = self._cursors[which], 0
        while filled < self.seq_len:
            if cursor.tokens is None:
                self._open_next(which)
            taken = min(self.seq_len - filled, len(cursor.tokens) - cursor.offset)
            ids[filled : filled + taken] = cursor.tokens[cursor.offset : cursor.offset + taken]
            documents[filled : filled + taken] = cursor.document_id
            cursor.offset += taken
            filled += taken
            if cursor.offset == len(cursor.tokens):
                cursor.tokens, cursor.offset, cursor.position = None, 0, cursor.position + 1
        cursor.rows += 1

    def _open_next(self, which: int) -> None:
        """Read the next document that is not blank."""
        cursor, first_epoch = self._cursors[which], self._cursors[which].epoch
        while cursor.epoch <= first_epoch + 1:
            cursor.epoch, cursor.position, index = self._orders[which].next_place(
                cursor.epoch, cursor.position
            )
            document = self.domains[which].read(index)
            if document.text.strip():
                cursor.tokens = self._framed(document, cursor.epoch)
                cursor.document_id, self._documents = self._documents, self._documents + 1
                return
            cursor.position += 1
        raise DataError(
            f"domain {self.domain_names[which]!r}: all training documents are blank; give it some text"
        )

    def _framed(self, document: Document, epoch: int) -> np.ndarray:
        """BOS, the document in its own or in FIM order, EOS."""
        draws = [
            derive_seed(self.seed, "fim", document.domain, document.name, epoch, i) / 2**64 for i in range(3)
        ]
        if draws[0] < self.fim_rate:
            body = to_psm(self.tokenizer, document.text, draws[1], draws[2])
        else:
            body = self.tokenizer.encode(document.text)
        return np.array([self.tokenizer.bos_id, *body, self.tokenizer.eos_id], dtype=np.int64)

    def reweigh(self, weights: Mapping[str, float]) -> None:
        """Change the shares of the domains, before the first row.

        Raises:
            DataError: rows were given out already, or the shares are out of range.
        """
        if any(cursor.rows for cursor in self._cursors):
            raise DataError("weights: the stream has begun; make a new one for another mixture")
        self.weights = _normalised(self.domains, weights)

    def passes(self) -> dict[str, float]:
        """How often each finite domain has been read: 1.0 when every training document came once."""
        return {
            domain.name: cursor.epoch + cursor.position / domain.count
            for domain, cursor in zip(self.domains, self._cursors, strict=True)
            if domain.count is not None
        }

    def state_dict(self) -> dict:
        """Where the stream stands, in a small dictionary that JSON can hold."""
        cursors = {}
        for name, cursor in zip(self.domain_names, self._cursors, strict=True):
            cursors[name] = {
                "epoch": cursor.epoch,
                "position": cursor.position,
                "offset": cursor.offset,
                "document_id": cursor.document_id,
                "rows": cursor.rows,
                "checksum": None if cursor.tokens is None else zlib.crc32(cursor.tokens.tobytes()),
            }
        return {
            "version": _STATE_VERSION,
            "settings": self._settings(),
            "documents": self._documents,
            "cursors": cursors,
        }

    def load_state_dict(self, state: Mapping) -> None:
        """Go on exactly where ``state_dict`` was taken; on an error the stream stays as it was.

        Args:
            state: what ``state_dict`` returned.

        Raises:
            DataError: the state is of another stream, or the text has changed since.
        """
        if state.get("version") != _STATE_VERSION:
            raise DataError(
                f"stream state has version {state.get('version')!r}, expected {_STATE_VERSION}; "
                "start a new run"
            )
        for field, ours in self._settings().items():
            theirs = state["settings"].get(field)
            if theirs != ours:
                raise DataError(
                    f"stream state was taken with {field}={theirs!r}, but now {field}={ours!r}; to go on "
                    "exactly, restore the old text and settings, else start a new run"
                )
        cursors = []
        for which, name in enumerate(self.domain_names):
            saved = dict(state["cursors"][name])
            checksum = saved.pop("checksum")
            cursor = _Cursor(**saved)
            if checksum is not None:
                _, _, index = self._orders[which].next_place(cursor.epoch, cursor.position)
                cursor.tokens = self._framed(self.domains[which].read(index), cursor.epoch)
                if zlib.crc32(cursor.tokens.tobytes()) != checksum:
                    raise DataError(
                        f"document {self.domains[which].document_name(index)!r} of domain {name!r} has "
                        "changed since the state was taken; restore it, or start a new run"
                    )
            cursors.append(cursor)
        self._cursors, self._documents = cursors, int(state["documents"])

    def _settings(self) -> dict:
        return {
            "seq_len": self.seq_len,
            "seed": self.seed,
            "fim_rate": self.fim_rate,
            "validation_share": self.validation_share,
            "weights": list(self.weights),
            "tokenizer": self.tokenizer.fingerprint(),
            "domains": {domain.name: domain.fingerprint() for domain in self.domains},
        }

    def validation_batches(
        self, domain: str, n_batches: int, batch_size: int, seq_len: int | None = None
    ) -> list[Batch]:
        """A fixed set of rows from one domain's validation documents, the same for every seed.

        No document comes twice, none is told in FIM order, and at most the first four rows of each are
        taken. Where the text ends early there are fewer batches, and the last row is padded.

        Args:
            domain: its name.
            n_batches: most batches wanted.
            batch_size: B, rows in each; the last batch may have fewer.
            seq_len: T, by default the stream's.

        Returns:
            At most ``n_batches`` batches; none if the domain has no validation document.

        Raises:
            DataError: the domain is unknown or a number is out of range.
        """
        seq_len = self.seq_len if seq_len is None else seq_len
        for field, value, least in (
            ("n_batches", n_batches, 1),
            ("batch_size", batch_size, 1),
            ("seq_len", seq_len, 2),
        ):
            _at_least(field, value, least)
        if domain not in self.domain_names:
            raise DataError(f"unknown domain {domain!r}; this stream has {', '.join(self.domain_names)}")
        which = self.domain_names.index(domain)
        if not self.splits[which].has_validation():
            return []
        order = DocumentOrder(self.domains[which], self.splits[which], "validation", seed=0)
        wanted, ids, documents = n_batches * batch_size * seq_len, [], []
        for number, index in enumerate(order.epoch(0)):
            text = self.domains[which].read(index).text
            tokens = self.tokenizer.encode(text, bos=True, eos=True)[
                : _VALIDATION_ROWS_PER_DOCUMENT * seq_len
            ]
            ids += tokens
            documents += [number] * len(tokens)
            if len(ids) >= wanted:
                break
        rows = min(n_batches * batch_size, -(-len(ids) // seq_len))
        padding = max(0, rows * seq_len - len(ids))
        pads, past_the_end = [self.tokenizer.pad_id] * padding, [documents[-1] + 1] * padding
        input_ids = torch.tensor((ids + pads)[: rows * seq_len]).view(rows, seq_len)
        document_ids = torch.tensor((documents + past_the_end)[: rows * seq_len]).view(rows, seq_len)
        labels = input_ids.masked_fill(input_ids == self.tokenizer.pad_id, IGNORED_LABEL)
        return [
            Batch(*part, torch.full_like(part[0], which))
            for part in zip(*(t.split(batch_size) for t in (input_ids, labels, document_ids)), strict=True)
        ]


def _at_least(field: str, value: int, least: int) -> None:
    if value < least:
        raise DataError(f"{field} is {value}; it must be at least {least}")


def _normalised(domains: Sequence[Domain], weights: Mapping[str, float] | None) -> list[float]:
    """Shares in the order of ``domains``, summing to 1."""
    names = [domain.name for domain in domains]
    if weights is None:
        if all(name in DEFAULT_WEIGHTS for name in names):
            weights = DEFAULT_WEIGHTS
        else:  # by size; an endless domain counts as an average one
            sizes = [domain.size_bytes for domain in domains if domain.size_bytes]
            average = sum(sizes) / len(sizes) if sizes else 1.0
            weights = {domain.name: domain.size_bytes or average for domain in domains}
    elif unknown := set(weights) - set(names):
        raise DataError(f"weights name {sorted(unknown)}, but the domains are {names}")
    values = [float(weights.get(name, 0.0)) for name in names]
    if any(not math.isfinite(value) or value < 0.0 for value in values) or sum(values) <= 0.0:
        raise DataError(
            f"weights are {dict(zip(names, values, strict=True))}; each must be finite and at least 0, "
            "and one above 0"
        )
    return [value / sum(values) for value in values]
