"""Exercises of 08_long_context: YaRN's frequencies, its temperature, the score that a longer context asks for."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsv3lib.course.task import Exercise, RightAnswer, WrongAnswer, expect_number, expect_same, expect_tensor

Number = int | float


# ---- long.1: YaRN by parts ----------------------------------------------------------------------------------


def yarn_speeds(speeds, low, high, factor):
    """Pairs up to ``low`` as they are, from ``high`` on slowed by the factor, a straight ramp between."""
    pair = torch.arange(len(speeds), dtype=speeds.dtype)
    ramp = ((pair - low) / (high - low)).clamp(0, 1)
    return speeds * (1 - ramp) + speeds / factor * ramp


def _ramp(speeds: Tensor, low: int, high: int) -> Tensor:
    return ((torch.arange(len(speeds), dtype=torch.float64) - low) / (high - low)).clamp(0, 1)


def _harmonic(speeds: Tensor, low: int, high: int, factor: Number) -> Tensor:
    return speeds / (1 + (factor - 1) * _ramp(speeds, low, high))


def _check_speeds(answer: Callable[..., Any]) -> None:
    for pairs, theta, low, high, factor in ((32, 10_000.0, 10, 23, 40.0), (8, 500.0, 1, 4, 8.0), (6, 100.0, 1, 4, 2.0)):
        speeds = theta ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
        got = answer(speeds.clone(), low, high, factor)
        ramp, expected = _ramp(speeds, low, high), yarn_speeds(speeds, low, high, factor)
        unclamped = (torch.arange(pairs, dtype=torch.float64) - low) / (high - low)
        step = (torch.arange(pairs) >= high).double()
        expect_same(got, {
            "the wrong end is slowed: the first pairs are the fast ones, and they stay.":
                speeds * ramp + speeds / factor * (1 - ramp),
            "every pair is slowed alike: that is position interpolation, not YaRN.": speeds / factor,
            "the slow pairs got faster: a speed is divided by the factor.":
                speeds * (1 - ramp) + speeds * factor * ramp,
            "the ramp goes on below 0 and above 1: clamp it.":
                speeds * (1 - unclamped) + speeds / factor * unclamped,
            "there is no ramp: between low and high the two speeds are mixed.":
                speeds * (1 - step) + speeds / factor * step,
            "the ramp mixes the two wavelengths; YaRN mixes the two speeds.": _harmonic(speeds, low, high, factor),
            "nothing has changed: the speeds came back as they were.": speeds,
        }, atol=1e-7)  # fmt: skip
        expect_tensor(got, expected, "the stretched speeds", atol=1e-6)


def _by_loop(speeds: Tensor, low: int, high: int, factor: Number) -> Tensor:
    out = []
    for i, speed in enumerate(speeds.tolist()):
        share = min(max((i - low) / (high - low), 0.0), 1.0)
        out.append(speed + share * (speed / factor - speed))
    return torch.tensor(out, dtype=torch.float64)


def _by_where(speeds: Tensor, low: int, high: int, factor: Number) -> Tensor:
    i = torch.arange(len(speeds), dtype=torch.float64)
    mixed = torch.lerp(speeds, speeds / factor, (i - low) / (high - low))
    return torch.where(i <= low, speeds, torch.where(i >= high, speeds / factor, mixed))


def _by_parts(speeds: Tensor, low: int, high: int, factor: Number) -> Tensor:
    ramp = torch.cat([
        torch.zeros(low, dtype=torch.float64), torch.linspace(0, 1, high - low + 1, dtype=torch.float64),
        torch.ones(max(len(speeds) - high - 1, 0), dtype=torch.float64),
    ])[: len(speeds)]  # fmt: skip
    return torch.lerp(speeds, speeds / factor, ramp)


# ---- long.2: the temperature --------------------------------------------------------------------------------


def softmax_scale(width, factor):
    """1/√width, times the square of 0.1 ln s + 1."""
    temperature = 0.1 * math.log(factor) + 1
    return temperature**2 / math.sqrt(width)


def _check_scale(answer: Callable[..., Any]) -> None:
    draw = random.Random(21)
    cases = [(192, 40.0), (48, 8.0), (192, 1.0)] + [(draw.randrange(8, 300), draw.uniform(1.5, 64)) for _ in range(5)]
    for width, factor in cases:
        t = 0.1 * math.log(factor) + 1
        slips = {
            t / math.sqrt(width): "The square is missing: query and key are each to be multiplied, the score twice.",
            1 / math.sqrt(width): "That is the scale without any temperature.",
            1 / (t**2 * math.sqrt(width)): "That divides by it: a longer context needs larger scores.",
            t**2: "The division by the root of the width is missing.",
            t**2 / width: "Divide by the root of the width.",
            (0.1 * math.log10(factor) + 1) ** 2 / math.sqrt(width): "ln is the natural logarithm.",
            (0.1 * math.log2(factor) + 1) ** 2 / math.sqrt(width): "ln is the natural logarithm.",
        }  # fmt: skip
        expected = softmax_scale(width, factor)
        slips = {value: text for value, text in slips.items() if not math.isclose(value, expected)}
        expect_number(
            answer(width, factor), expected, f"the softmax scale for keys of {width} and a factor of {factor:g}",
            slips=slips,
        )  # fmt: skip


# ---- long.3: the score that a longer context asks for ---------------------------------------------------------


def score_needed(share, tokens):
    """share = e^g / (e^g + tokens − 1), solved for g."""
    return math.log(share / (1 - share) * (tokens - 1))


def _check_needed(answer: Callable[..., Any]) -> None:
    draw = random.Random(22)
    cases = [(0.5, 4096), (0.5, 131_072), (0.9, 1000)]
    cases += [(draw.uniform(0.1, 0.95), draw.randrange(10, 200_000)) for _ in range(5)]
    for share, tokens in cases:
        expected = score_needed(share, tokens)
        slips = {
            math.log(share / (1 - share) * tokens): "There are tokens − 1 others: the token itself is not one of them.",
            math.log(share * (tokens - 1)): "That is the odds with the share in place of share / (1 − share).",
            math.log((1 - share) / share * (tokens - 1)): "The share is upside down.",
            math.exp(expected): "That is e to the score; take the logarithm.",
            math.log10(math.exp(expected)): "Softmax uses e: take the natural logarithm.",
            math.log(share / (1 - share)): "The others are missing: the more they are, the more the score has to be.",
        }
        slips = {value: text for value, text in slips.items() if not math.isclose(value, expected)}
        what = f"the score for {share:.2f} of {tokens:,} tokens"
        expect_number(answer(share, tokens), expected, what, slips=slips)


EXERCISES = (
    Exercise(
        id="long.1",
        title="YaRN by parts",
        dots=2,
        minutes=8,
        prompt=(
            "Write `yarn_speeds(speeds, low, high, factor)`. Pairs up to `low` keep their speed; pairs from `high` on "
            "are slowed: their speed is divided by `factor`. Between them a straight ramp, by the pair's number, mixes "
            "the speed as it was with the slowed one."
        ),
        solution=yarn_speeds,
        checker=_check_speeds,
        hints=(
            "First the ramp alone: 0 up to `low`, 1 from `high` on, (i − low) / (high − low) between.",
            "`.clamp(0, 1)` makes all three parts from the middle one.",
            "The speeds are a mixture: (1 − ramp) of the old one and ramp of the slowed one.",
        ),
        wrong=(
            WrongAnswer(
                "the fast pairs slowed",
                lambda v, a, b, s: v * _ramp(v, a, b) + v / s * (1 - _ramp(v, a, b)),
                says="wrong end",
            ),
            WrongAnswer("position interpolation", lambda v, a, b, s: v / s, says="position interpolation"),
            WrongAnswer(
                "multiplied by the factor",
                lambda v, a, b, s: v * (1 - _ramp(v, a, b)) + v * s * _ramp(v, a, b),
                says="got faster",
            ),
            WrongAnswer(
                "not clamped",
                lambda v, a, b, s: torch.lerp(v, v / s, (torch.arange(len(v), dtype=torch.float64) - a) / (b - a)),
                says="clamp",
            ),
            WrongAnswer(
                "a step for a ramp", lambda v, a, b, s: torch.where(torch.arange(len(v)) >= b, v / s, v), says="no ramp"
            ),
            WrongAnswer("wavelengths mixed", _harmonic, says="wavelengths"),
            WrongAnswer("nothing done", lambda v, a, b, s: v, says="came back"),
        ),
        also_right=(
            RightAnswer("a loop over pairs", _by_loop),
            RightAnswer("three cases", _by_where),
            RightAnswer("zeros, a ramp, ones", _by_parts),
            RightAnswer(
                "one factor for each pair",
                lambda v, a, b, s: v * (1 - _ramp(v, a, b) * (1 - 1 / s)),
            ),
        ),
        praise="That is the first correction. It says which angles are met, and not how sharply attention looks.",
        spec=(
            ("speeds", "[R/2]", "radians a token, fastest first"),
            ("low, high", "int", "numbers of pairs: where the ramp begins and ends"),
            ("factor", "float", "s, how many times longer the context becomes"),
            ("returns", "[R/2]", "the stretched speeds"),
        ),
    ),
    Exercise(
        id="long.2",
        title="the temperature",
        dots=2,
        minutes=6,
        prompt=(
            "YaRN multiplies queries *and* keys by 0.1 ln s + 1, which is the same as multiplying their product twice. "
            "V3 puts it where scores are divided by the root of a head's width. Write `softmax_scale(width, factor)`: "
            "the number that q·k is multiplied by before the softmax."
        ),
        solution=softmax_scale,
        checker=_check_scale,
        hints=(
            "Without a longer context it is 1 / √width.",
            "ln is the natural logarithm, `math.log`.",
            "The product of two vectors that were each multiplied by t has t².",
        ),
        wrong=(
            WrongAnswer("not squared", lambda w, s: (0.1 * math.log(s) + 1) / math.sqrt(w), says="square is missing"),
            WrongAnswer("no temperature", lambda w, s: 1 / math.sqrt(w), says="without any temperature"),
            WrongAnswer("divided by it", lambda w, s: 1 / ((0.1 * math.log(s) + 1) ** 2 * w**0.5), says="divides"),
            WrongAnswer("no width", lambda w, s: (0.1 * math.log(s) + 1) ** 2, says="width is missing"),
            WrongAnswer("no root", lambda w, s: (0.1 * math.log(s) + 1) ** 2 / w, says="root"),
            WrongAnswer("another logarithm", lambda w, s: (0.1 * math.log10(s) + 1) ** 2 / w**0.5, says="natural"),
        ),
        also_right=(
            RightAnswer("a power", lambda w, s: w**-0.5 * (1 + 0.1 * math.log(s)) ** 2),
            RightAnswer("both sides by themselves", lambda w, s: ((1 + math.log(s) / 10) / w**0.25) ** 2),
            RightAnswer("a tensor", lambda w, s: (0.1 * torch.tensor(s).double().log() + 1) ** 2 / w**0.5),
            RightAnswer("the square written out", lambda w, s: (1 + math.log(s) / 5 + math.log(s) ** 2 / 100) / w**0.5),
        ),
        praise="That is the second correction. Several ports forgot the square; nothing fails when they do.",
        spec=(
            ("width", "int", "of a head's query and key, 128 + 64 in V3"),
            ("factor", "float", "s"),
            ("returns", "float", "what q·k is multiplied by"),
        ),
    ),
    Exercise(
        id="long.3",
        title="the score that a longer context asks for",
        dots=2,
        minutes=7,
        prompt=(
            "One token stands out: its score is g, all others have 0. Its share of attention is "
            "e^g / (e^g + tokens − 1). Write `score_needed(share, tokens)`: the g that gives it this share."
        ),
        solution=score_needed,
        checker=_check_needed,
        hints=(
            "Solve for e^g first.",
            "share / (1 − share) is e^g over the number of the others.",
            "`math.log` is the natural logarithm.",
        ),
        wrong=(
            WrongAnswer("all tokens", lambda p, n: math.log(p / (1 - p) * n), says="others"),
            WrongAnswer("no odds", lambda p, n: math.log(p * (n - 1)), says="odds"),
            WrongAnswer("upside down", lambda p, n: math.log((1 - p) / p * (n - 1)), says="upside down"),
            WrongAnswer("no logarithm", lambda p, n: p / (1 - p) * (n - 1), says="logarithm"),
            WrongAnswer("another logarithm", lambda p, n: math.log10(p / (1 - p) * (n - 1)), says="natural"),
            WrongAnswer("the others forgotten", lambda p, n: math.log(p / (1 - p)), says="others are missing"),
        ),
        also_right=(
            RightAnswer("a sum of logarithms", lambda p, n: math.log(n - 1) + math.log(p) - math.log(1 - p)),
            RightAnswer("one over", lambda p, n: math.log((n - 1) / (1 / p - 1))),
            RightAnswer("logit", lambda p, n: float(torch.logit(torch.tensor(p).double())) + math.log(n - 1)),
            RightAnswer("a tensor", lambda p, n: (torch.tensor(p / (1 - p)).double() * (n - 1)).log()),
        ),
        praise="It grows by ln 32 from 4K to 128K: the more there is to look at, the more one has to stand out.",
        spec=(
            ("share", "float", "of the attention, above 0 and below 1"),
            ("tokens", "int", "in the context, with the one that stands out"),
            ("returns", "float", "its score g"),
        ),
    ),
)
