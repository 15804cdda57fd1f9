"""dsv3lib against transformers on a CPU: passes over few tokens, short prompts, decoding in BF16.

    python benchmarks/cpu_few.py            # about three minutes; writes data/results/cpu-few-<date>.json
    python benchmarks/cpu_few.py --quick    # about a minute, at one context; writes nothing unless --out is given

Speculation's verification is a pass over 2 to 5 tokens behind a context, after which what fell is cropped away; it
should cost hardly more than a pass over one, so that one is timed in the same rounds. As in ``cpu``, both sides have
identical weights, results are compared before anything is timed, and the sides take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from cpu import DECODE_TOKENS, Comparison, LogitsDiffer, same
from measure import Timing, command_line, interleave, keep, machine
from ours import CONFIG, Ours
from peer import Peer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dsv3lib import ModelConfig, openmp

CONTEXTS = (128, 2048)
VERIFIED = (2, 4)  # tokens of a pass
PROMPTS = (16, 64, 128)
DECODED = (128, 2048, 8192)
PASSES = 8  # in a row in each round, so that the machine's caches hold what they hold in use
FURTHEST = 0.05  # of the logits' size: the middle token's error in BF16


@dataclass
class Column:
    """One measured column.

    Args:
        work: "verify", "prompt" or "decode in BF16". context: tokens before. tokens: of a pass.
        timings: of each side, seconds of a round. passes: of one round. backend: the peer's fastest.
        difference: of logits; in BF16 the middle token's error of each side beside FP32, relative.
    """

    work: str
    context: int
    tokens: int
    timings: dict[str, Timing]
    passes: int
    backend: str
    difference: dict[str, float]

    def ms(self, side: str) -> float:
        """Milliseconds of a pass."""
        return 1e3 * self.timings[side].median / self.passes

    def ratio(self, side: str) -> float:
        """How many times as long another side takes."""
        return self.ms(side) / self.ms("ours")

    def as_json(self) -> dict[str, Any]:
        """The column for the results file."""
        sides = {name: t.summary() | {"pass_ms": round(self.ms(name), 4)} for name, t in self.timings.items()}
        ratios = {name: round(self.ratio(name), 3) for name in self.timings if name != "ours"}
        fields = {name: getattr(self, name) for name in ("work", "context", "tokens", "passes", "difference")}
        return {**fields, "times_as_long": ratios, "sides": sides, "peer_backend": self.backend}


class FewTokens(Comparison):
    """Both sides in FP32.

    Args:
        config, budget_s, progress: as for ``cpu.Comparison``.
    """

    measured: list[Column]

    def __init__(self, config: ModelConfig, budget_s: float, progress: Callable[[str], None]) -> None:
        super().__init__(config, budget_s, progress)
        self.measured = []

    def ids(self, n: int) -> Tensor:
        """Tokens, the same every time."""
        return torch.randint(self.config.vocab_size, (1, n), generator=torch.Generator().manual_seed(n))

    @torch.inference_mode()
    def verify(self, context: int, n_new: int) -> None:
        """Read ``n_new`` tokens behind a context and forget them again, beside one token alone."""
        self.progress(f"{n_new} tokens at {context}")
        ids = self.ids(context + n_new)
        new, sides = ids[:, context:], {"ours": self.ours, "peer": self.peer}
        caches = {name: side.cache() for name, side in sides.items()}
        for name, side in sides.items():
            side.logits(ids[:, :context], caches[name])

        def passes(name: str, tokens: Tensor) -> None:
            for _ in range(PASSES):
                sides[name].logits(tokens, caches[name])
                crop(caches[name], context)

        best, _ = self.fastest("decode", lambda: passes("peer", new), 3)
        logits = [sides[name].logits(new, caches[name]) for name in sides]
        difference = same(*logits, f"{n_new} tokens at {context}")
        for name in sides:
            crop(caches[name], context)
        calls = {name: partial(passes, name, new) for name in sides}
        calls["one token"] = partial(passes, "ours", new[:, :1])
        timings = interleave(calls, self.budget_s, least=5)
        self.measured.append(
            Column("verify", context, n_new, timings, PASSES, str(best), {"largest": difference})
        )

    @torch.inference_mode()
    def prompt(self, n_new: int) -> None:
        """Read a prompt into an empty cache."""
        self.progress(f"prompt of {n_new}")
        ids, sides = self.ids(n_new), {"ours": self.ours, "peer": self.peer}

        def passes(name: str) -> None:
            for _ in range(PASSES):
                sides[name].logits(ids, sides[name].cache())

        best, _ = self.fastest("prefill", lambda: passes("peer"), 3)
        difference = same(
            *(side.logits(ids, side.cache()) for side in sides.values()), f"prompt of {n_new}"
        )
        timings = interleave({name: partial(passes, name) for name in sides}, self.budget_s, least=5)
        self.measured.append(Column("prompt", 0, n_new, timings, PASSES, str(best), {"largest": difference}))


class InBF16(FewTokens):
    """Both sides in BF16, and ours in FP32 on the same (rounded) weights."""

    def __init__(self, config: ModelConfig, budget_s: float, progress: Callable[[str], None]) -> None:
        super().__init__(config, budget_s, progress)
        self.fp32, self.ours = self.ours, Ours(config, seed=0)
        self.ours.model.bfloat16()
        self.fp32.model.load_state_dict(self.ours.model.state_dict())
        self.peer = Peer(self.ours.model, torch.bfloat16)

    @torch.inference_mode()
    def decode(self, context: int) -> None:
        """Token after token at a context."""
        self.progress(f"BF16 at {context}")
        ids = self.ids(context + DECODE_TOKENS)
        prompt, new = ids[:, :context], ids[:, context:]
        sides = {"ours": self.ours, "peer": self.peer, "ours in FP32": self.fp32}
        caches = {name: side.cache() for name, side in sides.items()}
        for name, side in sides.items():
            side.logits(prompt, caches[name])
        exact, *found = (
            sides[name].logits(new, caches[name]).float() for name in ("ours in FP32", "ours", "peer")
        )
        difference = {
            name: near(logits, exact, f"{name} in BF16 at {context}")
            for name, logits in zip(("ours", "peer"), found, strict=True)
        }

        def reset() -> None:
            for cache in caches.values():
                crop(cache, context)

        def write(name: str) -> None:
            for token in new.split(1, 1):
                sides[name].logits(token, caches[name])

        def peer_alone() -> None:
            reset()
            write("peer")

        best, _ = self.fastest("decode", peer_alone, 3 if context <= 2048 else 1)
        calls = {name: partial(write, name) for name in sides}
        timings = interleave(calls, self.budget_s, least=4, reset=reset)
        self.measured.append(
            Column("decode in BF16", context, 1, timings, DECODE_TOKENS, str(best), difference)
        )


def crop(cache: Any, context: int) -> None:
    """Back to the context, for either side's cache."""
    if hasattr(cache, "get_seq_length"):
        surplus = cache.get_seq_length() - context
        if surplus:
            cache.crop(-surplus)
    elif len(cache) > context:
        cache.crop(context)


