"""The run of a context extension: two training runs in one folder, resumable at any moment.

    OUT/extension.json     what is extended, how, and from which text; written once, at the beginning
    OUT/phase-1/           a run like any other (``folder.py``): log, save points, its model when it has ended
    OUT/phase-2/           the same at the full length, begun from phase 1's model

Each phase inherits what a run can do: a kill at any moment costs no more than the steps since its last save point, and
the losses do not show it. Moments start anew in each phase, with a short warm-up; the paper says nothing of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...config import ModelConfig
from ...devices import find_device
from ...errors import CheckpointError, TrainingError
from ...model import DeepSeekV3
from ..loop.context_extension import Phase, extended_config, phases
from ..loop.settings import TrainingConfig
from ..loop.trainer import Trainer
from ..text.data import PackedStream
from ..text.folder import open_domains
from ..text.tokenizer import Tokenizer
from . import folder as run_folder
from . import save_point

FILE_NAME = "extension.json"
WARMUP_STEPS = 5
_FORMAT = 1


@dataclass(frozen=True)
class Base:
    """What is extended.

    Attributes:
        model: the checkpoint's folder. trained: its context, in tokens. learning_rate: that it ended with.
        text: where the text came from, as a run records it; a run's own text where it is one.
    """

    model: Path
    trained: int
    learning_rate: float
    text: dict[str, Any]


@dataclass(frozen=True)
class Extension:
    """All that an extension depends on, as ``extension.json`` has it.

    Attributes:
        base: the checkpoint's folder. base_weights: its fingerprint. method, trained, target, factor: see
            ``extended_config``. steps: of each phase. tokens_a_step, learning_rate, seed: of the training.
        checkpoint_every: steps between save points; ``None`` saves at each phase's end.
        text: where it comes from.
    """

    base: str
    base_weights: str
    method: str
    trained: int
    target: int
    factor: float
    steps: int
    tokens_a_step: int
    learning_rate: float
    seed: int
    checkpoint_every: int | None
    text: dict[str, Any]

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The schedule."""
        return phases(self.trained, self.target, self.steps, self.tokens_a_step)


def find_base(folder: str | Path, trained: int | None = None) -> Base:
    """What ``--from`` names: a run's folder, or a checkpoint's.

    Args:
        folder: either. trained: the trained length, where it is not what the folder says.

    Raises:
        TrainingError: a run that has no checkpoint yet, or a folder that is neither.
    """
    folder = Path(folder)
    if (folder / run_folder.RUN_FILE).exists():
        recorded = run_folder.read_run(folder)
        model = folder / run_folder.MODEL_FOLDER
        model = model if model.exists() else save_point.latest_savepoint(folder)
        if model is None:
            raise TrainingError(
                f"{folder}: this run has no checkpoint yet, so there is nothing to extend; go on with it first "
                f"(dsv3 train --resume {folder})"
            )
        config, text = run_folder.recorded_config(recorded), dict(recorded["stream"])
        text = {name: text[name] for name in ("fim_rate", "validation_share", "weights")}
        text |= {"domains": recorded["domains"], **recorded["source"]}
        return Base(model, trained or recorded["stream"]["seq_len"], config.learning_rate * config.tail_ratio, text)
    if not (folder / "config.json").exists():
        raise TrainingError(f"{folder}: holds neither a run nor a checkpoint; name a folder that does")
    longest = ModelConfig.from_json(folder).max_position_embeddings
    defaults = TrainingConfig(steps=1)
    return Base(folder, trained or longest, defaults.learning_rate * defaults.tail_ratio, {"data": None, "without": []})


def begin(out: str | Path, extension: Extension) -> None:
    """Write the folder of a new extension.

    Raises:
        TrainingError: there is something at that path. ConfigError: the extension cannot be. SaveError: no room.
    """
    out = Path(out)
    if out.is_file() or out.is_dir() and any(out.iterdir()):
        raise TrainingError(f"{out}: exists; go on with it (--resume {out}) or choose another folder")
    config = ModelConfig.from_json(extension.base)
    extended_config(config, extension.method, extension.trained, extension.target, extension.factor)
    _ = extension.phases  # refuses what cannot be scheduled, before there is a folder
    save_point.write_folder(
        out, lambda folder: save_point.save_json(folder / FILE_NAME, {"format": _FORMAT, **asdict(extension)})
    )


