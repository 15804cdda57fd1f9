"""Does speculation save time? Speed, acceptance and costs of tiny-v3's MTP chain on held-out text, batch 1.

    python benchmarks/speculation.py            # about five minutes; data/results/speculation-<date>.json and .svg
    python benchmarks/speculation.py --quick    # a minute, two domains; writes nothing unless --out is given
    python benchmarks/speculation.py --pass-costs 1,1.02,1.04 --draft-cost 0.03     # and what those costs would give

Plain and speculative decoding continue the same prompts in turn, sixteen tokens of each before the next of any, since a
shared machine is quick in one second and slow in the next; a speed-up is the ratio of the seconds a token. In the same
run the costs of a round, of a pass over 1 to 5 tokens and of drafts are measured at the same contexts: with the counted
acceptance they predict the speed-up, and both stand side by side.
Prompt lookup is reported apart. Costs given on the command line are somebody's claim, not a measurement.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from measure import command_line, keep, machine
from rich.console import Console
from rich.table import Table
from speculation_costs import MOST, Costs, conditional, measure_costs, speedup_at
from torch import Tensor

from dsv3lib import DeepSeekV3
from dsv3lib.inference.acceptance import SpeculationStatistics
from dsv3lib.inference.generate import stream
from dsv3lib.inference.request import Request
from dsv3lib.inference.speculative import speculate
from dsv3lib.studies.shipped_model import NAME
from dsv3lib.training.text.data import PackedStream
from dsv3lib.training.text.folder import open_domains
from dsv3lib.training.text.tokenizer import Tokenizer

DOMAINS = ("code", "docs", "chinese", "german", "arithmetic")
CONTEXTS = (32, 96, 192)
NEW = 64  # the longest prompt and its continuation are of the trained length, 256
LONG = (1024, 2048)  # beyond it: a note, of one domain and greedy
TEMPERATURES = (0.0, 1.0)
WAYS: tuple[int | str, ...] = ("plain", 1, 2, MOST, "auto", "lookup")
AGREES = 0.10
GRAM = 8
STRETCH = 16  # tokens of each way in turn: with another way after each token all would find their caches cold


@dataclass(frozen=True)
class Sample:
    """One continuation of one prompt.

    Args:
        domain, context, temperature, way: of what. seconds: behind the prompt's own pass. tokens: in that time.
        counts: of the drafts. entropy: of the model's next-token distribution along the text, bits. repeated: share
            of its 8-grams that stood in it before.
    """

    domain: str
    context: int
    temperature: float
    way: str
    seconds: float
    tokens: int
    counts: SpeculationStatistics
    entropy: float
    repeated: float


def held_out(text: PackedStream, domain: str, context: int, most: int) -> list[Tensor]:
    """At most so many prompts [1, context] from documents that training never saw."""
    batches = text.validation_batches(domain, most, 1, context)
    return [b.input_ids for b in batches if bool((b.labels >= 0).all())]


def repeated_grams(tokens: Sequence[int], n: int = GRAM) -> float:
    """Share of the n-grams that stood earlier in the same text."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@torch.inference_mode()
def entropy_of(model: DeepSeekV3, prompt: Tensor, tokens: Sequence[int]) -> float:
    """Mean entropy, in bits, of the distributions that the tokens were picked from, at temperature 1."""
    ids = torch.cat([prompt, torch.tensor([tokens])], 1)
    logs = model(ids).logits[0, prompt.shape[1] - 1 : -1].float().log_softmax(-1)
    return float(-(logs.exp() * logs).sum(-1).mean()) / torch.log(torch.tensor(2.0)).item()


