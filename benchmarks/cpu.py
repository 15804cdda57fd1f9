"""dsv3lib against transformers on a CPU: prefill, decode, training, memory.

    python benchmarks/cpu.py            # about five minutes; writes data/results/cpu-<date>.json and a figure
    python benchmarks/cpu.py --quick    # about one minute, up to 512 tokens; writes nothing unless --out is given

Both sides have identical weights, and logits are compared before anything is timed. In each column the peer
runs in the fastest of its backends, which is found anew there. The two sides then take turns.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import bounds
import torch
from measure import Timing, command_line, copy_bandwidth, interleave, keep, machine, matrix_peak, seconds_of
from memory import peak_of
from ours import CONFIG, Ours
from peer import Backend, Peer, backends
from products import alone, products_of
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from dsv3lib import ModelConfig, openmp

CONTEXTS = (128, 512, 2048, 8192)
TRAIN_BATCH = (8, 256)
DECODE_TOKENS = 16  # in a row in each round
TOLERANCE = 1e-4  # largest difference of logits (FP32, of order 1) and of gradients relative to the largest
TIES = 1 / 2000  # of a prompt's tokens
GIVE_UP = 3.0  # a backend this many times slower than the best is not tried at greater lengths
BOUND_BY = {
    "prefill": "the matrix peak, and the softmax's exponentials at long contexts",
    "decode": "reading the weights and starting some 300 small operations at short contexts, one core's arithmetic on "
    "the cache at long ones",
    "train": "its matrix products, which alone take most of the step, then elementwise traffic",
}


class LogitsDiffer(RuntimeError):
    """The two sides do not compute the same thing, so that no timing would mean anything."""


@dataclass
class Column:
    """One measured column.

    Args:
        work: "prefill", "decode" or "train". context: tokens. tokens: how many one round makes or reads.
        backend: the peer's fastest. tried: its candidates and their seconds.
        difference: largest difference of logits (or of the loss).
        bound: seconds at the machine's limits, for one call or, when decoding, for one token.
        memory: peak memory of each side. products: what our matrix products take alone, see ``products``.
    """

    work: str
    context: int
    tokens: int
    backend: Backend
    tried: dict[str, float]
    timings: dict[str, Timing]
    difference: float
    bound: Callable[[bounds.Limits], float]
    memory: dict[str, dict[str, float]] = field(default_factory=dict)
    products: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """How many times faster we are."""
        return self.timings["peer"].median / self.timings["ours"].median

    def limit_s(self, limits: bounds.Limits) -> float:
        """The least seconds that one round could take on this machine."""
        return self.bound(limits) * (self.tokens if self.work == "decode" else 1)

    def as_json(self, limits: bounds.Limits) -> dict[str, Any]:
        """The column for the results file."""
        bound_s = self.limit_s(limits)
        ours, peer = self.timings["ours"], self.timings["peer"]
        return {
            "work": self.work,
            "context": self.context,
            "ratio": round(self.ratio, 3),
            "ours_tokens_per_s": round(self.tokens / ours.median, 1),
            "peer_tokens_per_s": round(self.tokens / peer.median, 1),
            "ours": ours.summary(),
            "peer": peer.summary(),
            "peer_backend": str(self.backend),
            "peer_backends_tried_ms": {name: round(1e3 * s, 3) for name, s in self.tried.items()},
            "largest_difference": self.difference,
            "limit_ms": round(1e3 * bound_s, 4),
            "share_of_limit": round(bound_s / ours.median, 3),
            "bound_by": BOUND_BY[self.work],
            "memory": self.memory,
            "products": self.products,
        }


class Comparison:
    """Both sides, the machine's limits, and the columns measured so far.

    Args:
        config: sizes. budget_s: seconds of interleaved rounds per column. progress: called with each step's name.
    """

    def __init__(self, config: ModelConfig, budget_s: float, progress: Callable[[str], None]) -> None:
        self.config, self.budget_s, self.progress = config, budget_s, progress
        self.ours = Ours(config, seed=0)
        self.peer = Peer(self.ours.model)
        self.limits = bounds.Limits(0.0, 0.0)
        self.columns: list[Column] = []
        self._candidates = {"prefill": backends(), "decode": backends(), "train": backends()}

    def look_at_limits(self) -> None:
        """Measure the machine's peaks once more and keep the best: on a busy machine one look may miss them."""
        peak, bandwidth = matrix_peak(budget_s=0.2), copy_bandwidth(budget_s=0.2)
        self.limits = bounds.Limits(max(peak, self.limits.flops), max(bandwidth, self.limits.bandwidth))

    def fastest(self, work: str, call: Callable[[], Any], trials: int) -> tuple[Backend, dict[str, float]]:
        """The peer's best backend for a call, by its best of ``trials`` runs, and what each took in seconds."""
        tried: dict[Backend, float] = {}
        for backend in self._candidates[work]:
            self.peer.use(backend)
            seconds = seconds_of(call)
            hopeless = tried and seconds > GIVE_UP * min(tried.values())
            for _ in range(0 if hopeless else trials - 1):
                seconds = min(seconds, seconds_of(call))
            tried[backend] = seconds
        best = min(tried, key=tried.__getitem__)
        self._candidates[work] = [b for b, s in tried.items() if s <= GIVE_UP * tried[best]]
        self.peer.use(best)
        return best, {str(b): s for b, s in tried.items()}

    @torch.inference_mode()
    def prefill_and_decode(self, context: int) -> None:
        """Read ``context`` tokens into an empty cache; then one token more at that context."""
        sides = {"ours": self.ours, "peer": self.peer}
        ids = torch.randint(
            self.config.vocab_size, (1, context + 1), generator=torch.Generator().manual_seed(context)
        )
        prompt, token = ids[:, :-1], ids[:, -1:]
        small = context <= 2048
        self.look_at_limits()
        self.progress(f"prefill {context}")
        best, tried = self.fastest(
            "prefill", lambda: self.peer.logits(prompt, self.peer.cache()), 3 if small else 1
        )
        caches = {name: side.cache() for name, side in sides.items()}
        logits = {name: side.logits(prompt, caches[name]) for name, side in sides.items()}
        difference = same(logits["ours"], logits["peer"], f"prefill {context}", ties=TIES)
        del logits
        timings = interleave(
            {name: lambda s=side: s.logits(prompt, s.cache()) for name, side in sides.items()},
            self.budget_s, least=5 if small else 2, warm_up=int(small),
        )  # fmt: skip
        limit = partial(bounds.prefill_seconds, self.config, context)
        self.columns.append(Column("prefill", context, context, best, tried, timings, difference, limit))

        self.progress(f"decode at {context}")

        def crop() -> None:
            """Back to the context asked for: each step adds one token."""
            if len(caches["ours"]) > context:
                caches["ours"].crop(context)
            surplus = caches["peer"].get_seq_length() - context
            if surplus:
                caches["peer"].crop(-surplus)

        def generate(side: str) -> None:
            """Several tokens in a row, as generation goes: the caches of the machine hold what it uses."""
            for _ in range(DECODE_TOKENS):
                sides[side].logits(token, caches[side])

        def peer_alone() -> None:
            crop()
            generate("peer")

        best, tried = self.fastest("decode", peer_alone, 3 if small else 1)
        crop()
        difference = same(
            self.ours.logits(token, caches["ours"]),
            self.peer.logits(token, caches["peer"]),
            f"decode {context}",
        )
        calls = {name: partial(generate, name) for name in sides}
        timings = interleave(calls, self.budget_s, least=4, warm_up=1, reset=crop)
        per_token = partial(bounds.decode_seconds, self.ours.model, context)
        self.columns.append(
            Column("decode", context, DECODE_TOKENS, best, tried, timings, difference, per_token)
        )

    def train(self, batch: int, tokens: int) -> None:
        """Forward and backward of one batch."""
        self.look_at_limits()
        self.progress(f"train {batch}x{tokens}")
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.config.vocab_size, (batch, tokens), generator=generator)
        # What prefill found hopeless (a copy of an expert's weights for every visit) is so in training too.
        self._candidates["train"] = self._candidates["prefill"]
        best, tried = self.fastest("train", lambda: self.peer.train_step(ids), 3)
        difference = same(self.ours.train_step(ids), self.peer.train_step(ids), "training loss")
        theirs = dict(self.peer.model.named_parameters())
        for name, parameter in self.ours.model.named_parameters():
            scale = theirs[name].grad.abs().max()
            same(parameter.grad / scale, theirs[name].grad / scale, f"gradient of {name}")
        sides = {"ours": lambda: self.ours.train_step(ids), "peer": lambda: self.peer.train_step(ids)}
        timings = interleave(sides, 2 * self.budget_s, least=5)
        limit = partial(bounds.train_seconds, self.config, batch, tokens)
        column = Column("train", tokens, batch * tokens, best, tried, timings, difference, limit)
        products = products_of(sides["ours"])
        column.products = {"count": len(products), "gflop": round(sum(p.flops for p in products) / 1e9, 2)}
        for name, seconds in alone(products, self.budget_s).items():
            column.products[f"{name}_ms"] = round(1e3 * seconds, 4)
        self.columns.append(column)

    def memory(self) -> None:
        """Peak memory of each side, for training and for the longest prefill."""
        for work in ("prefill", "train"):
            column = [c for c in self.columns if c.work == work][-1]
            for side in ("ours", "peer"):
                self.progress(f"memory of {work}, {side}")
                column.memory[side] = peak_of(side, work, column.tokens, str(column.backend))


