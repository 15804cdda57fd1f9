"""The needle study: a model trained at 128 tokens, read at 1, 2, 4 and 8 times that, before and after an extension.

For each seed one base model is trained on text and needles. Then, for each way to stretch RoPE (YaRN, position
interpolation, NTK-aware, none), it is measured as it is under the stretched configuration, extended in V3's two phases
by a few steps, and measured again: the needle map (depth by length), its control with shuffled keys, questions that
need two needles, and the loss of plain text by position. At last the model that YaRN extended is read by ports that
err: its weights are right, and its configuration is not.

    python -m dsv3lib.studies.needle_study
    python -m dsv3lib.studies.needle_study --practice

The second trains the base model alone, on rows of which three in four ask for two needles instead of one in four.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import ModelConfig
from ..model import DeepSeekV3
from ..rope_settings import LinearScaling, Scaling, YarnScaling, yarn_temperature
from ..training.loop.context_extension import METHODS, extended_config, phases
from . import needle
from .log import FOLDER, record
from .small_models import PEAK_LEARNING_RATE, manual, rows_of, small_config, train

TRAINED, TARGET, FACTOR = 128, 1024, 8.0
V3_FACTOR = 40.0
"""YaRN's alone, beside the other: the greater the factor, the more the temperature matters."""
LENGTHS = (128, 256, 512, 1024)
DEPTHS = tuple(round(0.05 + 0.1 * step, 2) for step in range(10))
CONTROLS = DEPTHS[::3]
"""Where shuffled keys and linked questions are measured too."""
SEEDS = (0, 1, 2, 3)
ROTARY_DIMS, THETA = 16, 500.0
"""With 8 pairs and so short a context V3's base of 10,000 would leave most of them nearly still: 4 turn at least once
over 128 tokens with this one. (Of V3's 32 pairs, 23 do over its 4,096.)"""
TOKENS_A_STEP = 1024
SHORT_SHARE = 0.5
"""Of the training: so long the rows are half as long, where a lookup is learned sooner."""
ANSWER_WEIGHT = 2.0
"""How much an answer counts against a byte of text: there are few of them in a row."""
PRACTICE = ("two", "two", "two", "plain")
"""Kinds of the rows in ``--practice``."""
POSITION_BINS, PLAIN_ROWS = 16, 32
CURVE_EVERY = 50


def once(yarn: YarnScaling) -> YarnScaling:
    """YaRN's settings with such a weight that the temperature's square is the temperature that was meant."""
    temperature = yarn_temperature(yarn.factor, 1.0)
    weight = (temperature**0.5 - 1) / (temperature - 1)
    return replace(yarn, mscale=weight, mscale_all_dim=weight)


MISTAKES: Mapping[str, Callable[[YarnScaling], Scaling | None]] = MappingProxyType(
    {
        "not_squared": once,
        "no_temperature": lambda yarn: replace(yarn, mscale=0.0, mscale_all_dim=0.0),
        "on_the_rotary_part_alone": lambda yarn: replace(yarn, mscale=1.0, mscale_all_dim=0.0),
        "interpolation": lambda yarn: LinearScaling(yarn.factor),
        "not_stretched": lambda yarn: None,
    }
)
"""What a port makes of the settings that YaRN's model was extended with: the temperature multiplies the softmax scale
once instead of twice, not at all, or only the rotary part (it stands at cos and sin); every pair is slowed alike, with
no temperature (``"type": "linear"`` read for YaRN); RoPE is left as it was."""


def base_config() -> ModelConfig:
    """The model that is trained, with the context that it is trained at."""
    return small_config(
        needle.VOCABULARY, ROTARY_DIMS, max_position_embeddings=TRAINED, rope_theta=THETA, kv_lora_rank=64,
        qk_nope_head_dim=32, initializer_range=0.1,
    )  # fmt: skip


