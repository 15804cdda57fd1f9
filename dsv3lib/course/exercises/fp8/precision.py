"""Exercise fp8.4: what stays in high precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from dsv3lib.course.task import Exercise, Rejected, RightAnswer, WrongAnswer, describe


def keep_high(errors: dict[str, float], budget: float) -> set[str]:
    """The fewest parts to take out of FP8 so that the squared errors of the rest stay within the budget."""
    kept: set[str] = set()
    for part in sorted(errors, key=errors.get, reverse=True):
        if sum(e**2 for p, e in errors.items() if p not in kept) ** 0.5 <= budget:
            break
        kept.add(part)
    return kept


CASES = (
    ({"head": 0.04, "gate": 0.03, "attention": 0.02, "experts": 0.012, "dense": 0.01}, 0.026),
    ({"a": 0.3, "b": 0.4, "c": 0.05}, 0.5),
    ({"a": 0.3, "b": 0.4, "c": 0.1}, 0.5),
    ({"a": 0.02, "b": 0.02, "c": 0.02, "d": 0.019}, 0.03),
    ({"a": 0.1, "b": 0.2}, 0.05),
)


def _check_keep_high(answer: Callable[[dict[str, float], float], Iterable[str]]) -> None:
    for errors, budget in CASES:
        got = answer(dict(errors), budget)
        if isinstance(got, (str, dict)) or not isinstance(got, Iterable):
            raise Rejected(f"return the names of the parts, as a set or a list; you returned {describe(got)}.")
        kept = set(got)
        if not kept <= set(errors):
            raise Rejected(f"{sorted(kept - set(errors))} are no parts: the names are the keys of errors.")
        rest = sum(e**2 for p, e in errors.items() if p not in kept) ** 0.5
        fewest = len(keep_high(errors, budget))
        if rest > budget * 1.0001 and not kept:
            raise Rejected(
                f"nothing is taken out of FP8. Each error may be small, together they are {rest:.3g}, over the "
                f"budget of {budget:g}."
            )
        if rest > budget * 1.0001 and kept == set(errors) - set(keep_high(errors, budget)):
            raise Rejected("those are the parts that may stay in FP8: return the others.")
        if rest > budget * 1.0001:
            raise Rejected(
                f"what is left in FP8 has errors of {rest:.3g} together, over the budget of {budget:g}: independent "
                "errors add as squares."
            )
        if len(kept) > fewest:
            left, taken = [e for p, e in errors.items() if p not in kept], [errors[p] for p in kept]
            why = "did you add them as they are? Independent errors add as squares"
            if not left:
                why = "nothing is left in eight bits; begin with the largest, and stop in time"
            elif max(left) > min(taken):
                why = "begin with the largest"
            raise Rejected(f"{len(kept)} parts are taken out of FP8 where {fewest} would do: {why}.")


def _keep_by_removal(errors: dict[str, float], budget: float) -> list[str]:
    left, kept = dict(errors), []
    while sum(e * e for e in left.values()) > budget * budget:
        worst = max(left, key=left.get)
        kept.append(worst)
        left.pop(worst)
    return kept


def _keep_from_below(errors: dict[str, float], budget: float) -> set[str]:
    fp8, total = set(), 0.0
    for part, error in sorted(errors.items(), key=lambda item: item[1]):
        if total + error**2 <= budget**2 * (1 + 1e-9):
            total += error**2
            fp8.add(part)
        else:
            break
    return set(errors) - fp8


def _keep_by_search(errors: dict[str, float], budget: float) -> tuple[str, ...]:
    from itertools import combinations

    for n in range(len(errors) + 1):
        for some in combinations(errors, n):
            if sum(e**2 for p, e in errors.items() if p not in some) ** 0.5 <= budget * (1 + 1e-9):
                return some
    return tuple(errors)


def _keep_in_tensors(errors: dict[str, float], budget: float) -> list[str]:
    names = sorted(errors, key=errors.get)
    sums = torch.tensor([errors[n] for n in names], dtype=torch.float64).square().cumsum(0).sqrt()
    return [n for n, s in zip(names, sums.tolist(), strict=True) if s > budget * (1 + 1e-9)]


def _keep_linear(errors: dict[str, float], budget: float) -> set[str]:
    kept: set[str] = set()
    for part in sorted(errors, key=errors.get, reverse=True):
        if sum(e for p, e in errors.items() if p not in kept) <= budget:
            break
        kept.add(part)
    return kept


def _keep_from_the_smallest(errors: dict[str, float], budget: float) -> set[str]:
    kept: set[str] = set()
    for part in sorted(errors, key=errors.get):
        if sum(e**2 for p, e in errors.items() if p not in kept) ** 0.5 <= budget:
            break
        kept.add(part)
    return kept


EXERCISES = (
    Exercise(
        id="fp8.4",
        title="What stays in high precision",
        dots=1,
        minutes=6,
        prompt="Write `keep_high(errors, budget)`. You measured what each part of a model does to the loss's "
        "gradient when it alone is in FP8: a relative error. Return the fewest parts to keep in high "
        "precision so that all the others together stay within a budget. The parts' errors are independent.",
        solution=keep_high,
        checker=_check_keep_high,
        spec=(
            ("errors", "dict", "part -> relative error of the gradient"),
            ("budget", "a number", "largest error of all that stays in FP8, together"),
            ("returns", "a set", "names of the parts that are taken out"),
        ),
        hints=("Independent errors: √(Σ e²).", "Take the largest out first, look again, stop when it fits."),
        also_right=(
            RightAnswer("taking out the worst", _keep_by_removal),
            RightAnswer("filling up from the smallest", _keep_from_below),
            RightAnswer("trying every choice", _keep_by_search),
            RightAnswer("with cumsum", _keep_in_tensors),
        ),
        wrong=(
            WrongAnswer("errors added as they are", _keep_linear, says="squares"),
            WrongAnswer("nothing", lambda e, b: set(), says="othing is taken out"),
            WrongAnswer("everything", lambda e, b: set(e), says="would do"),
            WrongAnswer("the smallest first", _keep_from_the_smallest, says="largest"),
            WrongAnswer("each alone against the budget", lambda e, b: {p for p, v in e.items() if v > b},
                        says="over the budget"),
            WrongAnswer("the FP8 ones", lambda e, b: set(e) - keep_high(e, b), says="return the others"),
        ),
        praise="So were embedding, head, gate, norms and attention's scores chosen: by what they would cost.",
    ),
)  # fmt: skip
