"""Does FP8 change the loss? Three measures, since run against run the answer drowns in what routing amplifies.

    python benchmarks/fp8_loss.py --out data/results/fp8-loss-DATE.json        # goes on where it was stopped
    python benchmarks/fp8_loss.py --out … --only weights runs dense tiny       # some of its parts

(a) ``weights``: along one FP32 run, every few steps, loss and gradients by each recipe on that run's own weights
and the
    same batch. Nothing drifts here. ``outliers`` plants some, larger and larger.
(b) ``runs``: whole runs against their FP32 twins from the same start on the same text, over seeds; beside them a
control
    whose start is jittered by 1e-6 and which has no FP8 at all; ``dense`` the same without routing, ``tiny`` larger.
(c) A recipe with two bits of mantissa, and one with one, among all of these: what cannot see them sees nothing.

A verdict is the 95 % interval of the mean over seeds (Student's t) against 0.25 % (paper §3.3): "within", "beyond" or
"undecided", and undecided is a result. Everything is FP32 but for the recipe; one thread, real text.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from measure import commit, machine, write_json

from dsv3lib import DeepSeekV3, ModelConfig
from dsv3lib.fp8 import Recipe
from dsv3lib.fp8.effect import effects, relative_error
from dsv3lib.fp8.outliers import with_outliers
from dsv3lib.linear import PLAIN, PlainRecipe, set_recipe
from dsv3lib.training.loop.settings import TrainingConfig
from dsv3lib.training.loop.trainer import Trainer
from dsv3lib.training.text.data import PackedStream
from dsv3lib.training.text.folder import open_domains
from dsv3lib.training.text.tokenizer import default_tokenizer

CLAIM = 0.0025  # the paper's: relative loss error against BF16 below 0.25 %
JITTER = 1e-6
# Student's t, 97.5 %, by degrees of freedom; beyond 30 the normal's.
T = {
    1: 12.71,
    2: 4.30,
    3: 3.18,
    4: 2.78,
    5: 2.57,
    6: 2.45,
    7: 2.36,
    9: 2.26,
    11: 2.20,
    15: 2.13,
    19: 2.09,
    23: 2.07,
}
PLAN: dict[str, dict[str, Any]] = {
    "weights": {"preset": "nano", "steps": 300, "every": 10, "batch": 4, "seq_len": 64},
    "outliers": {"preset": "nano", "steps": 150, "batch": 8, "seq_len": 64, "every_token": 32,
                 "sizes": (1e3, 1e4, 1e5, 2e5, 4e5, 1e6)},
    "weights tiny": {"preset": "tiny", "steps": 60, "every": 20, "batch": 4, "seq_len": 64},
    "runs": {"preset": "nano", "seeds": 16, "steps": 60, "arms": ("jitter", "tile")},
    "controls": {
        "preset": "nano",
        "seeds": 8,
        "steps": 60,
        "arms": ("one bit", "two bits", "tile+block_gradients"),
    },
    "dense": {"preset": "nano", "seeds": 16, "steps": 60, "dense": True,
              "arms": ("jitter", "tile", "two bits")},
    "tiny": {"preset": "tiny", "seeds": 3, "steps": 40, "arms": ("jitter", "tile")},
}
BATCH, SEQ_LEN = 4, 64


def recipes() -> dict[str, PlainRecipe]:
    """All recipes of the study, by the names it uses."""
    tile = Recipe.named("tile")
    named = {name: Recipe.named(name) for name in ("tile", "tensor", "tile+block_gradients")}
    return named | {"two bits": tile.coarser(2), "one bit": tile.coarser(1)}


class Text:
    """The course's real text, opened once."""

    def __init__(self) -> None:
        self.tokenizer = default_tokenizer()
        self.domains, _ = open_domains()

    def stream(self, seed: int, seq_len: int = SEQ_LEN) -> PackedStream:
        """A stream whose order follows from the seed."""
        return PackedStream(self.domains, self.tokenizer, seq_len, seed=seed)


def config_of(preset: str, vocab: int, dense: bool = False) -> ModelConfig:
    """The preset without its MTP module; dense: without routing, every layer as the first."""
    config = ModelConfig.preset(preset).replace(num_nextn_predict_layers=0, vocab_size=vocab)
    return config.replace(first_k_dense_replace=config.num_hidden_layers) if dense else config


def fresh(config: ModelConfig, seed: int, jitter: float = 0.0) -> DeepSeekV3:
    """A model from a seed; jittered, each weight is multiplied by 1 + jitter · N(0, 1)."""
    draw = torch.Generator().manual_seed(seed)
    model = DeepSeekV3(config, draw)
    if jitter:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + jitter * torch.randn(parameter.shape, generator=draw))
    return model


def trained(
    model: DeepSeekV3, text: Text, seed: int, steps: int, recipe: PlainRecipe = PLAIN
) -> Iterator[dict[str, Any]]:
    """The records of a run, as they come."""
    set_recipe(model, recipe)
    settings = TrainingConfig(
        steps=steps,
        seed=seed,
        batch_size=BATCH,
        batch_size_start=BATCH,
        ema_decay=0,
        validation_batches=0,
        threads=1,
    )
    yield from Trainer(model, text.stream(seed), settings)