def near(found: Tensor, exact: Tensor, what: str) -> float:
    """The middle token's relative error: one whose affinities are all but equal may meet other experts.

    Raises:
        LogitsDiffer: it is larger than BF16 explains, or not finite.
    """
    error = ((found - exact).square().mean(-1) / exact.square().mean(-1)).sqrt().median().item()
    if not error <= FURTHEST:
        raise LogitsDiffer(f"{what}: off by {error:.1%} from FP32, expected at most {FURTHEST:.0%}")
    return error


def table(columns: list[Column]) -> Table:
    """The columns as rows for a terminal."""
    shown = Table(title="dsv3lib against transformers, the same weights (medians of alternating rounds)")
    for name in ("", "ours ms", "peer ms", "peer / ours", "beside", "peer's backend", "difference"):
        shown.add_column(name, justify="left" if name in ("", "peer's backend") else "right")
    for c in columns:
        beside = ""
        if "one token" in c.timings:
            beside = f"{1 / c.ratio('one token'):.2f} passes over one token"
        elif "ours in FP32" in c.timings:
            beside = f"{1 / c.ratio('ours in FP32'):.2f} of our FP32"
        difference = ", ".join(f"{name} {value:.0e}" for name, value in c.difference.items())
        shown.add_row(
            f"{c.work}: {c.tokens} at {c.context}", f"{c.ms('ours'):.2f}", f"{c.ms('peer'):.2f}",
            f"{c.ratio('peer'):.2f}x", beside, c.backend, difference,
        )  # fmt: skip
    return shown


def run(
    config: ModelConfig, contexts: tuple[int, ...], prompts: tuple[int, ...], decoded: tuple[int, ...],
    budget_s: float, progress: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:  # fmt: skip
    """Measure all columns, show the table, return the results for the file."""
    began = time.perf_counter()
    few = FewTokens(config, budget_s, progress)
    for context in contexts:
        for n_new in VERIFIED:
            few.verify(context, n_new)
    for n_new in prompts:
        few.prompt(n_new)
    half = InBF16(config, budget_s, progress)
    for context in decoded:
        half.decode(context)
    columns = few.measured + half.measured
    Console(width=140).print(table(columns))
    import transformers

    return {
        "what": "dsv3lib against transformers on a CPU, batch 1, identical weights: few tokens, prompts, BF16",
        "machine": {**machine(), "transformers": transformers.__version__},
        "seconds": round(time.perf_counter() - began, 1),
        "columns": [c.as_json() for c in columns],
    }


def main() -> None:
    """The command line."""
    chosen = command_line(__doc__, "cpu-few", "one context, short rounds").parse_args()
    torch.set_num_threads(chosen.threads)
    print(openmp.settle(chosen.threads))  # torch came first here
    sizes = (CONTEXTS[:1], PROMPTS, DECODED[:1]) if chosen.quick else (CONTEXTS, PROMPTS, DECODED)
    results = run(CONFIG, *sizes, 2.0 if chosen.quick else 6.0, print)
    keep(results, "cpu-few", chosen)


if __name__ == "__main__":
    main()
