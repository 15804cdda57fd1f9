"""Study: four ways to balance a mixture of experts, over seeds, from the same weights on the same text.

    python -m dsv3lib.studies.balance_ways            # about ten minutes on one core

Each run trains ``nano`` for 120 steps of 1,024 tokens. What is asked after the last step is asked of the *frozen*
model: its loss on documents that training never saw, its balance on the training mixture, and which expert works
for which domain's documents. A model that was balanced by the bias is settled before: some more forward passes
in which nothing but the bias moves, by smaller and smaller steps. Without that, a snapshot shows one swing of the
bias and not the place that it swings around.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..config import ModelConfig
from ..model import DeepSeekV3
from ..training.loop.balance import domain_load, max_violation, update_bias
from ..training.loop.comparison import Outcome, compare
from ..training.loop.settings import TrainingConfig
from ..training.loop.specialisation import Specialisation, specialisation_test
from ..training.text.data import PackedStream
from ..training.text.folder import open_domains
from ..training.text.tokenizer import default_tokenizer
from .log import FOLDER, record

STEPS, SEEDS = 120, (1, 2, 3)
SETTINGS = (
    {"way": "none"},
    {"way": "bias", "speed": 0.01},
    {"way": "sequence", "alpha": 0.02},
    {"way": "sequence", "alpha": 0.2},
    {"way": "batch", "alpha": 0.02},
)
LEARNING_RATE, SEQUENCE, EVERY = 3e-3, 128, 10
SETTLING = torch.logspace(-2, -3.3, 100).tolist()
"""γ of the settling passes, from 0.01 down to 0.0005."""
_ROWS = 32


@functools.cache
def _text() -> tuple:
    return open_domains()[0], default_tokenizer()


def stream(seed: int) -> PackedStream:
    """The training text of a seed, from its beginning."""
    domains, tokenizer = _text()
    return PackedStream(domains, tokenizer, seq_len=SEQUENCE, seed=seed)


def small_model(seed: int) -> DeepSeekV3:
    """``nano`` without MTP modules, as it is before training."""
    config = ModelConfig.preset("nano").replace(num_nextn_predict_layers=0, vocab_size=_text()[1].vocab_size)
    return DeepSeekV3(config, torch.Generator().manual_seed(seed))


def run(
    seed: int, way: str, speed: float | None = None, alpha: float | None = None, steps: int = STEPS
) -> dict[str, Any]:
    """Train once, freeze, and measure; everything that JSON can hold."""
    config = TrainingConfig(
        steps=steps, seed=seed, learning_rate=LEARNING_RATE, ema_decay=0, validation_batches=4, threads=1
    )
    biases: list[Tensor] = []

    def watch(_way: str, row: dict[str, Any]) -> None:
        load = torch.tensor(row["expert_load"])
        before = biases[-1] if biases else torch.zeros(load.shape)
        after = before.clone()
        for bias, counts in zip(after, load, strict=True):
            update_bias(bias, counts, row["bias_speed"])
        biases.append(after)

    outcome = compare(
        lambda: (small_model(seed), stream(seed), {}), config, [way], speed=speed, alpha=alpha, on_step=watch
    )[0]
    return _of_training(outcome, torch.stack(biases)) | frozen(outcome, way, seed)


def _of_training(outcome: Outcome, bias: Tensor) -> dict[str, Any]:
    """What the run's own records say, thinned to every tenth step."""
    tail = outcome.tail()
    return {
        "violation": _rounded(_thin(outcome.batch_violation)),
        "loss": _rounded(_thin(outcome.loss)),
        "tail_batch_violation": _rounded(tail.batch_violation.mean(0)),
        "tail_global_violation": _rounded(tail.global_violation()),
        "validation_loss": round(outcome.validation.loss, 5),
        "bias": _rounded(bias[EVERY - 1 :: EVERY]) if outcome.way == "bias" else None,
    }


def frozen(outcome: Outcome, way: str, seed: int) -> dict[str, Any]:
    """Measure the frozen model; one that was balanced by the bias is settled first."""
    model = outcome.model.eval()
    text = stream(seed)
    text.next_batch(STEPS * 8)  # past what it was trained on
    if way == "bias":
        settle(model, text)
    mixture = sum(expert_load(model, text) for _ in range(24))
    loads, domain = document_loads(model, text)
    test = specialisation_test(loads, domain, 499, torch.Generator().manual_seed(seed))
    by_domain = torch.stack([loads[domain == d].sum(0) for d in range(len(text.domain_names))])
    return {
        "frozen_violation": _rounded(max_violation(mixture)),
        "settled_validation_loss": round(validation_loss(model, text), 5),
        "documents": len(domain),
        "bits": _rounded(test.bits),
        "bits_by_chance": _rounded(test.by_chance.mean(0)),
        "p_value": _rounded(test.p_value),
        "domains": text.domain_names,
        "by_domain": by_domain.transpose(0, 1).tolist(),
    }