def is_extension(folder: str | Path) -> bool:
    """Whether a folder is an extension's."""
    return (Path(folder) / FILE_NAME).exists()


def read(out: str | Path) -> Extension:
    """What ``extension.json`` says.

    Raises:
        TrainingError: it is missing, damaged or of another format.
    """
    path = Path(out) / FILE_NAME
    try:
        fields = save_point.load_json(path)
        if fields.pop("format") != _FORMAT:
            raise KeyError("format")
        return Extension(**fields)
    except (CheckpointError, KeyError, TypeError, AttributeError) as error:
        raise TrainingError(f"{path}: cannot be used ({error!r}); begin the extension anew") from error


def trainers(out: str | Path, device: str | None = None, threads: int | None = None) -> Iterator[Trainer]:
    """The trainer of each phase that is not finished, in order; run one before asking for the next.

    Args:
        out: the extension's folder. device: where to compute. threads: on the CPU.

    Raises:
        TrainingError: the base has changed since, or a phase was left before its end.
        CheckpointError: a checkpoint is damaged. DataError: the text has changed.
    """
    out, extension = Path(out), read(out)
    for number, phase in enumerate(extension.phases, start=1):
        folder = out / f"phase-{number}"
        trainer = _trainer(out, extension, number, phase, device, threads)
        if not trainer.finished:
            yield trainer
        if not trainer.finished:
            raise TrainingError(f"{folder}: is not finished; go on with it (dsv3 train --resume {out})")


def _trainer(
    out: Path, extension: Extension, number: int, phase: Phase, device: str | None, threads: int | None
) -> Trainer:
    folder = out / f"phase-{number}"
    base = Path(extension.base) if number == 1 else out / f"phase-{number - 1}" / run_folder.MODEL_FOLDER
    model = DeepSeekV3.from_pretrained(base)
    if number == 1:
        model = _stretched(model, extension)
    text, tokenizer = dict(extension.text), Tokenizer.from_pretrained(base)
    domains, _ = open_domains(text["data"], text["without"], text=text.get("text", "small"))
    weights = text.get("weights")
    stream = PackedStream(
        domains, tokenizer, phase.length, seed=extension.seed,
        **{name: text[name] for name in ("fim_rate", "validation_share") if name in text},
        weights=None if weights is None else dict(zip(text["domains"], weights, strict=True)),
    )  # fmt: skip
    config = TrainingConfig(
        steps=phase.steps, seed=extension.seed, batch_size=phase.batch_size, batch_size_start=phase.batch_size,
        learning_rate=extension.learning_rate, warmup_steps=min(WARMUP_STEPS, phase.steps),
        constant_share=1.0, cosine_share=0.0, rest_share=0.0,  # pre-training's last rate, kept (§4.3)
        mtp_loss_weight=0.1, bias_speed=0.0,  # as in pre-training's last phase (§4.2)
        checkpoint_every=extension.checkpoint_every, validation_batches=1, threads=threads,
    )  # fmt: skip
    started = (folder / run_folder.RUN_FILE).exists()
    return Trainer(model.to(find_device(device)), stream, config, out=folder, resume=started, source=text)


def _stretched(model: DeepSeekV3, extension: Extension) -> DeepSeekV3:
    """The base's weights under the extended configuration.

    Raises:
        TrainingError: they are not those that the extension was begun with.
    """
    found = run_folder.weights_fingerprint(model)
    if found != extension.base_weights:
        raise TrainingError(
            f"{extension.base}: its weights are {found}, the extension was begun with {extension.base_weights}; put "
            "the checkpoint back, or begin the extension anew"
        )
    settings = (extension.method, extension.trained, extension.target, extension.factor)
    stretched = DeepSeekV3(extended_config(model.config, *settings))
    stretched.load_state_dict(model.state_dict())
    return stretched
