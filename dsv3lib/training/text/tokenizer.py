"""A small byte-level BPE tokenizer, trained on the course's text (DeepSeek-V3 report, section 4.1).

Text is cut into short runs first (digits by one to three, Han and Kana apart, words with the space before
them, punctuation with the line break after it); byte-pair merges never cross these cuts. The base alphabet
is the 256 bytes, so any text can be written and comes back unchanged.

Differs from the paper: a vocabulary of 4,096 instead of 128K, and tokens that join punctuation with a line
break are not split at random during training.

Run as a program it trains and saves one: ``python -m dsv3lib.training.text.tokenizer --out data/tokenizer``.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

import dsv3lib
from dsv3lib.errors import DataError, InputError, SaveError
from dsv3lib.files import write_whole
from dsv3lib.shipped import checkpoint_folder, tokenizer_fingerprint
from dsv3lib.training.text.domains import DEFAULT_WEIGHTS, Domain, builtin_domains
from dsv3lib.training.text.folder import open_domains
from dsv3lib.training.text.order import DocumentOrder, Split

BOS, EOS, PAD = "<|begin_of_sentence|>", "<|end_of_sentence|>", "<|pad|>"
FIM_BEGIN, FIM_HOLE, FIM_END = "<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"
SPECIAL_TOKENS = (BOS, EOS, PAD, FIM_BEGIN, FIM_HOLE, FIM_END)  # a token's place here is its id
DEFAULT_VOCAB_SIZE = 4096
DEFAULT_SAMPLE_BYTES = 3_000_000
# A small domain may fill its share of the sample by repetition, but only so often: more would spend the
# vocabulary on whole sentences of it.
_MAX_REPEATS = 4

# Digits in groups of one to three, as in DeepSeek-V3, so that no number is one token by accident.
_NUMBERS = r"\p{N}{1,3}"
_HAN_AND_KANA = r"[\p{Han}\p{Hiragana}\p{Katakana}]+"
_RUNS = (
    r" ?[\p{L}\p{M}]+"  # a word, with the space before it
    r"| ?[\p{P}\p{S}]+[\r\n]*"  # punctuation, with the line break after it
    r"|\s*[\r\n]+"  # blank lines
    r"|\s+(?!\S)|\s+"
)  # indentation, leaving one space to the word that follows


class Tokenizer:
    """Byte-level BPE with the six special tokens of training; text never turns into a special token.

    Args:
        backend: a tokenizer of the ``tokenizers`` library whose first ids are ``SPECIAL_TOKENS``.

    Raises:
        DataError: the special tokens are missing or have other ids.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        found = [backend.token_to_id(token) for token in SPECIAL_TOKENS]
        if found != list(range(len(SPECIAL_TOKENS))):
            raise DataError(
                f"tokenizer: special tokens {SPECIAL_TOKENS} have ids {found}, expected 0 to "
                f"{len(SPECIAL_TOKENS) - 1}; train one with `python -m dsv3lib.training.text.tokenizer`"
            )
        # A document that quotes "<|end_of_sentence|>" must not end there: such text is encoded as plain
        # bytes.
        backend.encode_special_tokens = True
        self.backend = backend
        self.bos_id, self.eos_id, self.pad_id, self.fim_begin_id, self.fim_hole_id, self.fim_end_id = found

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Turn text into token ids.

        Args:
            text: any Unicode text.
            bos: put ``<|begin_of_sentence|>`` first.
            eos: put ``<|end_of_sentence|>`` last.

        Returns:
            Token ids, each in [0, vocab_size).

        Raises:
            InputError: the text holds a lone surrogate, which no byte sequence of UTF-8 stands for.
        """
        try:
            ids = self.backend.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError) as error:
            raise InputError(_why_not_text(text)) from error
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Turn token ids back into text; bytes that are no whole character become U+FFFD.

        Args:
            ids: token ids, each in [0, vocab_size).
            skip_special: leave the special tokens out.

        Returns:
            The text.

        Raises:
            InputError: an id is out of range.
        """
        ids, size = [int(i) for i in ids], self.vocab_size
        for position, token in enumerate(ids):
            if not 0 <= token < size:
                raise InputError(
                    f"token id {token} at position {position} is not in [0, {size}); "
                    "were the ids made with another tokenizer?"
                )
        return self.backend.decode(ids, skip_special_tokens=skip_special)

    def fingerprint(self) -> str:
        """Short hash of the vocabulary and merges."""
        return tokenizer_fingerprint(self.backend.to_str())

    def save(self, folder: str | os.PathLike) -> None:
        """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json, each by renaming.

        Args:
            folder: made if missing.

        Raises:
            SaveError: the folder cannot be written.
        """
        names = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **names,
            "add_bos_token": True,
            "add_eos_token": False,
            "additional_special_tokens": [FIM_BEGIN, FIM_HOLE, FIM_END],
            "clean_up_tokenization_spaces": False,
            "model_max_length": 163840,
        }
        special = {**names, "additional_special_tokens": [FIM_BEGIN, FIM_HOLE, FIM_END]}
        for name, text in (
            ("tokenizer.json", self.backend.to_str(pretty=True)),
            ("tokenizer_config.json", json.dumps(config, indent=2)),
            ("special_tokens_map.json", json.dumps(special, indent=2)),
        ):
            write_whole(Path(folder) / name, text + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> "Tokenizer":
        """Read a tokenizer from the folder that ``save`` wrote, or a shipped checkpoint's by its name ("tiny-v3").

        A model's checkpoint folder holds one too.

        Raises:
            DataError: there is no ``tokenizer.json``, or it cannot be read. CheckpointError: see
            ``shipped.checkpoint_folder``.
        """
        folder = checkpoint_folder(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise DataError(
                f"{path} does not exist; train one with `python -m dsv3lib.training.text.tokenizer --out {folder}`"
            )
        try:
            return cls(tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")))
        except DataError:
            raise
        except Exception as error:  # the library raises a bare Exception for a file it cannot parse
            raise DataError(f"{path} is not a tokenizer of the `tokenizers` library: {error}") from error


def _why_not_text(text: str) -> str:
    for position, character in enumerate(text):
        if 0xD800 <= ord(character) <= 0xDFFF:
            return (
                f"text holds the lone surrogate {character!a} at position {position}, which is no character; "
                "read the file with errors='replace'"
            )
    return f"text is a {type(text).__name__} that cannot be encoded; give a str"


def _sample(domains: Sequence[Domain], sample_bytes: int, seed: int) -> Iterator[str]:
    """Training documents of all domains, in the shares of ``DEFAULT_WEIGHTS`` where these name them."""
    equal = 1.0 / len(domains)
    weights = {domain.name: DEFAULT_WEIGHTS.get(domain.name, equal) for domain in domains}
    for domain in domains:
        budget = int(sample_bytes * weights[domain.name] / sum(weights.values()))
        order = DocumentOrder(domain, Split(domain), "train", seed)
        for epoch in range(_MAX_REPEATS):
            for index in order.epoch(epoch):
                text = domain.read(index).text
                yield text
                budget -= len(text.encode("utf-8", "replace"))
                if budget <= 0:
                    break
            if budget <= 0:
                break


def train_tokenizer(
    domains: Sequence[Domain],
    vocab_size: int = DEFAULT_VOCAB_SIZE,
    *,
    seed: int = 0,
    sample_bytes: int = DEFAULT_SAMPLE_BYTES,
) -> Tokenizer:
    """Train a byte-level BPE on a balanced sample of the domains' training documents.

    The same domains, seed and sizes give byte-identical files.

    Args:
        domains: where the text comes from.
        vocab_size: tokens in all, the 256 bytes and the six special tokens included.
        seed: of the sample's choice of documents.
        sample_bytes: size of the sample in bytes, about.

    Returns:
        The tokenizer, of exactly ``vocab_size`` tokens.

    Raises:
        DataError: ``vocab_size`` is too small, or the text too little for so many tokens.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise DataError(
            f"vocab_size is {vocab_size}; 256 bytes and {len(SPECIAL_TOKENS)} special tokens alone need "
            f"{smallest}"
        )
    if not domains:
        raise DataError("there is no domain to train a tokenizer on; give at least one")
    backend = tokenizers.Tokenizer(models.BPE())
    splits = [
        pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
        for pattern in (_NUMBERS, _HAN_AND_KANA, _RUNS)
    ]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=[(BOS, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    backend.train_from_iterator(_sample(domains, sample_bytes, seed), trainer=trainer)
    reached = backend.get_vocab_size(with_added_tokens=True)
    if reached != vocab_size:
        raise DataError(
            f"vocab_size is {vocab_size}, but the text is only enough for {reached} tokens; "
            f"ask for vocab_size={reached} or less, or give more text"
        )
    return Tokenizer(backend)


def shipped_tokenizer_folder() -> Path | None:
    """Folder of the tokenizer that comes with the project, or None in an installation without its data."""
    places = (
        Path(dsv3lib.__file__).resolve().parents[1] / "data" / "tokenizer",  # a checkout, installed -e or not
        Path(sys.prefix) / "share" / "dsv3lib" / "tokenizer",
    )  # a wheel's data files
    return next((place for place in places if (place / "tokenizer.json").is_file()), None)


def default_tokenizer(domains: Sequence[Domain] | None = None) -> Tokenizer:
    """The course's tokenizer of 4,096 tokens: the shipped one, else one trained now.

    The shipped one is used whatever the Python version: another minor version's sources have other
    documents, but byte-level BPE writes any text, so only the number of tokens changes a little.

    Args:
        domains: what to train on if nothing is shipped; by default the built-in domains.

    Returns:
        The tokenizer.

    Raises:
        DataError: nothing is shipped and there is no text, or too little, to train one on.
    """
    if folder := shipped_tokenizer_folder():
        return Tokenizer.from_pretrained(folder)
    return train_tokenizer(builtin_domains() if domains is None else domains)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train a tokenizer and save it; the command line of this file."""
    parser = argparse.ArgumentParser(
        prog="python -m dsv3lib.training.text.tokenizer", description=main.__doc__
    )
    parser.add_argument("--vocab-size", type=int, default=DEFAULT_VOCAB_SIZE)
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument("--data", help="folder of your own text instead of the built-in domains")
    parser.add_argument("--without", nargs="*", default=(), help="built-in domains to leave out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample-bytes", type=int, default=DEFAULT_SAMPLE_BYTES)
    options = parser.parse_args(arguments)
    try:
        domains, notes = open_domains(options.data, options.without)
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        train_tokenizer(
            domains, options.vocab_size, seed=options.seed, sample_bytes=options.sample_bytes
        ).save(options.out)
    except (DataError, SaveError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{options.vocab_size} tokens trained on {', '.join(domain.name for domain in domains)}; "
        f"saved to {options.out}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
