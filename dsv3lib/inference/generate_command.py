"""``dsv3 generate``: lets a trained model write, token by token.

A command stands on the top floor, with ``cli``: it may know of training's folders.
"""

from __future__ import annotations

import argparse
import sys
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import tokenizers
import torch
from rich.text import Text

from ..config import ModelConfig
from ..devices import HELP, find_device
from ..errors import CheckpointError, InputError
from ..model import DeepSeekV3
from ..shipped import checkpoint_folder, refuse_foreign_tokenizer
from ..terminal import plain_console
from ..training.run.folder import MODEL_FOLDER
from ..training.run.save_point import damaged, is_save_point, latest_savepoint
from .acceptance import SpeculationStatistics
from .generate import stream
from .request import Request
from .sampling import Sampler
from .speculative import speculate
from .text_stream import TextStream

RUNS = "runs"  # where ``dsv3 train`` puts its runs
DEFAULT_NEW_TOKENS, DEFAULT_TEMPERATURE, DEFAULT_TOP_P = 200, 0.7, 0.95
_TOKENIZER = "tokenizer.json"
_KEPT_CONTROLS = "\n\t"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "checkpoint", nargs="?", metavar="CHECKPOINT_FOLDER",
        help=f"a model's folder, or a run's (the newest run under {RUNS}/)",
    )  # fmt: skip
    parser.add_argument("--prompt", default="", metavar="TEXT", help="what the text begins with")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=DEFAULT_NEW_TOKENS,
        metavar="N",
        help="at most so many (%(default)s)",
    )
    parser.add_argument(
        "--temperature", type=float, default=DEFAULT_TEMPERATURE, help="0 takes the likeliest (%(default)s)"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=DEFAULT_TOP_P,
        help="share of probability that is sampled from (%(default)s)",
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="sample among so many likeliest tokens (all)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (%(default)s)")
    parser.add_argument(
        "--speculative", action="store_true", help="a drafter guesses, the model verifies: the same text"
    )
    parser.add_argument(
        "--draft-tokens", type=_number_or_auto, metavar="N",
        help='drafts a pass, with --speculative (one per MTP module); "auto" takes as many as pay',
    )  # fmt: skip
    parser.add_argument(
        "--drafter", default="mtp", metavar="NAME",
        help='who guesses, with --speculative: "mtp", the model\'s own modules (default), "lookup", n-grams of the '
        "text, or the folder of a smaller model with the same tokenizer",
    )  # fmt: skip
    parser.add_argument("--device", help=HELP)


def run(args: argparse.Namespace) -> int:
    """Write the prompt and what follows it to the standard output, and a line of figures to the error stream.

    Raises:
        CheckpointError: the folder holds no whole model, or no tokenizer. InputError: a setting is out of range.
    """
    Sampler(args.temperature, args.top_p, top_k=args.top_k)  # refuses before a large model is read
    if args.draft_tokens is not None and not args.speculative:
        raise InputError(f"--draft-tokens: {args.draft_tokens} given without --speculative; pass both")
    if args.drafter != "mtp" and not args.speculative:
        raise InputError(f"--drafter: {args.drafter} given without --speculative; pass both")
    generator = _generator(args.device, args.seed)
    folder = find_checkpoint(args.checkpoint)
    tokenizer = read_tokenizer(folder)
    try:
        model = DeepSeekV3.from_pretrained(folder, device=str(generator.device))
    except CheckpointError as error:
        raise (damaged(folder, error) if is_save_point(folder) else error) from error
    ids = encode_prompt(tokenizer, args.prompt, model.config).to(generator.device)
    statistics = SpeculationStatistics() if args.speculative else None
    settings = {
        "max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "top_p": args.top_p,
        "generator": generator, "top_k": args.top_k,
    }  # fmt: skip
    pieces = (
        _stream(model, ids, settings)
        if statistics is None
        else _rounds(model, ids, settings, args.draft_tokens, statistics, _drafter(args.drafter, folder, generator))
    )
    count, seconds = _write(args.prompt, pieces, TextStream(tokenizer))
    _conclude(count, seconds, statistics)
    return 0


def _stream(model: DeepSeekV3, ids: torch.Tensor, settings: dict) -> Iterator[list[int]]:
    return (tokens.tolist() for tokens in stream(model, ids, **settings))


def _rounds(
    model: DeepSeekV3, ids: torch.Tensor, settings: dict, draft_tokens: int | str | None,
    statistics: SpeculationStatistics, drafter: DeepSeekV3 | str,
) -> Iterator[list[int]]:  # fmt: skip
    request = Request.of(model, ids, **settings)
    rounds = speculate(model, request, draft_tokens, statistics, drafter=drafter)
    return (round_.tokens[0] for round_ in rounds)


def _number_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


def _drafter(name: str, folder: Path, generator: torch.Generator) -> DeepSeekV3 | str:
    """"mtp", "lookup", or the model in a folder.

    Raises:
        CheckpointError: the folder holds no whole model. InputError: its tokenizer is not the larger model's.
    """
    if name in ("mtp", "lookup"):
        return name
    small = find_checkpoint(name)
    if read_tokenizer(small).to_str() != read_tokenizer(folder).to_str():
        raise InputError(f"--drafter: the tokenizer of {small} is not that of {folder}; a draft model must share it")
    return DeepSeekV3.from_pretrained(small, device=str(generator.device))


