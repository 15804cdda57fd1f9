"""What does multi-token prediction buy? Small models with and without it, and three ways to build it, over seeds.

All models of a seed start from the same weights of the main model and read the same text. They differ in what hangs
behind it in training, two depths of equal size:

- "none": nothing, next-token prediction alone;
- "longer": nothing either, but with as much more text as fits into the time that a chain takes;
- "chain": DeepSeek-V3's, module k reads the hidden state of module k − 1 and the embedding of token i + k (Eq. 21);
- "before_norm": the same chain, but what is handed on is the state before the norm that the head reads;
- "heads": independent heads in the manner of Medusa. Each reads the main model's hidden state and the embedding of
  the token at i, which the model knows anyway: modules of the same size, which see no further token.

Half of the training rows are text. The other half are sums with the leading digit first (``37+48=085;``), where the
first digits of an answer hang on a carry that is worked out for later ones: a task in which it pays to plan. Measured
afterwards, with the modules put aside, are the loss on new text, the digits of new sums, and how much a linear probe
reads off the hidden state of the tokens two and three places on; with them, what drafts would be accepted.

    python -m dsv3lib.studies.mtp_ways
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from ..layers.step import Step
from ..model import DeepSeekV3
from ..model.loss import next_token_loss
from .log import FOLDER, record
from .small_models import BYTES, manual, rows_of, small_config, train

KINDS = ("none", "chain", "before_norm", "heads", "longer")
PLAIN = ("none", "longer")
"""Kinds that train the main model alone."""
SEEDS = (0, 1, 2, 3, 4)
STEPS, LENGTH, DEPTHS = 500, 128, 2
LONGER = 2.2
"""Times as many steps for "longer": what a step with two modules behind two blocks takes, over one without."""
PROBED = (2, 3)
"""How many tokens ahead the probe is asked for."""
_SUM = 10  # bytes of one sum, "37+48=085;"
_ANSWER = 6  # where in it the answer begins
_UNSEEN = 5  # one pair of summands in so many is never trained on


def model_of(seed: int) -> DeepSeekV3:
    """A fresh model with two MTP modules; every kind of a seed has the same main weights."""
    config = small_config(BYTES, 16, num_nextn_predict_layers=DEPTHS)
    return DeepSeekV3(config, torch.Generator().manual_seed(seed))


def depth_logits(
    model: DeepSeekV3, rows: Int64[Tensor, "B T"], kind: str
) -> tuple[list[Float[Tensor, "B Tk vocab"]], Float[Tensor, "B T D"]]:
    """Logits of the main model and of each depth, as the kind builds it; and the main head's input.

    Args:
        model: with two modules. rows: token ids.
        kind: of ``KINDS``, or "own_target": a chain that is shown what it is to predict.
    """
    main, mtp = model.model.layers[: model.model.n_main], model.model.layers[model.model.n_main :]
    step, embeddings = model.begin(rows), model.model.embed_tokens(rows)
    x = embeddings
    for block in main:
        x, _ = block(x, step)
    hidden = step.backend.norm(model.model.norm, x)
    logits = [model.lm_head(hidden)]
    handed_on = x if kind == "before_norm" else hidden
    for k, module in enumerate(() if kind in PLAIN else mtp, start=1):
        width = rows.shape[1] - k
        handed_on = (hidden if kind == "heads" else handed_on)[:, :width]
        seen = embeddings[:, :width] if kind == "heads" else embeddings[:, k:]
        if kind == "own_target":  # one place too far; the last position has no target
            seen = torch.cat([embeddings[:, k + 1 :], embeddings[:, -1:]], 1)
        ahead: Step = replace(step, rotations=step.rotations[:width])
        x, _ = module(module.enter(handed_on, seen, ahead), ahead)
        normalised = module.leave(x, ahead)
        logits.append(model.lm_head(normalised))
        handed_on = x if kind == "before_norm" else normalised
    return logits, hidden


def sums(count: int, rows: int, unseen: bool, generator: torch.Generator) -> Int64[Tensor, "rows bytes"]:
    """Rows of ``count`` sums of two numbers below 100, the answer in three digits, the leading one first.

    Args:
        count: sums in a row. rows: how many rows. unseen: pairs that training never has, or only those that it has.
        generator: of the numbers.
    """
    a, b = (torch.randint(100, (rows * count,), generator=generator) for _ in range(2))
    # A pair belongs to the unseen where a + 3b ends so; b is moved into the class that is asked for.
    wrong = ((a + 3 * b) % _UNSEEN == 0) != unseen
    while bool(wrong.any()):
        b = torch.where(wrong, torch.randint(100, b.shape, generator=generator), b)
        wrong = ((a + 3 * b) % _UNSEEN == 0) != unseen
    text = "".join(f"{x:02d}+{y:02d}={x + y:03d};" for x, y in zip(a.tolist(), b.tolist(), strict=True))
    return torch.tensor(list(text.encode())).view(rows, count * _SUM)


def train_one(kind: str, seed: int, steps: int = STEPS) -> Iterator[tuple[DeepSeekV3, float]]:
    """Train a model; gives it and the step's loss after each step."""
    text, _ = _text()
    model, generator = model_of(seed), torch.Generator().manual_seed(1000 + seed)

    def loss_of(model: DeepSeekV3, step: int) -> Tensor:
        plain = rows_of(text, 4, LENGTH, generator)
        rows = torch.cat([plain, sums(13, 4, False, generator)[:, :LENGTH]])
        logits, _ = depth_logits(model, rows, kind)
        losses = [next_token_loss(one, rows, k) for k, one in enumerate(logits, start=1)]
        return losses[0] + (model.mtp_loss_weight / DEPTHS * sum(losses[1:]) if losses[1:] else 0.0)

    for loss in train(model, round(LONGER * steps) if kind == "longer" else steps, loss_of):
        yield model, loss