class Continuation:
    """One way's continuation of one prompt, timed behind the prompt's own pass and first token.

    Attributes:
        tokens: all so far. seconds: of all but the first. counts: what became of the drafts.
    """

    def __init__(
        self, model: DeepSeekV3, prompt: Tensor, new: int, temperature: float, way: int | str, seed: int
    ) -> None:
        self.counts, draw = SpeculationStatistics(), torch.Generator().manual_seed(seed)
        if way == "plain":
            steps: Iterable[list[int]] = (
                token.tolist()
                for token in stream(model, prompt, new, temperature, stop_tokens=(), generator=draw)
            )
        else:
            request = Request.of(model, prompt, new, temperature, stop_tokens=(), generator=draw)
            drafter, number = ("lookup", None) if way == "lookup" else ("mtp", way)
            rounds = speculate(model, request, number, self.counts, drafter=drafter)
            steps = (r.tokens[0] for r in rounds)
        self._steps = iter(steps)
        self.tokens, self.seconds = list(next(self._steps)), 0.0

    def stretch(self) -> bool:
        """Some tokens more, as many as follow one another in decoding; whether there were any."""
        had, begun = len(self.tokens), time.perf_counter()
        for gained in self._steps:
            self.tokens += gained
            if len(self.tokens) - had >= STRETCH:
                break
        if len(self.tokens) == had:
            return False
        self.seconds += time.perf_counter() - begun
        return True