@torch.no_grad()
def settle(model: DeepSeekV3, text: PackedStream, speeds: list[float] | None = None) -> None:
    """Move nothing but the bias of a trained model, by smaller and smaller steps, on training text.

    Args:
        model: its biases are changed in place, its weights are not. text: gives a batch for each pass.
        speeds: γ of each pass, ``SETTLING`` by default.
    """
    for speed in SETTLING if speeds is None else speeds:
        for router, load in zip(model.routers(), expert_load(model, text), strict=True):
            update_bias(router, load, speed)


@torch.no_grad()
def expert_load(model: DeepSeekV3, text: PackedStream) -> Int[Tensor, "layers E"]:
    """Visits of the next batch of text to each expert."""
    ids = text.next_batch(8).input_ids
    return model(ids.to(model.lm_head.weight.device)).expert_load.cpu()


@torch.no_grad()
def document_loads(
    model: DeepSeekV3, text: PackedStream, rows: int = _ROWS
) -> tuple[Int[Tensor, "documents layers E"], Int[Tensor, " documents"]]:
    """Visits of each validation document to each expert, and the document's domain.

    Args:
        model: frozen. text: knows the validation documents. rows: of 64 tokens, at most, of each domain.
    """
    device, loads, domain = model.lm_head.weight.device, [], []
    for number, name in enumerate(text.domain_names):
        for batch in text.validation_batches(name, 1, rows, seq_len=64):
            out, ids = model(batch.input_ids.to(device)), batch.document_ids
            loads.append(
                domain_load(out.expert_indices, ids, int(ids.max()) + 1, model.config.n_routed_experts)
            )
            domain += [number] * len(loads[-1])
    return torch.cat(loads), torch.tensor(domain)


def specialisation(
    model: DeepSeekV3, text: PackedStream, shuffles: int, draw: torch.Generator
) -> Specialisation:
    """What the domain tells of the expert in each layer with experts, the MTP modules' left out.

    Args:
        model: frozen. text: knows the validation documents. shuffles, draw: see ``specialisation_test``.
    """
    loads, domain = document_loads(model, text)
    layers = model.config.num_hidden_layers - model.config.first_k_dense_replace
    return specialisation_test(loads[:, :layers], domain, shuffles, draw)


def validation_loss(model: DeepSeekV3, text: PackedStream) -> float:
    """Nats per token over all domains' validation documents."""
    from ..training.loop.evaluate import evaluate

    return evaluate(model, text).loss


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The recorded runs by way to balance, each in a few numbers.

    Args:
        rows: of ``log.read("balance_ways")``.

    Returns:
        Name (with α) → "seeds": how many; "violation": MaxVio of the frozen model by seed, the mean over layers;
        "bits": what a domain tells of an expert, likewise; "loss": validation loss less that of the unbalanced
        run of the same seed, by seed, in nats per token.
    """
    base = {row["seed"]: row["settled_validation_loss"] for row in rows if row["way"] == "none"}
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        name = row["way"] + (f", α = {row['alpha']:g}" if row.get("alpha") else "")
        one = found.setdefault(name, {"seeds": 0, "violation": [], "bits": [], "loss": []})
        one["seeds"] += 1
        one["violation"].append(_mean(row["frozen_violation"]))
        one["bits"].append(_mean(row["bits"]))
        one["loss"].append(row["settled_validation_loss"] - base[row["seed"]])
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _thin(rows: Tensor) -> Tensor:
    """Means of ``EVERY`` steps."""
    whole = len(rows) // EVERY * EVERY
    return rows[:whole].unflatten(0, (-1, EVERY)).double().mean(1)


def _rounded(values: Tensor) -> Any:
    return torch.round(values.double(), decimals=4).tolist()


def main() -> None:
    """Run what is missing from the log."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the log")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    record("balance_ways", [{"seed": s, **one} for one in SETTINGS for s in asked.seeds], run, asked.out)


if __name__ == "__main__":
    main()