def same(ours: torch.Tensor, peers: torch.Tensor, what: str, ties: float = 0.0) -> float:
    """The largest difference of two results; they must agree before either is timed.

    Args:
        ours, peers: [..., width]. what: for the error.
        ties: share of the rows (tokens) that may differ and then do not count. Where two experts' scores are as good
            as equal, rounding settles which is chosen: seen at one of 8,192 tokens, where FP64 sides with the peer.

    Raises:
        LogitsDiffer: by more than the tolerance, or one is not finite.
    """
    by_row = (ours - peers).abs().flatten(0, -2).amax(-1) if ours.ndim > 1 else (ours - peers).abs()
    agree = by_row <= TOLERANCE
    if int((~agree).sum()) > ties * by_row.numel():
        difference = float(by_row.max())
        raise LogitsDiffer(f"{what}: the sides differ by {difference:.2e}, expected at most {TOLERANCE:.0e}")
    return float(by_row[agree].max())


def table(columns: list[Column], limits: bounds.Limits) -> Table:
    """The columns as rows for a terminal."""
    shown = Table(
        title="dsv3lib against transformers, FP32, the same weights (medians of alternating rounds)"
    )
    for name in (
        "",
        "ours tok/s",
        "peer tok/s",
        "ratio",
        "peer's backend",
        "max |Δ|",
        "of the limit",
        "memory",
    ):
        shown.add_column(name, justify="left" if name in ("", "peer's backend") else "right")
    for c in columns:
        need = {side: m["peak_mib"] - m["before_mib"] for side, m in c.memory.items()}
        memory = f"{need['ours']:.0f} / {need['peer']:.0f} MiB" if need else ""
        rate = {name: f"{c.tokens / t.median:,.0f}" for name, t in c.timings.items()}
        share = f"{c.limit_s(limits) / c.timings['ours'].median:.0%}"
        name = f"{c.work} {c.context}"
        shown.add_row(
            name,
            rate["ours"],
            rate["peer"],
            f"{c.ratio:.2f}x",
            str(c.backend),
            f"{c.difference:.0e}",
            share,
            memory,
        )
    return shown


