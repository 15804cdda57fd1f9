"""Exercise spec.2: how many tokens a pass yields."""

from __future__ import annotations

from collections.abc import Callable

from dsv3lib.course.task import Exercise, Rejected, RightAnswer, WrongAnswer, describe


def tokens_of_a_pass(acceptance: float, drafts: int) -> float:
    """Expected tokens of one pass: the drafts before the first that falls, and the model's own."""
    return sum(acceptance**k for k in range(drafts + 1))


def _check(answer: Callable[[float, int], object]) -> None:
    for a, m in ((0.5, 1), (0.85, 1), (0.8, 2), (0.3, 4), (0.0, 3), (0.6, 0), (1.0, 2)):
        try:
            got = float(answer(a, m))  # type: ignore[arg-type]
        except ZeroDivisionError:
            raise Rejected("the closed formula divides by 1 − a: what if every draft stands?") from None
        except TypeError:
            raise Rejected(f"return a number; you returned {describe(answer(a, m))}.") from None
        right = tokens_of_a_pass(a, m)
        if abs(got - right) < 1e-6:
            continue
        slips = {
            "the model's own token is missing: a pass yields at least one.": right - 1,
            "that takes every draft by itself; behind one that falls, all fall.": 1 + m * a,
            "the drafts that fell are counted too.": m + 1,
            "one power too few: with m drafts, all m may stand.": right - a**m,
            "one power too many: there are m drafts.": right + a ** (m + 1),
        }
        for why, slip in slips.items():
            if abs(got - slip) < 1e-6:
                raise Rejected(why)
        raise Rejected(f"with acceptance {a} and {m} drafts it is {right:.4f}, yours says {got:.4f}.")


def _closed(a: float, m: int) -> float:
    return float(m + 1) if a == 1 else (1 - a ** (m + 1)) / (1 - a)


def _by_cases(a: float, m: int) -> float:
    return sum(k * a ** (k - 1) * (1 - a) for k in range(1, m + 1)) + (m + 1) * a**m


def _by_recursion(a: float, m: int) -> float:
    return 1.0 if m == 0 else 1 + a * _by_recursion(a, m - 1)


def _by_loop(a: float, m: int) -> float:
    total, chance = 1.0, 1.0
    for _ in range(m):
        chance *= a
        total += chance
    return total


EXERCISES = (
    Exercise(
        id="spec.2",
        title="Tokens of a pass",
        dots=2,
        minutes=5,
        prompt="Write `tokens_of_a_pass(acceptance, drafts)`: how many tokens one pass of the model yields on "
        "average, if each draft stands with the same probability, whatever the others did.",
        solution=tokens_of_a_pass,
        checker=_check,
        spec=(
            ("acceptance", "a number", "0 to 1"),
            ("drafts", "an integer", "0 or more"),
            ("returns", "a number", "1 or more"),
        ),
        hints=(
            "Draft k counts only if all before it stood too: a to the power of k.",
            "And one token is the model's own, always.",
        ),
        also_right=(
            RightAnswer("in closed form", _closed),
            RightAnswer("case by case", _by_cases),
            RightAnswer("by recursion", _by_recursion),
            RightAnswer("a loop", _by_loop),
        ),
        wrong=(
            WrongAnswer("without the own token", lambda a, m: tokens_of_a_pass(a, m) - 1, says="own token"),
            WrongAnswer("each draft by itself", lambda a, m: 1 + m * a, says="all fall"),
            WrongAnswer("all that was read", lambda a, m: m + 1, says="counted too"),
            WrongAnswer("a power too few", lambda a, m: sum(a**k for k in range(m)), says="too few"),
            WrongAnswer("a power too many", lambda a, m: sum(a**k for k in range(m + 2)), says="too many"),
            WrongAnswer("divides by zero", lambda a, m: (1 - a ** (m + 1)) / (1 - a), says="1 − a"),
        ),
        praise="Two drafts at 61 % yield 1.98 tokens, one at 85 % yields 1.85: the first draft is worth the most.",
    ),
)  # fmt: skip
