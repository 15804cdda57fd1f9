"""Exercises: bytes of the FP8 cache, and where unpacking begins to pay."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch

from dsv3lib.course.task import (
    Exercise,
    Rejected,
    RightAnswer,
    WrongAnswer,
    expect_number,
)


def fp8_cache_bytes(kv_rank, rope_dim, tile):
    """One byte per latent number, four per started tile for its scale, two per number of the position key."""
    return kv_rank + 4 * math.ceil(kv_rank / tile) + 2 * rope_dim


def _check_fp8(answer: Callable[..., int]) -> None:
    draw = random.Random(6)
    cases = [(96, 20, 32), (512, 64, 128), (64, 16, 128), (100, 6, 64), (512, 64, 512)]
    cases += [
        (draw.randrange(8, 999), 2 * draw.randrange(1, 60), draw.choice((16, 32, 128))) for _ in range(4)
    ]
    for rank, rope, tile in cases:
        tiles = -(-rank // tile)
        expect_number(
            answer(rank, rope, tile),
            rank + 4 * tiles + 2 * rope,
            f"the bytes for a latent of {rank}, a position key of {rope} and tiles of {tile}",
            slips={
                rank + 2 * rope: "The scales are missing: one FP32 number per tile.",
                rank + 4 * tiles + rope: "The position key stays in BF16: two bytes per number.",
                rank + tiles + 2 * rope: "A scale is FP32: four bytes.",
                rank + 4 + 2 * rope: "One scale per tile, not one for the whole latent.",
                2 * (rank + rope): "That is the BF16 cache.",
                2 * rank + 4 * tiles + 2 * rope: "The latent is in FP8: one byte per number.",
                rank
                + 4 * (rank // tile)
                + 2 * rope: "A tile that is only begun needs its scale too: round up.",
                rank + 4 * rank / tile + 2 * rope: "There are no parts of a tile: round up to whole ones.",
                rank + rope + 4 * -(-(rank + rope) // tile): (
                    "Only the latent is in FP8; the position key stays in BF16 and needs no scale."
                ),
            },
        )


def break_even(heads, nope, rope, value, kv_rank):
    """The fewest queries for which one unpacking, shared by all of them, costs less than absorbed "
    "attention."""
    unpack = 2 * kv_rank * heads * (nope + value)
    expanded = 2 * heads * (nope + rope + value)
    absorbed = 2 * heads * (2 * kv_rank + rope)
    return math.floor(unpack / (absorbed - expanded)) + 1


