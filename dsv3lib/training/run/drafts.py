"""Self-distillation of a checkpoint's MTP modules, so that more drafts stand: ``make checkpoint``'s last stage.

    OUT/own_text/part-….json   what the model wrote, half of it greedily; made first, part by part
    OUT/run/                   a run like any other (``folder.py``): log, save points, its model when it has ended

The modules learn from the main model's predictions (``loop.distillation``), on the text that it was trained on and on
text of its own, which is what drafts are made for. The main model's weights do not change. A kill at any moment
costs no more than a part, or the steps since the last save point: the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ...errors import TrainingError
from ...files import write_whole
from ...model import DeepSeekV3
from ...shipped import RESULTS, checkpoint_folder
from ..baselines.measure import drafts_by_domain
from ..loop.distillation import DraftTrainer
from ..loop.evaluate import evaluate
from ..loop.settings import TrainingConfig
from ..text.data import PackedStream
from ..text.domains import Domain, ListedDomain, builtin_domains
from ..text.full_text import FULL_WEIGHTS
from ..text.tokenizer import Tokenizer
from . import folder as run_folder
from .card import card
from .interrupt import exit_code
from .log import read_log
from .publish import batches_for
from .save_point import json_text, load_json, write_folder

DEFAULT_TOKENS = 6_000_000
OWN, OWN_SHARE, OWN_DOCUMENTS = "own", 0.5, 4096
"""The domain of the model's own text: its share of the tokens, and how many documents it has."""
SEQUENCE_LENGTH, BATCH_SIZE, WARMUP_STEPS = 256, 8, 30
SEED = 1  # another order of the documents than the pre-training's
RUN = "run"
_ROWS = 128  # of a part of the model's own text
_PROMPTS, _TEMPERATURES = (16, 32, 64, 128), (0.0, 1.0)


def settings(tokens: int = DEFAULT_TOKENS, threads: int = 1) -> TrainingConfig:
    """The run's recipe.

    Args:
        tokens: its length. threads: torch's.
    """
    return TrainingConfig(
        tokens=tokens, seed=SEED, threads=threads,
        batch_size=BATCH_SIZE, batch_size_start=BATCH_SIZE, batch_warmup_steps=0,
        learning_rate=2e-3, warmup_steps=WARMUP_STEPS, constant_share=0.3, cosine_share=0.7,
        rest_share=0.0, rest_ratio=0.0, tail_ratio=0.0, weight_decay=0.0, bias_speed=1e-3,
        ema_decay=0.0, checkpoint_every=200, validation_batches=0,
    )  # fmt: skip


