"""Exercise fp8.3: write the promotion loop."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsv3lib.course.task import Exercise, Rejected, RightAnswer, WrongAnswer, expect_tensor


def promoted(a: Tensor, b: Tensor, n_c: int, short: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A Bᵀ in slices of n_c elements: each is summed by the short accumulator, the sums are added in FP32."""
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float32)
    for k in range(0, a.shape[1], n_c):
        total += short(a[:, k : k + n_c], b[:, k : k + n_c])
    return total


def _check_promoted(answer: Callable[..., Tensor]) -> None:
    draw = torch.Generator().manual_seed(53)
    for k, n_c in ((512, 128), (320, 128), (256, 64)):
        a, b = torch.rand(2, k, generator=draw), torch.rand(3, k, generator=draw)
        widths: list[int] = []

        def short(x: Tensor, y: Tensor, widths: list[int] = widths) -> Tensor:
            if not isinstance(x, Tensor) or x.ndim != 2 or x.shape[-1] != y.shape[-1]:
                raise Rejected("short takes two matrices of one width, [M, n] and [N, n].")
            widths.append(x.shape[-1])
            return ((x.double() @ y.double().t()) * 8).floor().float() / 8  # few bits: every call loses some

        got = answer(a.clone(), b.clone(), n_c, short)
        expected = promoted(a, b, n_c, lambda x, y: ((x.double() @ y.double().t()) * 8).floor().float() / 8)
        if isinstance(got, Tensor) and got.shape == expected.shape:
            if not widths:
                raise Rejected("short was never called: the tensor core is the one that multiplies.")
            if max(widths) > n_c:
                raise Rejected(f"a slice of {max(widths)} went into the short accumulator: n_c is {n_c}.")
            if sum(widths) < k:
                raise Rejected(f"{k - sum(widths)} of {k} elements were never summed: the last slice may be short.")
            if min(widths[:-1], default=n_c) < n_c:
                raise Rejected(f"slices of {min(widths[:-1])} are promoted: n_c is {n_c}, and each copy costs time.")
        expect_tensor(got, expected, f"the promoted sum for K = {k}, n_c = {n_c}", atol=1e-6)


def _promoted_with_split(a: Tensor, b: Tensor, n_c: int, short: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    return sum(short(x, y) for x, y in zip(a.split(n_c, 1), b.split(n_c, 1), strict=True))


def _promoted_stacked(a: Tensor, b: Tensor, n_c: int, short: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    parts = [short(x, y) for x, y in zip(a.split(n_c, dim=-1), b.split(n_c, dim=-1), strict=True)]
    return torch.stack(parts).sum(0)


def _promoted_while(a: Tensor, b: Tensor, n_c: int, short: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    k, total = 0, None
    while k < a.shape[1]:
        part = short(a[:, k : k + n_c], b[:, k : k + n_c]).double()
        total, k = (part if total is None else total + part), k + n_c
    return total


def _promoted_whole_slices(a: Tensor, b: Tensor, n_c: int, short: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    total = torch.zeros(a.shape[0], b.shape[0])
    for s in range(a.shape[1] // n_c):
        total += short(a[:, s * n_c : (s + 1) * n_c], b[:, s * n_c : (s + 1) * n_c])
    return total


EXERCISES = (
    Exercise(
        id="fp8.3",
        title="Promotion",
        dots=2,
        minutes=8,
        prompt="Write `promoted(a, b, n_c, short)`. A tensor core sums well over a short way and badly over a long "
        "one. Sum A Bᵀ in slices of `n_c` elements of K: `short(x, y)` is what the tensor core makes of one "
        "slice; add the slices yourself.",
        solution=promoted,
        checker=_check_promoted,
        spec=(
            ("a, b", "[M, K], [N, K]", "the operands; K need not divide by n_c"),
            ("n_c", "an integer", "elements between two promotions; the paper's is 128"),
            ("short", "a function", "([M, n], [N, n]) -> [M, N]"),
            ("returns", "[M, N]", "FP32 or better"),
        ),
        hints=("`a[:, k : k + n_c]` is one slice.", "`a.split(n_c, 1)` gives them all, the last one short."),
        also_right=(
            RightAnswer("split and sum", _promoted_with_split),
            RightAnswer("stacked", _promoted_stacked),
            RightAnswer("a while loop in FP64", _promoted_while),
            RightAnswer("torch.split", lambda a, b, n, s: sum(map(s, torch.split(a, n, 1), torch.split(b, n, 1)))),
        ),
        wrong=(
            WrongAnswer("never promoted", lambda a, b, n, s: s(a, b), says="went into the short"),
            WrongAnswer("the last slice forgotten", _promoted_whole_slices, says="never summed"),
            WrongAnswer("without the tensor core", lambda a, b, n, s: a @ b.t(), says="never called"),
            WrongAnswer("after every 32", lambda a, b, n, s: promoted(a, b, 32, s), says="n_c is"),
            WrongAnswer("twice as far", lambda a, b, n, s: promoted(a, b, 2 * n, s), says="went into the short"),
            WrongAnswer("the mean of the slices", lambda a, b, n, s: promoted(a, b, n, s) / -(-a.shape[1] // n),
                        says="values are off"),
        ),
        praise="Four instructions, then one addition in FP32: that is all that DeepSeek changed in the sum.",
    ),
)  # fmt: skip