def _check_break_even(answer: Callable[..., int]) -> None:
    draw = random.Random(7)
    cases = [(128, 128, 64, 128, 512), (8, 32, 16, 32, 64), (1, 4, 2, 4, 8)]
    while len(cases) < 9:
        heads, nope, rope, value = (draw.randrange(1, 100) for _ in range(4))
        rank = draw.randrange((nope + value) // 2 + 1, 400)
        cases.append((heads, nope, rope, value, rank))
    for heads, nope, rope, value, rank in cases:
        ratio = rank * (nope + value) / (2 * rank - nope - value)
        got = answer(heads, nope, rope, value, rank)
        where = (
            f"the number of queries with d_h {nope}, d_h^R {rope}, d_v {value}, d_c {rank} and {heads} heads"
        )
        slips = {
            rank * (nope + value) / (2 * rank + rope): "The expanded form has to compare and to mix too.",
            rank * (nope + value) / (2 * rank - nope - value) * heads: "Every head does both: the heads cancel.",
            rank * (nope + value) / (rank - nope): "The values are mixed in both forms, and their widths differ too.",
            math.floor(ratio): "At so many queries absorbing still costs no more: one query further.",
        }  # fmt: skip
        if isinstance(got, (int, float)) and not isinstance(got, bool):
            for slip, sentence in slips.items():
                same = abs(got - slip) < 1e-6 * max(1.0, slip) or got in (
                    math.ceil(slip),
                    math.floor(slip) + 1,
                )
                if same and got != math.floor(ratio) + 1:
                    raise Rejected(f"{where}: {got:g} is not right. {sentence}")
            if abs(got - ratio) < 1e-9 * ratio and got != math.floor(ratio) + 1:
                raise Rejected(
                    "that is where both cost the same; the answer is the next whole number of queries."
                )
        expect_number(got, math.floor(ratio) + 1, where)


def _by_search(heads, nope, rope, value, rank):
    queries = 1
    while rank * (nope + value) + queries * (nope + rope + value) >= queries * (2 * rank + rope):
        queries += 1
    return queries


EXERCISES = (
    Exercise(
        id="mla.4",
        title="the cache in FP8",
        dots=1,
        minutes=4,
        prompt=(
            "In an FP8 cache each latent number takes one byte. Every `tile` numbers of the latent (the "
            "last tile may be shorter) share a scale of four bytes; the position key stays in BF16, two "
            "bytes per number. Write `fp8_cache_bytes`: the bytes of one token in one layer."
        ),
        spec=(
            ("kv_rank", "number", "d_c, numbers in the latent"),
            ("rope_dim", "number", "d_h^R, numbers in the position key"),
            ("tile", "number", "latent numbers that share a scale (V3: 128)"),
            ("returns", "number", "bytes"),
        ),
        solution=fp8_cache_bytes,
        checker=_check_fp8,
        hints=(
            "Three parts: the latent, its scales, the position key.",
            "How many tiles does a latent of 100 numbers have with tiles of 64? Two.",
        ),
        also_right=(
            RightAnswer("rounding up by floor division", lambda c, r, t: c + 4 * -(-c // t) + 2 * r),
            RightAnswer("rounding up by adding", lambda c, r, t: c + (c + t - 1) // t * 4 + r * 2),
            RightAnswer("tiles counted out", lambda c, r, t: c + sum(4 for _ in range(0, c, t)) + r + r),
            RightAnswer("a real number", lambda c, r, t: float(c + 4 * math.ceil(c / t) + 2 * r)),
            RightAnswer(
                "measured on tensors",
                lambda c, r, t: (
                    torch.empty(c, dtype=torch.float8_e4m3fn).nbytes
                    + torch.empty(-(-c // t)).nbytes
                    + torch.empty(r, dtype=torch.bfloat16).nbytes
                ),
            ),
        ),
        wrong=(
            WrongAnswer("no scales", lambda c, r, t: c + 2 * r, says="scales are missing"),
            WrongAnswer(
                "the position key in FP8", lambda c, r, t: c + 4 * -(-c // t) + r, says="stays in BF16"
            ),
            WrongAnswer("a byte per scale", lambda c, r, t: c + -(-c // t) + 2 * r, says="four bytes"),
            WrongAnswer("one scale in all", lambda c, r, t: c + 4 + 2 * r, says="per tile"),
            WrongAnswer("the BF16 cache", lambda c, r, t: 2 * (c + r), says="BF16 cache"),
            WrongAnswer("rounded down", lambda c, r, t: c + 4 * (c // t) + 2 * r, says="round up"),
        ),
        praise="At V3's sizes: 656 bytes instead of 1,152.",
    ),
    Exercise(
        id="mla.5",
        title="where unpacking begins to pay",
        dots=3,
        minutes=9,
        prompt=(
            "When a prompt is read, many queries meet the same cached token, and all of them can share one "
            "unpacking. Per cached token and layer, unpacking costs `2 · d_c · heads · (d_h + d_v)` "
            "operations once; each query then costs `2 · heads · (d_h + d_h^R + d_v)` expanded, and `2 · "
            "heads · (2 · d_c + d_h^R)` absorbed. Write `break_even`: the smallest number of queries for "
            "which the expanded form costs less. (`2 · d_c` is larger than `d_h + d_v` in every case that "
            "is tried.)"
        ),
        spec=(
            ("heads", "number", "n_h"),
            ("nope", "number", "d_h"),
            ("rope", "number", "d_h^R"),
            ("value", "number", "d_v"),
            ("kv_rank", "number", "d_c"),
            ("returns", "whole number", "queries"),
        ),
        solution=break_even,
        checker=_check_break_even,
        hints=(
            "Write both costs for n queries and ask when one is less than the other.",
            "n · (absorbed − expanded) must be more than the cost of unpacking.",
            "`floor(unpack / (absorbed - expanded)) + 1`: where both cost the same, expanding is not yet cheaper.",
        ),
        also_right=(
            RightAnswer("counted up", _by_search),
            RightAnswer("whole numbers alone", lambda h, n, r, v, c: c * (n + v) // (2 * c - n - v) + 1),
            RightAnswer(
                "with the heads left in",
                lambda h, n, r, v, c: 2 * c * h * (n + v) // (2 * h * (2 * c + r) - 2 * h * (n + r + v)) + 1,
            ),
            RightAnswer(
                "a real number that is whole", lambda h, n, r, v, c: float(c * (n + v) // (2 * c - n - v) + 1)
            ),
            RightAnswer(
                "the first of a range",
                lambda h, n, r, v, c: next(
                    t for t in range(1, 10**7) if c * (n + v) + t * (n + r + v) < t * (2 * c + r)
                ),
            ),
        ),
        wrong=(
            WrongAnswer("the point itself", lambda h, n, r, v, c: c * (n + v) / (2 * c - n - v), says="cost"),
            WrongAnswer(
                "rounded down", lambda h, n, r, v, c: c * (n + v) // (2 * c - n - v), says="one query further"
            ),
            WrongAnswer(
                "the expanded form compares for nothing",
                lambda h, n, r, v, c: c * (n + v) // (2 * c + r) + 1,
                says="compare and to mix",
            ),
            WrongAnswer(
                "heads left on one side",
                lambda h, n, r, v, c: h * c * (n + v) // (2 * c - n - v) + 1,
                says="heads cancel",
            ),
            WrongAnswer(
                "only the keys' widths",
                lambda h, n, r, v, c: c * (n + v) // max(1, c - n) + 1,
                says="values are mixed",
            ),
        ),
        praise=(
            "171 at V3's sizes: a prompt of 171 tokens or more is read expanded, a single new token absorbed."
        ),
    ),
)
