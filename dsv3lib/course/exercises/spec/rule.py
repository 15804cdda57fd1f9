"""Exercise spec.1: the acceptance rule, and what is drawn from when a draft falls."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsv3lib.course.task import Exercise, Rejected, RightAnswer, WrongAnswer, describe


def judge(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """The probability that each token stands as a draft, and the distribution after a fall."""
    stands = (p / q.clamp(min=1e-12)).clamp(max=1.0)
    rest = (p - q).clamp(min=0.0)
    return stands, rest / rest.sum()


def _check(answer: Callable[[Tensor, Tensor], object]) -> None:
    draw = torch.Generator().manual_seed(71)
    for case in range(5):
        p, q = (torch.softmax(torch.randn(12, generator=draw, dtype=torch.float64) * 1.5, 0) for _ in range(2))
        if case == 1:
            p, q = q, p
        got = answer(p.clone(), q.clone())
        if not isinstance(got, (tuple, list)) or len(got) != 2:
            raise Rejected(f"return two tensors, the probabilities and the rest; you returned {describe(got)}.")
        stands, rest = (torch.as_tensor(one).double() for one in got)
        if stands.shape != p.shape or rest.shape != p.shape:
            yours = f"{list(stands.shape)}, {list(rest.shape)}"
            raise Rejected(f"both have a number for each token, {list(p.shape)}; yours: {yours}.")
        _check_stands(stands, p, q)
        _check_rest(rest, p, q)


def _check_stands(got: Tensor, p: Tensor, q: Tensor) -> None:
    right = judge(p, q)[0]
    if torch.allclose(got, right, atol=1e-6):
        return
    slips = {
        "that is not cut off at 1: a probability cannot be larger.": p / q,
        "that is q / p: a draft that the model likes better than the drafter must always stand.": (q / p).clamp(max=1),
        "that is p alone: a likely draft is proposed often as well, so much of the chance is counted twice.": p,
        "that is min(p, q), how often a token is drafted *and* stands; given that it was drafted, divide by q.":
            torch.minimum(p, q),
        "that is a threshold: it must be a probability, else rare tokens are never written.": (p >= q).double(),
        "that keeps every draft: then the drafter's distribution comes out.": torch.ones_like(p),
    }  # fmt: skip
    for why, slip in slips.items():
        if torch.allclose(got, slip, atol=1e-6):
            raise Rejected(why)
    raise Rejected("the probabilities that a draft stands are not min(1, p / q).")


def _check_rest(got: Tensor, p: Tensor, q: Tensor) -> None:
    right = judge(p, q)[1]
    if torch.allclose(got, right, atol=1e-6):
        return
    slips = {
        "the rest does not sum to one: normalise it.": (p - q).clamp(min=0),
        "after a fall you draw from p: what the drafter proposed too often is then written too often.": p,
        "the rest is what the model wants *more* of than the drafter gave, p − q; yours is q − p.":
            (q - p).clamp(min=0) / (q - p).clamp(min=0).sum(),
        "a distance has no sign: where the drafter gave too much, nothing is left to give.":
            (p - q).abs() / (p - q).abs().sum(),
    }  # fmt: skip
    for why, slip in slips.items():
        if torch.allclose(got, slip, atol=1e-6):
            raise Rejected(why)
    raise Rejected("after a fall the token is drawn from (p − q), negative parts cut off, normalised.")


def _by_minimum(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.minimum(p, q)
    return both / q, (p - both) / (1 - both.sum())


def _with_where(p: Tensor, q: Tensor) -> list[Tensor]:
    stands = torch.where(p >= q, torch.ones_like(p), p / q)
    rest = torch.relu(p - q)
    return [stands, rest / rest.sum()]


def _by_loop(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    stands = torch.tensor([min(1.0, float(a / b)) for a, b in zip(p, q, strict=True)])
    rest = torch.tensor([max(0.0, float(a - b)) for a, b in zip(p, q, strict=True)])
    return stands, rest / rest.sum()


def _rest(p: Tensor, q: Tensor) -> Tensor:
    return judge(p, q)[1]


EXERCISES = (
    Exercise(
        id="spec.1",
        title="The acceptance rule",
        dots=3,
        minutes=9,
        prompt="Write `judge(p, q)`. A draft was drawn from the drafter's distribution q. Return, for each token, the "
        "probability with which it stands if it was the draft, and the distribution that the model's own token is "
        "drawn from when the draft has fallen. Together they must give exactly p, whatever q is.",
        solution=judge,
        checker=_check,
        spec=(
            ("p", "[V]", "the model's distribution"),
            ("q", "[V]", "the drafter's, nowhere zero"),
            ("returns", "[V], [V]", "probability to stand; distribution after a fall"),
        ),
        hints=(
            "A token is written as a standing draft with probability q · stands. That may not exceed p.",
            "What is missing to p after that is (p − q) where it is positive.",
        ),
        also_right=(
            RightAnswer("by the smaller of the two", _by_minimum),
            RightAnswer("with where, as a list", _with_where),
            RightAnswer("a loop", _by_loop),
            RightAnswer("in FP32", lambda p, q: judge(p.float(), q.float())),
        ),
        wrong=(
            WrongAnswer("not cut off", lambda p, q: (p / q, _rest(p, q)), says="larger"),
            WrongAnswer("upside down", lambda p, q: ((q / p).clamp(max=1), _rest(p, q)), says="q / p"),
            WrongAnswer("p alone", lambda p, q: (p, _rest(p, q)), says="p alone"),
            WrongAnswer("a threshold", lambda p, q: ((p >= q).double(), _rest(p, q)), says="threshold"),
            WrongAnswer("every draft stands", lambda p, q: (torch.ones_like(p), _rest(p, q)), says="every draft"),
            WrongAnswer("the residual forgotten", lambda p, q: (judge(p, q)[0], p), says="from p"),
            WrongAnswer("not normalised", lambda p, q: (judge(p, q)[0], (p - q).clamp(min=0)), says="normalise"),
            WrongAnswer("the sign turned", lambda p, q: (judge(p, q)[0], _rest(q, p)), says="q − p"),
            WrongAnswer("one tensor", lambda p, q: judge(p, q)[0], says="two tensors"),
        ),
        praise="Whatever the drafter proposes, p comes out. A bad drafter costs time, never quality.",
    ),
)  # fmt: skip