def losses_of(config: ModelConfig, text: Text, seed: int, steps: int, arm: str) -> list[float]:
    """The losses of one run of an arm, step by step."""
    model = fresh(config, seed, JITTER if arm == "jitter" else 0.0)
    recipe = recipes().get(arm, PLAIN)
    return [round(r["losses"]["main"], 6) for r in trained(model, text, seed, steps, recipe)]


# ---- (a) on a run's own weights -----------------------------------------------------------------------------


def along_a_run(plan: dict[str, Any], text: Text) -> list[dict[str, Any]]:
    """Each recipe's effect every few steps of one FP32 run."""
    model, found = fresh(config_of(plan["preset"], text.tokenizer.vocab_size), 0), []
    ids = text.stream(99, plan["seq_len"]).next_batch(plan["batch"]).input_ids
    for record in trained(model, text, 0, plan["steps"]):
        if record["step"] % plan["every"] == 0:
            made = {name: one.to_dict() for name, one in effects(model, ids, recipes()).items()}
            found.append(
                {"step": record["step"], "loss": round(record["losses"]["main"], 5), "effects": made}
            )
    return found


def with_planted_outliers(plan: dict[str, Any], text: Text) -> list[dict[str, Any]]:
    """After an FP32 run: loss and gradient with outliers of growing size in the inputs of the linear layers."""
    model, found = fresh(config_of(plan["preset"], text.tokenizer.vocab_size), 0), []
    for _ in trained(model, text, 0, plan["steps"]):
        pass
    ids = text.stream(99, plan["seq_len"]).next_batch(plan["batch"]).input_ids
    for size in plan["sizes"]:
        planted = {n: with_outliers(recipes()[n], size, plan["every_token"]) for n in ("tile", "tensor")}
        made = effects(model, ids, planted, with_outliers(PLAIN, size, plan["every_token"]))
        found.append({"size": size, "effects": {name: one.to_dict() for name, one in made.items()}})
    return found


# ---- (b) run against run ------------------------------------------------------------------------------------


def interval(differences: list[float]) -> dict[str, Any]:
    """Mean of the relative loss errors over seeds, its 95 % interval, and the verdict about the paper's 0.25 %."""
    n = len(differences)
    if n < 2:
        return {"seeds": n, "verdict": "undecided"}
    mean = sum(differences) / n
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1))
    freedom = max((f for f in T if f < n), default=1)  # the table's next smaller one: never too narrow
    half = T[freedom] * deviation / math.sqrt(n)
    low, high = mean - half, mean + half
    verdict = (
        "within"
        if max(abs(low), abs(high)) < CLAIM
        else "beyond"
        if low > CLAIM or high < -CLAIM
        else "undecided"
    )
    return {"seeds": n, "mean": mean, "low": low, "high": high, "deviation": deviation, "verdict": verdict}


def summary(runs: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """The interval of each arm over the seeds that have both runs."""
    arms = {arm for seed in runs.values() for arm in seed if arm != "fp32"}
    return {
        arm: interval([relative_error(s[arm], s["fp32"]) for s in runs.values() if arm in s and "fp32" in s])
        for arm in sorted(arms)
    }


def run_part(
    name: str, plan: dict[str, Any], text: Text, results: dict[str, Any], save: Callable[[], None]
) -> None:
    """One part, seed by seed; what stands in the results already is not made again."""
    store = "runs" if name == "controls" else name
    runs = results.setdefault(store, {}).setdefault("losses", {})
    config = config_of(plan["preset"], text.tokenizer.vocab_size, plan.get("dense", False))
    for seed in range(plan["seeds"]):
        done = runs.setdefault(str(seed), {})
        for arm in ("fp32", *plan["arms"]):
            if arm not in done:
                started = time.process_time()
                done[arm] = losses_of(config, text, seed, plan["steps"], arm)
                print(f"{name}: seed {seed}, {arm}: {time.process_time() - started:.0f} s", flush=True)
        results[store]["summary"] = summary(runs)
        save()


def main() -> None:
    """Run what is asked for and not there yet; after each seed the results are written whole."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=(*PLAN,), default=tuple(PLAN))
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    results.setdefault("about", {"machine": machine(), "commit": commit(), "plan": PLAN, "claim": CLAIM})
    text = Text()

    def save() -> None:
        write_json(args.out, results)

    for name in args.only:
        if name.startswith("weights") or name == "outliers":
            if name not in results:
                results[name] = (with_planted_outliers if name == "outliers" else along_a_run)(
                    PLAN[name], text
                )
                save()
                print(f"{name}: done", flush=True)
        else:
            run_part(name, PLAN[name], text, results, save)
    for part in ("runs", "dense", "tiny"):
        for arm, found in results.get(part, {}).get("summary", {}).items():
            if "mean" in found:
                low, high = 100 * found["low"], 100 * found["high"]
                print(
                    f"{part:6} {arm:22} {100 * found['mean']:+.3f} % [{low:+.3f}, {high:+.3f}]: {found['verdict']}"
                )


if __name__ == "__main__":
    main()