def own_text(
    model: DeepSeekV3, prompts: PackedStream, folder: Path, documents: int = OWN_DOCUMENTS, progress: bool = True
) -> ListedDomain:
    """What a model writes behind the beginnings of its training text, as a domain; parts that are there are read.

    Args:
        model: writes, in turn greedily and at temperature 1.
        prompts: their beginnings; it is read from where it stands.
        folder: of the parts. documents: rounded up to whole parts. progress: show a bar.

    Returns:
        A domain of documents of at most ``prompts.seq_len`` tokens.

    Raises:
        TrainingError: a part is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts: dict[str, str] = {}
    for part in tqdm(range(-(-documents // _ROWS)), "own text", disable=not progress, unit="part"):
        ids = prompts.next_batch(_ROWS).input_ids
        path = folder / f"part-{part:03d}.json"
        if not path.exists():
            write_whole(path, json.dumps(_continuations(model, prompts.tokenizer, ids, part), ensure_ascii=False))
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise TrainingError(f"{path}: is damaged ({error}); remove it and give the command again") from error
        texts |= {f"{part:03d}/{row:03d}": text for row, text in enumerate(found) if text}
    return ListedDomain(OWN, {name: len(text.encode()) for name, text in texts.items()}, texts.__getitem__)


def _continuations(model: DeepSeekV3, tokenizer: Tokenizer, ids: torch.Tensor, part: int) -> list[str]:
    prompt = _PROMPTS[part % len(_PROMPTS)]
    temperature = _TEMPERATURES[part // len(_PROMPTS) % len(_TEMPERATURES)]
    draw = torch.Generator().manual_seed(part)
    prompt = min(prompt, ids.shape[1] // 2)
    rows = model.generate(ids[:, :prompt], ids.shape[1] - prompt, temperature, generator=draw)
    return [tokenizer.decode(row).replace("\ufffd", "") for row in rows.tolist()]


def trainer(
    checkpoint: Path,
    out: Path,
    config: TrainingConfig | None = None,
    domains: Sequence[Domain] | None = None,
    documents: int = OWN_DOCUMENTS,
    sequence: int = SEQUENCE_LENGTH,
    progress: bool = True,
) -> DraftTrainer:
    """The trainer of a new run in ``out``, or of the one that is there.

    Args:
        checkpoint: the model's folder, tokenizer included. out: the folder of all that is made.
        config: of ``settings``; by default that of the run that is there, or its defaults.
        domains: the text, by default the full built-in one. documents: of the model's own text.
        sequence: tokens of a row. progress: show a bar while the model writes.

    Raises:
        TrainingError: the checkpoint's modules were distilled already; or as for ``Trainer``.
    """
    if "distillation" in _record(checkpoint):
        raise TrainingError(
            f"{checkpoint}: its modules have been distilled already; begin from a checkpoint as `publish` writes it"
        )
    run, model = out / RUN, DeepSeekV3.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    if config is None:
        config = run_folder.recorded_config(run_folder.read_run(run)) if run.exists() else settings()
    torch.set_num_threads(config.threads or torch.get_num_threads())
    weights = FULL_WEIGHTS if domains is None else None
    domains = builtin_domains(text="full", seed=SEED) if domains is None else list(domains)
    prompts = PackedStream(domains, tokenizer, sequence, seed=SEED + 1, fim_rate=0.0, weights=weights)
    own = own_text(model, prompts, out / "own_text", documents, progress)
    shares = {d.name: (1 - OWN_SHARE) * w for d, w in zip(domains, prompts.weights, strict=True)} | {OWN: OWN_SHARE}
    stream = PackedStream([*domains, own], tokenizer, sequence, seed=SEED, weights=shares)
    source = {"data": None, "without": [], "text": "full"}
    return DraftTrainer(model, stream, config, out=run, resume=run.exists(), source=source)


def write_checkpoint(
    checkpoint: Path, out: Path, into: Path, domains: Sequence[Domain] | None = None, batches: int | None = None
) -> dict[str, Any]:
    """A checkpoint's folder with the distilled modules in place of its own, measured anew, with its card.

    Args:
        checkpoint: that the run in ``out`` began with. into: the new folder; the same one is replaced whole.
        domains: the text, as for ``trainer``. batches: most of 8 rows a domain; by default as ``publish`` measures.

    Returns:
        The record of what was measured.

    Raises:
        TrainingError: the run is not finished, or its modules were trained for another main model.
        SaveError: the folder cannot be written.
    """
    run = out / RUN
    history = read_log(run)
    if history.end is None or history.end["reason"] != "finished":
        raise TrainingError(f"{run}: the run is not finished; go on with it first")
    record = _record(checkpoint)
    described = run_folder.read_run(run)
    seed = record["training"]["seed"]  # the held-out text that ``publish`` measures on
    domains = builtin_domains(text="full", seed=seed) if domains is None else domains
    text = PackedStream(domains, Tokenizer.from_pretrained(checkpoint), described["stream"]["seq_len"], seed=seed)
    batches = batches or batches_for(record["least_tokens"], text)

    def fill(folder: Path) -> None:
        shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
        distilled = DeepSeekV3.from_pretrained(run / run_folder.MODEL_FOLDER).to(torch.bfloat16)
        pretrained = DeepSeekV3.from_pretrained(checkpoint, dtype=torch.bfloat16)
        _refuse_another_model(run, distilled, pretrained)
        distilled.save_pretrained(folder, mtp_copies=False)
        model = DeepSeekV3.from_pretrained(folder, dtype=torch.float32)
        record["distillation"] = {
            "before": drafts_by_domain(pretrained.float(), text, record["drafts"], batches),
            "tokens": history.steps[-1]["tokens"], "steps": history.steps[-1]["step"],
            "seconds": history.end["seconds"], "own_share": OWN_SHARE, "training": described["training"],
            "divergence": {"first": history.steps[0]["losses"], "last": _mean_losses(history.steps[-50:])},
        }  # fmt: skip
        record["drafts"] = drafts_by_domain(model, text, record["drafts"], batches)
        found = evaluate(model, text, batches)
        record["balance"] |= {"max_violation": found.max_violation, "entropy": found.load_entropy}
        (folder / RESULTS).write_text(json_text(record), encoding="utf-8")
        (folder / "README.md").write_text(card(record), encoding="utf-8")

    write_folder(into, fill)
    return record


def _refuse_another_model(run: Path, distilled: DeepSeekV3, pretrained: DeepSeekV3) -> None:
    config = pretrained.config
    first, depth = config.num_hidden_layers, config.num_nextn_predict_layers
    modules = tuple(f"model.layers.{k}." for k in range(first, first + depth))
    ours, theirs = distilled.state_dict(), pretrained.state_dict()
    for name in ours:
        if not name.startswith(modules) and not torch.equal(ours[name], theirs[name]):
            raise TrainingError(
                f"{run}: its modules were trained for another main model ({name} differs from the checkpoint's); "
                "remove the run, and distil anew"
            )


def _mean_losses(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {name: sum(s["losses"][name] for s in steps) / len(steps) for name in steps[0]["losses"]}


def _record(checkpoint: Path) -> dict[str, Any]:
    return load_json(checkpoint / RESULTS)


def distil(checkpoint: Path, out: Path, into: Path, config: TrainingConfig | None = None) -> bool:
    """Train the modules, or go on, then write the checkpoint; True when all is done, False when interrupted.

    Args:
        checkpoint, out, into: as for ``write_checkpoint``. config: of ``settings``.
    """
    run = trainer(checkpoint, out, config, progress=sys.stderr.isatty())
    run.run(progress=sys.stderr.isatty())
    if not run.finished:
        return False
    record = write_checkpoint(checkpoint, out, into)
    for name, row in record["drafts"].items():
        before = record["distillation"]["before"][name]["agreement"]
        print(f"{name}: " + ", ".join(f"{a:.1%} (was {b:.1%})" for a, b in zip(row["agreement"], before, strict=True)))
    return True


def main(arguments: list[str] | None = None) -> int:
    """Distil a checkpoint's MTP modules from its main model; the command line of this file."""
    parser = argparse.ArgumentParser(prog="python -m dsv3lib.training.run.drafts", description=main.__doc__)
    parser.add_argument("checkpoint", type=checkpoint_folder, help="the folder, as `publish` writes it")
    out = Path("runs") / "tiny-v3-drafts"
    parser.add_argument("--out", type=Path, default=out, help="the run's folder (%(default)s)")
    parser.add_argument("--into", type=Path, help="the new checkpoint's folder; by default the old one is replaced")
    parser.add_argument("--tokens", type=int, help=f"the run's length ({DEFAULT_TOKENS:,})")
    parser.add_argument("--threads", type=int, help="torch's threads, part of the run (1)")
    options = parser.parse_args(arguments)
    given = {name: value for name in ("tokens", "threads") if (value := getattr(options, name)) is not None}
    return exit_code(
        lambda: distil(
            options.checkpoint, options.out, options.into or options.checkpoint, settings(**given) if given else None
        )
    )


if __name__ == "__main__":
    sys.exit(main())
