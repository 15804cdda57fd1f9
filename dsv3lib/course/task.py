"""What an exercise is, and the two words a checker has: compare, reject.

A checker calls the learner's function on inputs it draws itself and raises :class:`Rejected` with a
sentence that says what is wrong. It never looks at how the function is written.
"""

from __future__ import annotations

import inspect
import math
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv3lib.errors import CourseError

Checker = Callable[[Callable[..., Any]], None]

MAX_DOTS = 3
"""Hardest rating: one dot is a warm-up, three need paper."""


class Rejected(Exception):
    """A checker's finding: the answer is wrong, and why, in words for the learner."""


@dataclass(frozen=True)
class WrongAnswer:
    """A plausible wrong answer; the tests see it rejected.

    Attributes:
        why: the misunderstanding that it stands for.
        function: the answer.
        says: words that the sentence to the learner must contain, so that the misunderstanding is named.
    """

    why: str
    function: Callable[..., Any]
    says: str = ""


@dataclass(frozen=True)
class RightAnswer:
    """Another natural way to be right than the solution's; the tests see it accepted."""

    how: str
    function: Callable[..., Any]


@dataclass(frozen=True)
class Exercise:
    """One exercise of a lesson.

    Attributes:
        id: ``"<lesson>.<number>"``, as in ``"mla.1"``.
        title: a few words.
        dots: difficulty, 1 to 3.
        minutes: what it should take.
        prompt: the task; `` `code` `` is marked, a blank line parts paragraphs.
        solution: the reference: a real function, shown to the learner as its source; later cells of a lesson
            take it while the learner's own is not there yet.
        checker: raises :class:`Rejected` on a wrong answer.
        hints: from the faintest to the plainest.
        wrong: at least two answers that the checker must reject.
        praise: what a right answer has shown.
        spec: a row for each argument and for what is returned: name, shape or type, meaning.
        also_right: other natural ways to be right, which the checker must accept.
        picture: makes the task's picture, as ``style.show`` takes it: (figure, alt text, caption).
    """

    id: str
    title: str
    dots: int
    minutes: int
    prompt: str
    solution: Callable[..., Any]
    checker: Checker
    hints: tuple[str, ...]
    wrong: tuple[WrongAnswer, ...]
    praise: str
    spec: tuple[tuple[str, str, str], ...] = ()
    also_right: tuple[RightAnswer, ...] = ()
    picture: Callable[[], tuple[Any, ...]] | None = None

    def __post_init__(self) -> None:
        lesson, _, number = self.id.partition(".")
        if not lesson.isidentifier() or not number.isdigit():
            raise CourseError(f"exercise id {self.id!r} must look like 'mla.1': a lesson, a dot, a number")
        if not 1 <= self.dots <= MAX_DOTS:
            raise CourseError(f"exercise {self.id}: dots is {self.dots}, expected 1 to {MAX_DOTS}")
        if len(self.wrong) < 2:
            raise CourseError(f"exercise {self.id}: {len(self.wrong)} wrong answers, at least 2 are needed")
        if not self.hints:
            raise CourseError(f"exercise {self.id} has no hint")

    @property
    def lesson(self) -> str:
        """The part of the id before the dot."""
        return self.id.partition(".")[0]

    @property
    def rating(self) -> str:
        """The difficulty as dots, as in ``●●○``."""
        return "●" * self.dots + "○" * (MAX_DOTS - self.dots)

    def solution_source(self) -> str:
        """Return the solution's source, as the learner may read it."""
        return textwrap.dedent(inspect.getsource(self.solution)).strip()


def expect_tensor(got: Any, expected: Tensor, what: str, *, atol: float = 1e-5) -> None:
    """Reject ``got`` unless it is a tensor of the expected shape and values.

    Args:
        got: what the learner's function returned.
        expected: the right answer.
        what: its name in the sentence, as in ``"the scores"``.
        atol: largest difference allowed, relative to the largest expected magnitude (at least 1).

    Raises:
        Rejected: type, shape, NaN or the largest difference, in words.
    """
    if not isinstance(got, Tensor):
        raise Rejected(f"{what} should be a tensor; you returned {describe(got)}.")
    if got.shape != expected.shape:
        raise Rejected(f"{what} should have shape {list(expected.shape)}; yours has {list(got.shape)}.")
    values = got.detach().to(torch.float64)
    if torch.isnan(values).any():
        raise Rejected(f"{what} holds {int(torch.isnan(values).sum())} NaN of {values.numel()} values.")
    target = expected.detach().to(torch.float64)
    difference = (values - target).abs()
    worst = float(difference.max()) if difference.numel() else 0.0
    allowed = atol * max(1.0, float(target.abs().max()) if target.numel() else 1.0)
    if worst > allowed:
        index = [int(i) for i in torch.unravel_index(difference.argmax(), difference.shape)]
        share = float((difference > allowed).double().mean())
        raise Rejected(
            f"{what}: the shape is right, but {share:.0%} of the values are off; the worst is at {index}: "
            f"expected {float(target[tuple(index)]):.4g}, yours is {float(values[tuple(index)]):.4g}."
        )


def expect_same(got: Any, slips: Mapping[str, Any], *, atol: float = 1e-5) -> None:
    """Reject an answer that equals what a well-known misunderstanding gives; say nothing about any other.

    Call it before :func:`expect_tensor`, which then speaks of shapes and differences.

    Args:
        got: what the learner's function returned.
        slips: what to say → the tensor that the misunderstanding gives.
        atol: as in :func:`expect_tensor`.

    Raises:
        Rejected: with that sentence.
    """
    if not isinstance(got, Tensor):
        return
    for sentence, value in slips.items():
        if got.shape != value.shape:
            continue
        allowed = atol * max(1.0, float(value.abs().max()) if value.numel() else 1.0)
        if torch.allclose(got.detach().double(), value.detach().double(), rtol=0.0, atol=allowed):
            raise Rejected(sentence)


def expect_number(
    got: Any,
    expected: int | float,
    what: str,
    *,
    rel: float = 1e-6,
    slips: Mapping[int | float, str] | None = None,
) -> None:
    """Reject ``got`` unless it is the expected number.

    Args:
        got: what the learner's function returned.
        expected: the right answer.
        what: its name in the sentence.
        rel: largest relative difference allowed.
        slips: a well-known wrong value → what it comes from; that sentence is added when it is met.

    Raises:
        Rejected: the type, or the value with the slip behind it.
    """
    if isinstance(got, Tensor) and got.numel() == 1:
        got = got.item()
    if isinstance(got, bool) or not isinstance(got, (int, float)):
        raise Rejected(f"{what} should be one number; you returned {describe(got)}.")
    if not _near(got, expected, rel):
        slip = next((text for value, text in (slips or {}).items() if _near(got, value, rel)), "")
        ratio = f" (yours is {got / expected:.4g} times that)" if expected and got else ""
        raise Rejected(
            f"{what} should be {_plain(expected)}; you returned {_plain(got)}{ratio}. {slip}".strip()
        )


def _near(a: int | float, b: int | float, rel: float) -> bool:
    return math.isfinite(a) and abs(a - b) <= rel * max(abs(a), abs(b), 1e-30)


def _plain(value: int | float) -> str:
    whole = math.isfinite(value) and float(value).is_integer()
    return f"{int(value):,}" if whole else f"{value:,.6g}"


def describe(value: Any) -> str:
    """Return what a value is in a few words, for a sentence to a learner."""
    if value is None:
        return "None (is there a `return`?)"
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)} and dtype {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
