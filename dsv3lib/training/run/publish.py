"""From a finished run to a checkpoint folder: weights in BF16, tokenizer, log, what was measured, model card.

    python -m dsv3lib.training.run.publish runs/tiny-v3 --dense runs/tiny-v3-dense --out data/checkpoints/tiny-v3

What is measured is what is shipped: the weights are rounded to BF16 first. The folder appears whole or not at all.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ...checkpoint import SINGLE
from ...errors import Dsv3Error, TrainingError
from ...model import DeepSeekV3
from ...shipped import RESULTS
from ..baselines.measure import (
    compressed_bits,
    drafts_by_domain,
    ngram_bits,
    segments,
    target_bytes,
    training_batches,
    unigram_bits,
)
from ..baselines.ngram import KneserNey, unigram
from ..loop.evaluate import DEFAULT_BATCH_SIZE, Evaluation, evaluate
from ..text.data import PackedStream
from ..text.domains import builtin_domains
from ..text.duplicates import Redundancy
from ..text.full_text import redundancy
from ..text.tokenizer import Tokenizer
from . import folder as run_folder
from .card import beats_five_gram, card
from .log import RunHistory, read_log
from .save_point import json_text, write_folder

CARD, LOG = "README.md", "training_log.jsonl"
LEAST_TOKENS = 20_000
"""Validation tokens of a domain below which a figure is called small."""
_EVERY_STEP_UNTIL, _THEN_EVERY = 100, 10
_LOGGED = (
    "kind", "step", "tokens", "loss", "losses", "learning_rate", "gradient_norm", "max_violation",
)  # fmt: skip


def stream_of_run(run: str | Path) -> PackedStream:
    """The text of a recorded run on the built-in domains, from its beginning.

    Raises:
        TrainingError: there is no such run, or this machine's text is no longer the one that it read.
    """
    recorded = run_folder.read_run(run)
    source, text = recorded["source"], recorded["stream"]
    domains = builtin_domains(
        recorded["domains"], seed=recorded["training"]["seed"], text=source.get("text", "small")
    )
    stream = PackedStream(
        domains, Tokenizer.from_pretrained(Path(run) / run_folder.TOKENIZER_FOLDER), text["seq_len"],
        seed=text["seed"], fim_rate=text["fim_rate"], validation_share=text["validation_share"],
        weights=dict(zip(recorded["domains"], text["weights"], strict=True)),
    )  # fmt: skip
    now = stream.state_dict()["settings"]
    changed = [name for name in text if now.get(name) != text[name]]
    if changed:
        raise TrainingError(
            f"{run}: the run read a text with {changed[0]}={text[changed[0]]!r}, this machine has "
            f"{now.get(changed[0])!r}; publish it where it was trained, or train again"
        )
    return stream


def batches_for(tokens: int, stream: PackedStream) -> int:
    """Batches of a domain's held-out text that have at least so many targets."""
    return -(-tokens // (DEFAULT_BATCH_SIZE * stream.seq_len)) + 1


def measure_run(
    run: Path, weights: Path, dense: Path | None = None, batches: int | None = None
) -> dict[str, Any]:
    """All that the card says, as JSON knows it.

    Args:
        run: the finished run. weights: the folder with the weights that are shipped. dense: the dense twin's run.
        batches: most batches of 8 rows a domain; by default enough for ``LEAST_TOKENS``.

    Raises:
        TrainingError: a run is not finished, the twin has other tokens, or the text has changed.
    """
    recorded, history = run_folder.read_run(run), _finished(run)
    stream = stream_of_run(run)
    tokenizer, training = stream.tokenizer, recorded["training"]
    batches = batches or batches_for(LEAST_TOKENS, stream)
    steps, batch_size = history.steps[-1]["step"], training["batch_size"]
    model = DeepSeekV3.from_pretrained(weights, dtype=torch.float32)
    evaluations = {"model": evaluate(model, stream, batches, DEFAULT_BATCH_SIZE)}
    if dense is not None:
        evaluations["dense"] = _dense_evaluation(dense, recorded, history, stream, batches)
    read = [part for batch in training_batches(stream, steps, batch_size) for part in segments([batch])]
    counts = KneserNey(read, tokenizer.vocab_size, bos_id=tokenizer.bos_id)
    frequencies = unigram(torch.cat([torch.from_numpy(part) for part in read]).numpy(), tokenizer.vocab_size)
    rows: dict[str, dict[str, float | int]] = {}
    for name in evaluations["model"].domains:
        held_out = stream.validation_batches(name, batches, DEFAULT_BATCH_SIZE)
        bits = compressed_bits(held_out, tokenizer) | {
            "five_gram": ngram_bits(counts, held_out),
            "unigram": unigram_bits(frequencies, held_out),
        }
        size = target_bytes(held_out, tokenizer)
        rows[name] = {"tokens": evaluations["model"].domains[name].tokens, "bytes": size} | {
            key: value / size for key, value in bits.items()
        }
        rows[name] |= {key: found.domains[name].bits_per_byte for key, found in evaluations.items()}
    rows["all"] = _over_all(rows)
    return {
        "bits_per_byte": rows, "least_tokens": LEAST_TOKENS,
        "drafts": drafts_by_domain(model, stream, evaluations["model"].domains, batches, DEFAULT_BATCH_SIZE),
        "balance": _balance(evaluations["model"], model),
        "parameters": model.parameter_counts(), "model": model.config.to_dict(), "training": training,
        "weights_bytes": (weights / SINGLE).stat().st_size, "text": _text(stream),
        "run": _run_facts(recorded, history, stream), "tokenizer": tokenizer.fingerprint(),
    }  # fmt: skip


def publish(run: Path, out: Path, dense: Path | None = None, batches: int | None = None) -> dict[str, Any]:
    """Write the checkpoint folder of a finished run.

    Args:
        run: the run. out: a folder that does not exist yet. dense, batches: see ``measure_run``.

    Returns:
        The record of what was measured.

    Raises:
        Dsv3Error: the run is not finished, or the folder is there already or cannot be written.
    """
    run_folder.refuse_existing(out)
    _finished(run)
    record: dict[str, Any] = {}

    def fill(folder: Path) -> None:
        model = DeepSeekV3.from_pretrained(run / run_folder.MODEL_FOLDER).to(torch.bfloat16)
        model.save_pretrained(folder, mtp_copies=False)
        Tokenizer.from_pretrained(run / run_folder.TOKENIZER_FOLDER).save(folder)
        record.update(measure_run(run, folder, dense, batches))
        (folder / LOG).write_text("".join(_thinned(run)), encoding="utf-8")
        (folder / RESULTS).write_text(json_text(record), encoding="utf-8")
        (folder / CARD).write_text(card(record), encoding="utf-8")

    write_folder(out, fill)
    return record


def _finished(run: Path) -> RunHistory:
    history = read_log(run)
    if history.end is None or history.end["reason"] != "finished":
        raise TrainingError(f"{run}: the run is not finished; go on with it, then publish it")
    return history


def _dense_evaluation(
    dense: Path, recorded: dict[str, Any], history: RunHistory, stream: PackedStream, batches: int
) -> Evaluation:
    """Validation of the twin's model, once it is sure that it read the same tokens."""
    twin, its = run_folder.read_run(dense), _finished(dense)
    if twin["stream"] != recorded["stream"] or its.steps[-1]["tokens"] != history.steps[-1]["tokens"]:
        raise TrainingError(
            f"{dense}: the dense twin has read {its.steps[-1]['tokens']:,} tokens, expected the same "
            f"{history.steps[-1]['tokens']:,} of the same text; train it with --tokens "
            f"{history.steps[-1]['tokens']} --dense"
        )
    return evaluate(DeepSeekV3.from_pretrained(dense / run_folder.MODEL_FOLDER), stream, batches, DEFAULT_BATCH_SIZE)


def _over_all(rows: dict[str, dict[str, float | int]]) -> dict[str, float | int]:
    """Bits over bytes of all domains together."""
    size = sum(row["bytes"] for row in rows.values())
    keys = [key for key in next(iter(rows.values())) if key not in ("tokens", "bytes")]
    together = {key: sum(row[key] * row["bytes"] for row in rows.values()) / size for key in keys}
    return {"tokens": sum(row["tokens"] for row in rows.values()), "bytes": size} | together


def _balance(evaluation: Evaluation, model: DeepSeekV3) -> dict[str, Any]:
    return {
        "layers": list(model.config.moe_layers),
        "max_violation": evaluation.max_violation,
        "entropy": evaluation.load_entropy,
    }


def _text(stream: PackedStream) -> dict[str, dict[str, Any]]:
    passes = stream.passes()
    found = {}
    for domain, share in zip(stream.domains, stream.weights, strict=True):
        account: Redundancy | None = redundancy(domain)
        found[domain.name] = {
            "share": share, "passes": passes.get(domain.name), "bytes": domain.size_bytes,
            "redundancy": None if account is None else account.share,
            "sources": getattr(domain, "sources", {}) if domain.name != "code" else {},
        }  # fmt: skip
    return found


def _run_facts(recorded: dict[str, Any], history: RunHistory, stream: PackedStream) -> dict[str, Any]:
    training, last = recorded["training"], history.steps[-1]
    decided, alpha = recorded["decided_after"], training["aux_loss_alpha"]
    constant = training["constant_share"] if decided is None else decided / last["step"]
    command = (
        f"python -m dsv3lib.training.run.tiny_v3 --tokens {last['tokens']} --threads {training['threads']}"
    )
    if decided is not None:
        command += f" --decay-after {decided}"
    return {
        "steps": last["step"], "tokens": last["tokens"], "seconds": history.end["seconds"],
        "threads": training["threads"], "sequence_length": stream.seq_len, "fim_rate": stream.fim_rate,
        "constant_share": constant, "versions": recorded["versions"], "machine": recorded["machine"],
        "command": command, "aux_loss_alpha": recorded["model"]["aux_loss_alpha"] if alpha is None else alpha,
    }  # fmt: skip


def _thinned(run: Path) -> Iterator[str]:
    """The log's lines without the load of every expert, every step at first and then one in ten."""
    for line in (Path(run) / "log.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["kind"] == "step":
            step = record["step"]
            if step > _EVERY_STEP_UNTIL and step % _THEN_EVERY:
                continue
            record = {name: record[name] for name in _LOGGED}
        yield json.dumps(record, separators=(",", ":")) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Make a checkpoint folder of a finished run; the command line of this file."""
    parser = argparse.ArgumentParser(prog="python -m dsv3lib.training.run.publish", description=main.__doc__)
    parser.add_argument("run", type=Path, help="the finished run's folder")
    parser.add_argument("--dense", type=Path, help="the dense twin's run, of the same tokens")
    parser.add_argument(
        "--out", type=Path, required=True, help="the checkpoint's folder; it must not exist yet"
    )
    options = parser.parse_args(arguments)
    try:
        record = publish(options.run, options.out, options.dense)
    except Dsv3Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    row = record["bits_per_byte"]["all"]
    print(f"{options.out}: {row['model']:.3f} bits per byte, the 5-gram {row['five_gram']:.3f}")
    if not beats_five_gram(record):
        print("The model does not beat the 5-gram: it needs a longer run before it is worth shipping.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