def training_loss(
    text: Tensor,
    length_at: Callable[[int], int],
    generator: torch.Generator,
    curve: list[list[float]],
    kinds: Sequence[str] = needle.KINDS,
) -> Callable[[DeepSeekV3, int], Tensor]:
    """The loss of one step: text, and the answers weighed more.

    Args:
        text: what is trained on. length_at: step → tokens of a row. generator: of the rows.
        curve: every ``CURVE_EVERY`` steps [step, share right of one-needle questions, of two-needle questions] of the
            steps since the last is appended. kinds: of the rows.
    """
    right: dict[bool, list[Tensor]] = {False: [], True: []}

    def loss_of(model: DeepSeekV3, step: int) -> Tensor:
        length = length_at(step)
        ids, is_answer = needle.training_rows(text, TOKENS_A_STEP // length, length, generator, kinds)
        logits, targets = model(ids).logits[:, :-1], ids[:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        said, answer, two = logits.argmax(-1) == targets, is_answer[:, 1:], needle.needs_two(ids)[:, 1:]
        for kind, found in right.items():
            found.append(said[answer & (two == kind)].float())
        if (step + 1) % CURVE_EVERY == 0:
            curve.append([step + 1, *(round(torch.cat(found).mean().item(), 4) for found in right.values())])
            right[False].clear(), right[True].clear()
        return losses.mean() + ANSWER_WEIGHT * losses[answer].sum() / max(1, int(answer.sum()))

    return loss_of


def measure(
    model: DeepSeekV3, unseen: Tensor, rows: int, lengths: Sequence[int] = LENGTHS, controls: bool = True
) -> dict[str, Any]:
    """The needle map and all that stands beside it; every model is asked the same.

    Args:
        model: reads the longest of the lengths. unseen: text that was not trained on. rows: prompts a cell.
        lengths: of the rows, in tokens. controls: whether shuffled keys and linked questions are asked as well.

    Returns:
        "map": length → share right at each of ``DEPTHS``; "answer_loss": length → mean loss of the right answer,
        nats; "shuffled", "linked": length → share right, over ``CONTROLS``; "loss_by_position": nats a byte of plain
        text in ``POSITION_BINS`` parts of rows of the longest length.
    """
    found: dict[str, Any] = {"map": {}, "answer_loss": {}} | ({"shuffled": {}, "linked": {}} if controls else {})
    for length in lengths:
        generator, apart = (torch.Generator().manual_seed(seed + length) for seed in (77, 1077))
        scores, control, linked = [], [], []
        for depth in DEPTHS:
            asked = needle.prompts(unseen, rows, length, depth, generator)
            scores.append(needle.score(model, asked))
            if controls and depth in CONTROLS:
                control.append(needle.score(model, needle.shuffled_keys(asked, apart)).right)
                both = needle.prompts(unseen, rows, length, depth, apart, linked=True)
                linked.append(needle.score(model, both).right)
        found["map"][str(length)] = [round(one.right, 4) for one in scores]
        found["answer_loss"][str(length)] = round(sum(one.loss for one in scores) / len(scores), 4)
        if controls:
            found["shuffled"][str(length)] = round(sum(control) / len(control), 4)
            found["linked"][str(length)] = round(sum(linked) / len(linked), 4)
    plain = rows_of(unseen, PLAIN_ROWS, lengths[-1], torch.Generator().manual_seed(78))
    found["loss_by_position"] = [round(loss, 4) for loss in needle.loss_by_position(model, plain, POSITION_BINS)]
    return found


def with_config(model: DeepSeekV3, config: ModelConfig) -> DeepSeekV3:
    """The same weights under another configuration of RoPE."""
    stretched = DeepSeekV3(config)
    stretched.load_state_dict(model.state_dict())
    return stretched.eval()


def trained(
    seed: int, steps: int, text: Tensor, curve: list[list[float]], kinds: Sequence[str] = needle.KINDS
) -> DeepSeekV3:
    """The base model of a seed; ``curve`` takes how it learned, ``kinds`` are those of its rows."""

    def length_at(step: int) -> int:
        return TRAINED // 2 if step < SHORT_SHARE * steps else TRAINED

    base = DeepSeekV3(base_config(), torch.Generator().manual_seed(seed))
    losses = training_loss(text, length_at, torch.Generator().manual_seed(100 + seed), curve, kinds)
    for _ in train(base, steps, losses):
        pass
    print(f"seed {seed}, trained: {curve[-1:]}", flush=True)
    return base


def extend(model: DeepSeekV3, text: Tensor, steps: int, seed: int) -> None:
    """V3's two phases at the last learning rate, in place."""
    for phase in phases(TRAINED, TARGET, steps, TOKENS_A_STEP):
        generator = torch.Generator().manual_seed(200 + seed)
        losses = training_loss(text, lambda _, length=phase.length: length, generator, [])
        for _ in train(model, phase.steps, losses, peak=PEAK_LEARNING_RATE / 10, constant=True):
            pass


def read_wrongly(model: DeepSeekV3, unseen: Tensor, rows: int) -> dict[str, Any]:
    """What a model that YaRN extended comes to under each of ``MISTAKES``, and under none of them ("right")."""
    yarn = model.config.rope_scaling
    ports = {"right": yarn} | {name: mistake(yarn) for name, mistake in MISTAKES.items()}
    return {
        name: measure(
            with_config(model, model.config.replace(rope_scaling=scaling)), unseen, rows, (TRAINED, TARGET), False
        )
        for name, scaling in ports.items()
    }


def run(seed: int, steps: int, extension_steps: int, rows: int) -> dict[str, Any]:
    """Train, stretch, measure, extend, measure again; then the ports that err."""
    started = time.process_time()
    text, unseen = manual()
    found: dict[str, Any] = {"learning": [], "methods": {}, "mistakes": {}}
    base = trained(seed, steps, text, found["learning"])
    found["trained"] = measure(base, unseen, rows, lengths=(TRAINED,))
    for method in METHODS:
        model = with_config(base, extended_config(base.config, method, TRAINED, TARGET, FACTOR))
        before = measure(model, unseen, rows)
        extend(model, text, extension_steps, seed)
        found["methods"][method] = {"before": before, "after": measure(model, unseen, rows)}
        if method == "yarn":
            found["mistakes"][f"{FACTOR:g}"] = read_wrongly(model, unseen, rows)
    model = with_config(base, extended_config(base.config, "yarn", TRAINED, TARGET, V3_FACTOR))
    extend(model, text, extension_steps, seed)
    found["mistakes"][f"{V3_FACTOR:g}"] = read_wrongly(model, unseen, rows)
    return found | {"seconds": round(time.process_time() - started)}


def practise(seed: int, steps: int, rows: int) -> dict[str, Any]:
    """Train on ``PRACTICE`` and measure at the trained length: are two needles a matter of having seen too few?"""
    started, curve = time.process_time(), []
    text, unseen = manual()
    base = trained(seed, steps, text, curve, PRACTICE)
    measured = measure(base, unseen, rows, lengths=(TRAINED,))
    return {"learning": curve, "trained": measured, "seconds": round(time.process_time() - started)}


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing from the log."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the log")
    parser.add_argument("--steps", type=int, default=1200, help="of the base model")
    parser.add_argument("--extension-steps", type=int, default=50, help="of each of the two phases")
    parser.add_argument("--rows", type=int, default=16, help="prompts for each cell of the map")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--practice", action="store_true", help="the base model alone, on more two-needle questions")
    asked = parser.parse_args(argv)
    torch.set_num_threads(1)  # for so small a model, sharing the work costs more than it saves
    if asked.practice:
        settings = [{"seed": seed, "steps": asked.steps, "rows": asked.rows} for seed in asked.seeds]
        record("needle_practice", settings, practise, asked.out)
        return
    sizes = {"steps": asked.steps, "extension_steps": asked.extension_steps, "rows": asked.rows}
    record("needle_study", [{"seed": seed, **sizes} for seed in asked.seeds], run, asked.out)


if __name__ == "__main__":
    main()