# ---- what is read ----------------------------------------------------------------------------------------


def find_checkpoint(place: str | Path | None) -> Path:
    """The model's folder at ``place``: itself, or of a run the finished model, else the newest save point.

    Args:
        place: a folder or a shipped checkpoint's name; by default the run under ``runs/`` that has saved last.

    Raises:
        CheckpointError: there is none.
    """
    if place is None:
        found = [c for run in Path(RUNS).glob("*") if (c := _checkpoint_in(run)) is not None]
        if not found:
            raise CheckpointError(
                f"no folder was given, and {RUNS}/ holds no trained model; train one: dsv3 train --minutes 2"
            )
        return max(found, key=lambda checkpoint: checkpoint.stat().st_mtime)
    place = checkpoint_folder(place)
    found = _checkpoint_in(place)
    if found is not None:
        return found
    if not place.is_dir():
        raise CheckpointError(f"{place}: there is no such folder; expected a model's or a run's")
    if (place / "run.json").is_file():
        raise CheckpointError(
            f"{place}: this run has no save point yet; go on with it: dsv3 train --resume {place}"
        )
    held = ", ".join(sorted(path.name for path in place.iterdir())[:5]) or "nothing"
    raise CheckpointError(f"{place}: holds no model (no config.json) and is no run; it holds {held}")


def _checkpoint_in(place: Path) -> Path | None:
    candidates = (place, place / MODEL_FOLDER, latest_savepoint(place))
    return next((c for c in candidates if c is not None and (c / "config.json").is_file()), None)


def read_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer beside a model.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    path = folder / _TOKENIZER
    if not path.is_file():
        raise CheckpointError(
            f"{path}: the model has no tokenizer, so its tokens mean no text; copy the {_TOKENIZER} that it was "
            "trained with into its folder"
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises a bare Exception for a file that it cannot parse
        raise CheckpointError(f"{path}: is not a tokenizer of the `tokenizers` library: {error}") from error
    refuse_foreign_tokenizer(folder, tokenizer.to_str())
    return tokenizer


def encode_prompt(tokenizer: tokenizers.Tokenizer, prompt: str, config: ModelConfig) -> torch.Tensor:
    """The prompt's tokens, [1, T], behind the token that begins a text.

    Special tokens that the prompt spells out, such as those of fill-in-the-middle, are taken as such.

    Raises:
        InputError: it is no text, or has no token. CheckpointError: the tokenizer is not this model's.
    """
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if size > config.vocab_size:
        raise CheckpointError(
            f"{_TOKENIZER}: has {size} tokens, the model's vocab_size is {config.vocab_size}; they were not trained "
            "together"
        )
    try:
        ids = tokenizer.encode(prompt).ids
    except (UnicodeEncodeError, TypeError) as error:
        raise InputError(
            f"--prompt: {ascii(prompt)} is no text in this terminal's encoding; use UTF-8"
        ) from error
    if config.bos_token_id is not None and ids[:1] != [config.bos_token_id]:
        ids = [config.bos_token_id, *ids]
    if not ids:
        raise InputError(
            "--prompt: is empty, and the model knows no token that begins a text; give some words"
        )
    return torch.tensor([ids])


def _generator(device: str | None, seed: int) -> torch.Generator:
    where = find_device(device)
    try:
        return torch.Generator(where).manual_seed(seed)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"--seed: {seed}, expected an integer in [-2^63, 2^64)") from error


# ---- what is written -------------------------------------------------------------------------------------


def _write(prompt: str, pieces: Iterator[list[int]], text: TextStream) -> tuple[int, float]:
    """Print the text as it comes; returns tokens and seconds. The last line is ended, come what may."""
    out = sys.stdout

    def show(piece: str) -> None:
        out.write(without_controls(piece) if out.isatty() else piece)
        out.flush()

    count, started = 0, time.perf_counter()
    try:
        plain_console(file=out).print(Text(without_controls(prompt), style="dim"), end="")
        for tokens in pieces:
            count += len(tokens)
            show(text.add(tokens))
        show(text.finish())
    finally:
        seconds = time.perf_counter() - started
        out.write("\n")
        out.flush()
    return count, seconds


def without_controls(text: str) -> str:
    """Text that cannot steer a terminal: control characters but line ends and tabs become U+FFFD."""
    return "".join(c if c in _KEPT_CONTROLS or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)


def _conclude(count: int, seconds: float, statistics: SpeculationStatistics | None) -> None:
    line = f"{count} tokens in {seconds:.1f} s, {count / max(seconds, 1e-9):,.0f} tokens/s"
    if statistics is not None and statistics.passes:
        line += f", {statistics.tokens_per_pass:.2f} tokens a pass"
        if statistics.drafted:
            line += f", {statistics.acceptance:.0%} of {sum(statistics.drafted)} drafts accepted"
    plain_console(stderr=True).print(Text(line, style="dim"))