def in_turn(runs: Sequence[Continuation]) -> None:
    """Carry all of them to their ends, stretch by stretch, each time another first."""
    running, first = list(runs), 0
    while running:
        running = [run for run in running[first:] + running[:first] if run.stretch()]
        first = min(1, len(running))


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Args:
        domains, contexts, temperatures: every one with every other. new: tokens of a continuation.
        budget_s: no new round begins after so many seconds, but three are always made.
    """

    domains: tuple[str, ...]
    contexts: tuple[int, ...]
    temperatures: tuple[float, ...]
    new: int
    budget_s: float
    least: int = 3
    most: int = 20


def collect(model: DeepSeekV3, text: PackedStream, plan: Plan, progress: Callable[[str], None]) -> list[Sample]:
    """All ways in turn on each prompt, round after round.

    Raises:
        ValueError: a domain has no held-out prompt of that length.
    """
    cells = [(d, c) for d in plan.domains for c in plan.contexts]
    prompts = {cell: held_out(text, *cell, plan.most) for cell in cells}
    for (domain, context), found in prompts.items():
        if not found:
            raise ValueError(f"{domain}: no held-out text of {context} tokens; leave it out, or take shorter prompts")
    samples: list[Sample] = []
    began, rounds = time.perf_counter(), 0
    while rounds < plan.least or (rounds < plan.most and time.perf_counter() - began < plan.budget_s):
        progress(f"round {rounds + 1}, {time.perf_counter() - began:.0f} s")
        for domain, context in cells:
            of_cell = prompts[domain, context]
            prompt = of_cell[rounds % len(of_cell)]
            for temperature in plan.temperatures:
                runs = [Continuation(model, prompt, plan.new, temperature, way, rounds) for way in WAYS]
                in_turn(runs)
                samples += [
                    Sample(
                        domain, context, temperature, str(way), run.seconds, len(run.tokens) - 1, run.counts,
                        entropy_of(model, prompt, run.tokens), repeated_grams(run.tokens),
                    )
                    for way, run in zip(WAYS, runs, strict=True)
                ]  # fmt: skip
        rounds += 1
    return samples


def pooled(samples: Iterable[Sample]) -> SpeculationStatistics:
    """The counts of all of them together."""
    total = SpeculationStatistics()
    for one in (s.counts for s in samples):
        total.passes, total.tokens = total.passes + one.passes, total.tokens + one.tokens
        more = [0] * max(len(one.drafted) - len(total.drafted), 0)
        total.drafted, total.accepted = total.drafted + more, total.accepted + more
        for k, (drafted, accepted) in enumerate(zip(one.drafted, one.accepted, strict=True)):
            total.drafted[k] += drafted
            total.accepted[k] += accepted
    return total


def summary(samples: list[Sample], costs: dict[int, Costs]) -> list[dict[str, Any]]:
    """Way by way: measured and predicted speed-up, acceptance and what else stands beside it.

    Args:
        samples: of one temperature and of as many contexts and domains as are to be taken together.
        costs: by context.
    """
    temperature = samples[0].temperature
    contexts = [s.context for s in samples if s.way == "plain"]

    def token(way: str) -> float:
        return sum(s.seconds for s in samples if s.way == way) / sum(s.tokens for s in samples if s.way == way)

    def predicted(acceptance: list[float]) -> float:
        return statistics.mean(costs[c].speedup(acceptance, temperature) for c in contexts)

    deepest = conditional(pooled(s for s in samples if s.way == str(MOST)))
    found = []
    for way in map(str, WAYS):
        mine = [s for s in samples if s.way == way]
        counts, speedup = pooled(mine), token("plain") / token(way)
        row: dict[str, Any] = {
            "way": way, "token_ms": round(1e3 * token(way), 4), "speedup": round(speedup, 4),
            "entropy_bits": round(statistics.mean(s.entropy for s in mine), 3),
            "repeated_8_grams": round(statistics.mean(s.repeated for s in mine), 4), "samples": len(mine),
        }  # fmt: skip
        if way != "plain":
            row |= {
                "acceptance_by_depth": [round(a, 4) for a in counts.acceptance_by_depth],
                "accepted_a_round": round(sum(counts.accepted) / counts.passes, 4),
                "tokens_a_pass": round(counts.tokens_per_pass, 4),
                "passes_a_token": round(1 / counts.tokens_per_pass, 4),
            }
        if way.isdigit():
            row["predicted"] = round(predicted(conditional(counts)), 4)
        elif way == "auto":  # the best number, without what it costs to find it
            row["predicted"] = round(max(predicted(deepest[:m]) for m in range(MOST + 1)), 4)
        if "predicted" in row:
            row["measured_over_predicted"] = round(speedup / row["predicted"], 4)
            row["agrees"] = abs(speedup / row["predicted"] - 1) <= AGREES
        found.append(row)
    return found


def grouped(samples: list[Sample], costs: dict[int, Costs], *by: str) -> list[dict[str, Any]]:
    """One summary for each temperature and value of the fields named."""
    keys = dict.fromkeys((s.temperature, *(getattr(s, name) for name in by)) for s in samples)
    names = ("temperature", *by)
    return [
        dict(zip(names, key, strict=True))
        | {"ways": summary([s for s in samples if tuple(getattr(s, n) for n in names) == key], costs)}
        for key in keys
    ]


def run(
    model: DeepSeekV3, text: PackedStream, plan: Plan, long: Plan | None = None,
    elsewhere: tuple[Sequence[float], float] | None = None, progress: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:  # fmt: skip
    """Measure, return the results for the file.

    Args:
        elsewhere: costs of passes over 1, 2, … tokens and of a draft, given by somebody.
    """
    began = time.perf_counter()
    results: dict[str, Any] = {"model": NAME, "machine": machine(), "new_tokens": plan.new, "costs": {}}
    for name, part in (("", plan), ("_beyond_the_trained_length", long)):
        if part is None:
            continue
        costs = {}
        for context in part.contexts:
            progress(f"costs at {context}")
            prompt = held_out(text, part.domains[0], context, 1)[0]
            costs[context] = measure_costs(model, prompt, part.temperatures, part.new)
        results["costs"] |= {str(c): one.as_json() for c, one in costs.items()}
        samples = collect(model, text, part, progress)
        if part is plan:
            results["all"] = grouped(samples, costs)
            results["by_domain"] = grouped(samples, costs, "domain")
        results[f"by_context{name}"] = grouped(samples, costs, "context")
    if elsewhere is not None:
        results["with_costs_given_not_measured"] = {
            "pass_costs": list(elsewhere[0]), "draft_cost": elsewhere[1],
            "speedup_by_drafts": [
                {"domain": g["domain"], "temperature": g["temperature"], "speedup": _elsewhere(g, *elsewhere)}
                for g in results["by_domain"]
            ],
        }  # fmt: skip
    results["seconds"] = round(time.perf_counter() - began, 1)
    return results


def _elsewhere(group: dict[str, Any], pass_costs: Sequence[float], draft_cost: float) -> list[float]:
    deepest = next(w for w in group["ways"] if w["way"] == str(MOST))["acceptance_by_depth"]
    stood = [1.0, *deepest]
    acceptance = [b / a if a else 0.0 for a, b in zip(stood, stood[1:], strict=False)]
    return [round(s, 3) for s in speedup_at(acceptance, pass_costs, draft_cost)]


def table(results: dict[str, Any]) -> Table:
    """Speed-up and acceptance for a terminal: all together, by domain, by context."""
    shown = Table(title=f"Plain decoding over speculative, seconds a token ({results['model']})")
    for name in ("", "temperature", "way", "ms a token", "speed-up", "predicted", "within 10 %", "tokens a pass",
                 "accepted by depth", "entropy", "8-grams again"):  # fmt: skip
        shown.add_column(name, justify="left" if name in ("", "way") else "right")
    parts = [part for name, part in results.items() if name in ("all", "by_domain") or name.startswith("by_context")]
    for group in (group for part in parts for group in part):
        of = str(group.get("domain", group.get("context", "all")))
        for w in group["ways"]:
            shown.add_row(
                of, f"{group['temperature']:g}", w["way"], f"{w['token_ms']:.2f}", f"{w['speedup']:.2f}",
                f"{w['predicted']:.2f}" if "predicted" in w else "",
                {True: "yes", False: "NO"}.get(w.get("agrees"), ""),
                f"{w['tokens_a_pass']:.2f}" if "tokens_a_pass" in w else "",
                " ".join(f"{a:.0%}" for a in w.get("acceptance_by_depth", [])),
                f"{w['entropy_bits']:.1f}", f"{w['repeated_8_grams']:.0%}",
            )  # fmt: skip
        shown.add_section()
    return shown


def main() -> None:
    """The command line."""
    parser = command_line(__doc__, "speculation", "two domains, one context")
    parser.add_argument("--pass-costs", type=_numbers, help="of passes over 1, 2, … tokens, e.g. 1,1.02,1.04")
    parser.add_argument("--draft-cost", type=float, default=0.0, help="of one draft, over a pass over one token")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    model = DeepSeekV3.from_pretrained(NAME, dtype=torch.float32).eval()
    # The text that it was trained on, whose validation documents were held out then.
    text = PackedStream(open_domains(text="full")[0], Tokenizer.from_pretrained(NAME), CONTEXTS[-1])
    plan, long = Plan(DOMAINS, CONTEXTS, TEMPERATURES, NEW, 170.0), Plan(DOMAINS[:1], LONG, (0.0,), NEW, 30.0)
    if chosen.quick:
        plan, long = Plan(("code", "arithmetic"), (96,), TEMPERATURES, NEW, 20.0), None
    elsewhere = (chosen.pass_costs, chosen.draft_cost) if chosen.pass_costs else None
    results = run(model, text, plan, long, elsewhere, print)
    Console(width=150).print(table(results))
    for given in results.get("with_costs_given_not_measured", {}).get("speedup_by_drafts", []):
        print(f"at the costs given (not measured here): {given['domain']}, temperature {given['temperature']:g}: "
              f"speed-up with 0, 1, … drafts {given['speedup']}")  # fmt: skip
    keep(results, "speculation", chosen, picture="speculation_picture")


def _numbers(text: str) -> list[float]:
    costs = [float(part) for part in text.split(",")]
    if len(costs) < 2 or not all(0 < c < float("inf") for c in costs):
        raise argparse.ArgumentTypeError(f"{text!r}, expected two or more costs above 0, the first of one token")
    return costs


if __name__ == "__main__":
    main()