def products_line(column: Column) -> str:
    """What the training step's matrix products take alone, beside the whole step of either side."""
    ours, peer = (1e3 * column.timings[name].median for name in ("ours", "peer"))
    return (
        "train: our {count} matrix products ({gflop} GFLOP) alone, nothing between them, take {cached_ms:.0f} ms with "
        "their operands in the caches, {from_memory_ms:.0f} ms from memory; ".format(**column.products)
        + f"our whole step takes {ours:.0f}, the peer's {peer:.0f}."
    )


def run(
    config: ModelConfig, contexts: tuple[int, ...], batch: tuple[int, int], budget_s: float, memory: bool
) -> dict[str, Any]:
    """Measure all columns, show the table, return the results for the file."""
    began = time.perf_counter()
    steps = 2 * len(contexts) + 1 + (4 if memory else 0)
    with tqdm(total=steps, unit="step", disable=not sys.stderr.isatty()) as bar:

        def progress(name: str) -> None:
            bar.set_description(name)
            bar.update()

        comparison = Comparison(config, budget_s, progress)
        for context in contexts:
            comparison.prefill_and_decode(context)
        comparison.train(*batch)
        if memory:
            comparison.memory()
    console = Console(width=140)
    limits = comparison.limits
    console.print(table(comparison.columns, limits))
    console.print(f"matrix peak {limits.flops / 1e9:.0f} GFLOP/s, copy {limits.bandwidth / 1e9:.1f} GB/s")
    for work, by in BOUND_BY.items():
        console.print(f"{work}: bound by {by}.")
    console.print(products_line(comparison.columns[-1]))
    import transformers

    return {
        "what": "dsv3lib against transformers on a CPU, FP32, batch 1 (training 8), identical weights",
        "machine": {**machine(), "transformers": transformers.__version__},
        "matrix_peak_gflops": round(limits.flops / 1e9, 1),
        "copy_gb_per_s": round(limits.bandwidth / 1e9, 1),
        "seconds": round(time.perf_counter() - began, 1),
        "columns": [c.as_json(limits) for c in comparison.columns],
    }


def main() -> None:
    """The command line."""
    chosen = command_line(__doc__, "cpu", "up to 512 tokens, no memory").parse_args()
    torch.set_num_threads(chosen.threads)
    print(openmp.settle(chosen.threads))
    contexts = tuple(c for c in CONTEXTS if c <= 512) if chosen.quick else CONTEXTS
    results = run(CONFIG, contexts, TRAIN_BATCH, 2.0 if chosen.quick else 6.0, memory=not chosen.quick)
    keep(results, "cpu", chosen, picture="picture")


if __name__ == "__main__":
    main()