@functools.cache
def _text() -> tuple[Tensor, Tensor]:
    return manual()


def run(kind: str, seed: int, steps: int = STEPS) -> dict[str, Any]:
    """Train one model and measure it; everything that JSON can hold."""
    started = time.process_time()
    for model, _loss in train_one(kind, seed, steps):  # noqa: B007  (the last one is what is measured)
        pass
    trained = time.process_time() - started
    text, unseen = _text()
    found = {"text_loss": text_loss(model, unseen), "digits": digit_accuracy(model)}
    found["probe"] = {str(n): probe(model, text, unseen, n) for n in PROBED}
    if kind not in PLAIN:
        found |= acceptance(model, unseen, kind)
    if kind in ("chain", "before_norm"):
        other = {"chain": "before_norm", "before_norm": "chain"}[kind]
        found["handed_wrongly"] = acceptance(model, unseen, other)
    return found | {"seconds": round(trained, 1)}


@torch.no_grad()
def text_loss(model: DeepSeekV3, unseen: Tensor, rows: int = 96) -> float:
    """Nats per byte of the main model on new text; every model is asked the same."""
    ids = rows_of(unseen, rows, LENGTH, torch.Generator().manual_seed(99))
    return round(next_token_loss(depth_logits(model, ids, "none")[0][0], ids, 1).item(), 5)


@torch.no_grad()
def digit_accuracy(model: DeepSeekV3, rows: int = 40, count: int = 12) -> list[float]:
    """How often each digit of a new sum's answer is the likeliest, the digits before it given; leading digit first."""
    ids = sums(count, rows, True, torch.Generator().manual_seed(98))
    right = depth_logits(model, ids, "none")[0][0][:, :-1].argmax(-1) == ids[:, 1:]
    right = F.pad(right, (1, 0)).view(rows, count, _SUM)[:, 2:]  # the first sums show what the row is
    return [round(right[..., _ANSWER + d].double().mean().item(), 4) for d in range(3)]


@torch.no_grad()
def acceptance(model: DeepSeekV3, unseen: Tensor, kind: str, rows: int = 64) -> dict[str, list[float]]:
    """What the depths' guesses on new text are worth as drafts; every model is asked the same.

    Returns:
        By depth: "depth_loss" in nats per byte; "greedy", how often the likeliest token is the main model's own
        likeliest one there; "sampled", Σ_x min(p, q), the probability that a draft drawn from q stands.
    """
    ids = rows_of(unseen, rows, LENGTH, torch.Generator().manual_seed(97))
    logits, _ = depth_logits(model, ids, kind)
    found: dict[str, list[float]] = {"depth_loss": [], "greedy": [], "sampled": []}
    for k, guess in enumerate(logits[1:], start=1):
        said = logits[0][:, k:]  # the model's own word on the same token: k positions later
        overlap = torch.minimum(said.softmax(-1), guess.softmax(-1)).sum(-1)
        found["depth_loss"].append(round(next_token_loss(guess, ids, k + 1).item(), 5))
        found["greedy"].append(round((said.argmax(-1) == guess.argmax(-1)).double().mean().item(), 4))
        found["sampled"].append(round(overlap.double().mean().item(), 4))
    return found


def probe(model: DeepSeekV3, text: Tensor, unseen: Tensor, ahead: int, steps: int = 70) -> float:
    """Nats per byte with which a linear softmax on the frozen hidden state names the token ``ahead`` places on.

    Args:
        model: frozen. text: the probe learns on it. unseen: it is asked on it. ahead: 1 is the next token.
        steps: of Adam, over all positions at once.
    """

    def states(source: Tensor, seed: int, rows: int) -> tuple[Tensor, Tensor]:
        ids = rows_of(source, rows, LENGTH, torch.Generator().manual_seed(seed))
        with torch.no_grad():
            hidden = depth_logits(model, ids, "none")[1]
        return hidden[:, :-ahead].flatten(0, 1), ids[:, ahead:].flatten()

    (x, y), (x_new, y_new) = states(text, 96, 96), states(unseen, 95, 64)
    mean, spread = x.mean(0), x.std(0)
    layer = torch.nn.Linear(x.shape[1], BYTES)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        optimizer.zero_grad()
        F.cross_entropy(layer((x - mean) / spread), y).backward()
        optimizer.step()
    with torch.no_grad():
        return round(F.cross_entropy(layer((x_new - mean) / spread), y_new).item(), 5)


def by_seed(rows: list[dict[str, Any]], kind: str, value: Callable[[dict[str, Any]], float]) -> list[float]:
    """One value of every run of a kind, in the order of the seeds: what lines up, seed for seed, with another kind's.

    Args:
        rows: of the log. kind: of ``KINDS``. value: takes a row.
    """
    return [value(row) for row in sorted(rows, key=lambda row: row["seed"]) if row["kind"] == kind]


def difference(
    rows: list[dict[str, Any]], kind: str, value: Callable[[dict[str, Any]], float], against: str = "none"
) -> list[float]:
    """How much more a kind has than another, seed by seed; what the seed itself does cancels out.

    Args:
        rows: of the log. kind, against: of ``KINDS``. value: takes a row.
    """
    return [a - b for a, b in zip(by_seed(rows, kind, value), by_seed(rows, against, value), strict=True)]


def parameters(kind: str) -> int:
    """Trained parameters of a kind."""
    with torch.device("meta"):
        model = DeepSeekV3(small_config(BYTES, 16, num_nextn_predict_layers=0 if kind in PLAIN else DEPTHS))
    return sum(p.numel() for p in model.parameters())


def main() -> None:
    """Run what is missing from the log."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the log")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    asked = parser.parse_args()
    torch.set_num_threads(1)  # for so small a model, sharing the work costs more than it saves
    record("mtp_ways", [{"kind": k, "seed": s} for s in asked.seeds for k in asked.kinds], run, asked.out)


if __name__ == "__main__":
    main()
