"""Exercises of 02_decoupled_rope: the rotation, the matrix that absorbing would need, the two layouts, slow "
"pairs."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsv3lib.course.task import (
    Exercise,
    RightAnswer,
    WrongAnswer,
    expect_number,
    expect_same,
    expect_tensor,
)

Number = int | float


# ---- rope.1: the rotation ---------------------------------------------------------------------------------


def rotate(x, angles):
    """Turn each pair of neighbours by its angle."""
    a, b = x[..., 0::2], x[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def _halves(x: Tensor, angles: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


def _cos_alone(x: Tensor, angles: Tensor) -> Tensor:
    return x * angles.cos().repeat_interleave(2, -1)


def _unstacked(x: Tensor, angles: Tensor) -> Tensor:
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.cat(
        [a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1
    )


def _one_sign(x: Tensor, angles: Tensor) -> Tensor:
    a, b = x[..., 0::2], x[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([a * cos + b * sin, a * sin + b * cos], -1).flatten(-2)


def _check_rotate(answer: Callable[..., Any]) -> None:
    draw = torch.Generator().manual_seed(11)
    for shape in ((5, 8), (3, 2), (2, 4, 6), (1, 16)):
        x = torch.randn(*shape, generator=draw, dtype=torch.float64)
        angles = torch.randn(*shape[:-1], shape[-1] // 2, generator=draw, dtype=torch.float64)
        got, expected = answer(x.clone(), angles.clone()), rotate(x, angles)
        if shape[-1] > 2:
            expect_same(got, {
                "those pairs are x_i and x_(i + R/2), the split halves of other ports; here neighbours are pairs.":
                    _halves(x, angles),
                "the numbers are right but stand in another order: first all first members, then all second ones. "
                "Each pair has to go back to its own two places.": _unstacked(x, angles),
            })  # fmt: skip
        expect_same(got, {
            "that turns the other way: check the two signs of the sine.": rotate(x, -angles),
            "that is a scaling by the cosine; without the sine nothing turns.": _cos_alone(x, angles),
            "both sines have the same sign, so lengths change; a turn keeps them.": _one_sign(x, angles),
            "nothing has been turned: x came back as it was.": x,
        })  # fmt: skip
        expect_tensor(got, expected, "the turned vectors", atol=1e-9)


def _by_matrix(x: Tensor, angles: Tensor) -> Tensor:
    c, s = angles.cos(), angles.sin()
    turn = torch.stack([torch.stack([c, -s], -1), torch.stack([s, c], -1)], -2)
    return torch.einsum("...ab,...b->...a", turn, x.unflatten(-1, (-1, 2))).flatten(-2)


def _in_place(x: Tensor, angles: Tensor) -> Tensor:
    a, b = x[..., 0::2].clone(), x[..., 1::2].clone()
    x[..., 0::2] = a * angles.cos() - b * angles.sin()
    x[..., 1::2] = a * angles.sin() + b * angles.cos()
    return x


def _by_complex(x: Tensor, angles: Tensor) -> Tensor:
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
        torch.ones_like(angles), angles
    )
    return torch.view_as_real(turned).flatten(-2)


def _by_swapping(x: Tensor, angles: Tensor) -> Tensor:
    cos, sin = angles.cos().repeat_interleave(2, -1), angles.sin().repeat_interleave(2, -1)
    swapped = torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2)
    return x * cos + swapped * sin


# ---- rope.2: the matrix that absorbing would need -------------------------------------------------------------


def matrix_for_distance(w_uk, frequencies, distance):
    """W^UK with its rows turned back by the distance: the query is ahead of the key."""
    angles = (-distance * frequencies).expand(w_uk.shape[1], -1)
    return rotate(w_uk.T, angles).T


def _check_matrix(answer: Callable[..., Any]) -> None:
    draw = torch.Generator().manual_seed(12)
    for rows, columns, distance in ((8, 5, 3), (4, 9, 17), (6, 6, 1), (2, 3, 0)):
        w = torch.randn(rows, columns, generator=draw, dtype=torch.float64)
        frequencies = 10.0 ** -torch.arange(rows // 2, dtype=torch.float64)
        got = answer(w.clone(), frequencies.clone(), distance)
        expected = matrix_for_distance(w, frequencies, distance)
        if distance:
            expect_same(got, {
                "the sign: R_tᵀ R_j turns by j − t, which is minus the distance.":
                    matrix_for_distance(w, frequencies, -distance),
                "nothing depends on the distance: that is W^UK itself, right at distance 0 alone.": w,
                "that is transposed: q stands at its left, so it has a row for each number of q.": expected.T,
                "those pairs are split halves; here neighbours are pairs.":
                    _halves(w.T, (-distance * frequencies).expand(columns, -1)).T,
                "the distance is missing: that is the matrix for distance 1.":
                    matrix_for_distance(w, frequencies, 1) if distance != 1 else torch.zeros(0),
            })  # fmt: skip
        expect_tensor(got, expected, f"the matrix for distance {distance}", atol=1e-9)


def _block_matrix(w: Tensor, frequencies: Tensor, distance: Number) -> Tensor:
    blocks = [
        torch.tensor([[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]], dtype=w.dtype)
        for a in (distance * frequencies).tolist()
    ]
    return torch.block_diag(*blocks) @ w


def _row_pairs(w: Tensor, frequencies: Tensor, distance: Number) -> Tensor:
    c, s = (distance * frequencies).cos()[:, None], (distance * frequencies).sin()[:, None]
    out = torch.empty_like(w)
    out[0::2], out[1::2] = w[0::2] * c + w[1::2] * s, w[1::2] * c - w[0::2] * s
    return out


def _two_turns(w: Tensor, frequencies: Tensor, distance: Number) -> Tensor:
    """R_tᵀ R_j with t and j both far from zero."""
    eye = torch.eye(len(w), dtype=w.dtype)
    at = [rotate(eye, (p * frequencies).expand(len(w), -1)).T for p in (distance + 4, 4)]
    return at[0].T @ at[1] @ w


# ---- rope.3: the two layouts ----------------------------------------------------------------------------------


def to_split_halves(x):
    """Even places first, then odd ones."""
    return torch.cat([x[..., 0::2], x[..., 1::2]], -1)


def _check_layout(answer: Callable[..., Any]) -> None:
    draw = torch.Generator().manual_seed(13)
    for shape in ((8,), (3, 12), (2, 3, 6), (5, 2)):
        x = torch.randn(*shape, generator=draw, dtype=torch.float64)
        got = answer(x.clone())
        if shape[-1] > 4:
            expect_same(got, {
                "that is the way back, from halves to pairs.": x.unflatten(-1, (2, -1)).mT.flatten(-2),
                "nothing has moved: x came back as it was.": x,
                "the halves are the right ones, but the odd places come first.": to_split_halves(x).roll(
                    shape[-1] // 2, -1),
                "each pair has been swapped; they have to be parted.": x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2),
                "the two halves have been exchanged, but pairs still are neighbours.": x.roll(shape[-1] // 2, -1),
            })  # fmt: skip
        expect_tensor(got, to_split_halves(x), "the split layout", atol=1e-12)


# ---- rope.4: how many pairs ever turn round --------------------------------------------------------------------


def pairs_that_turn(dims, theta, length):
    """2π θ^(2i/R) tokens are one turn of pair i."""
    return sum(2 * math.pi * theta ** (2 * i / dims) <= length for i in range(dims // 2))


def _check_pairs(answer: Callable[..., Any]) -> None:
    draw = random.Random(14)
    cases = [(64, 10_000.0, 4096), (64, 10_000.0, 131_072), (16, 10_000.0, 128), (8, 500.0, 6)]
    cases += [(2 * draw.randrange(2, 60), 10.0 ** draw.randrange(2, 7), draw.randrange(7, 200_000)) for _ in range(6)]
    for dims, theta, length in cases:
        expected = pairs_that_turn(dims, theta, length)
        slips = {
            sum(theta ** (2 * i / dims) <= length for i in range(dims // 2)):
                "That counts pairs that have gone one radian; a whole turn is 2π of them.",
            sum(2 * math.pi * theta ** (i / dims) <= length for i in range(dims)):
                "That counts dimensions with an exponent of i/R; a pair is two of them, its exponent is 2i/R.",
            2 * expected: "That counts dimensions; a pair is two of them.",
            dims // 2 - expected: "That counts the pairs that do not.",
            sum(2 * math.pi * theta ** (i / dims) <= length for i in range(dims // 2)):
                "The exponent is 2i/R: half of it makes the slow pairs too fast.",
            sum(math.pi * theta ** (2 * i / dims) <= length for i in range(dims // 2)):
                "That counts pairs that have made half a turn.",
        }  # fmt: skip
        slips.pop(expected, None)
        expect_number(
            answer(dims, theta, length), expected,
            f"the pairs of {dims} dimensions that turn once within {length:,} tokens", slips=slips,
        )  # fmt: skip


def _solved_for_i(dims: int, theta: float, length: int) -> int:
    if length < 2 * math.pi:
        return 0
    last = dims * math.log(length / (2 * math.pi)) / (2 * math.log(theta))
    return min(dims // 2, math.floor(last) + 1)


EXERCISES = (
    Exercise(
        id="rope.1",
        title="turn pairs of numbers",
        dots=2,
        minutes=8,
        prompt=(
            "Write `rotate(x, angles)`: turn each pair of neighbours (a, b), that is `(x[0], x[1])`, `(x[2], "
            "x[3])`, …, by its angle φ: it becomes (a cos φ − b sin φ, a sin φ + b cos φ). Any number of "
            "dimensions may stand before the last."
        ),
        solution=rotate,
        checker=_check_rotate,
        hints=(
            "First take the members of all pairs apart: every other number, from 0 and from 1.",
            "`a, b = x[..., 0::2], x[..., 1::2]`; the formula gives two tensors of the same shape.",
            "`torch.stack([…, …], -1)` puts the two members of a pair beside each other; `.flatten(-2)` makes one row.",
        ),
        wrong=(
            WrongAnswer("split halves are pairs", _halves, says="neighbours"),
            WrongAnswer("the other way round", lambda x, a: rotate(x, -a), says="other way"),
            WrongAnswer("the cosine alone", _cos_alone, says="scaling"),
            WrongAnswer("put together in halves", _unstacked, says="another order"),
            WrongAnswer("both sines with one sign", _one_sign, says="same sign"),
            WrongAnswer("nothing done", lambda x, a: x, says="came back"),
        ),
        also_right=(
            RightAnswer("as complex numbers", _by_complex),
            RightAnswer("as 2 x 2 matrices", _by_matrix),
            RightAnswer("in place", _in_place),
            RightAnswer("x cos + swapped sin", _by_swapping),
        ),
        praise="This is all of RoPE. What it is good for is the angles: one speed for each pair, times the position.",
        spec=(
            ("x", "[…, R]", "rotary dimensions, neighbours are pairs"),
            ("angles", "[…, R/2]", "an angle for each pair, in radians"),
            ("returns", "[…, R]", "x with every pair turned"),
        ),
    ),
    Exercise(
        id="rope.2",
        title="the matrix that absorbing would need",
        dots=3,
        minutes=10,
        prompt=(
            "Suppose the content keys were turned. The score of a query at position `t` with a latent at `j` is "
            "(R_t q)ᵀ R_j (W^UK c). Write `matrix_for_distance(w_uk, frequencies, distance)`: the matrix M with "
            "qᵀ M c = that score, for the distance t − j. You may call `rotate` from above."
        ),
        solution=matrix_for_distance,
        checker=_check_matrix,
        hints=(
            "R_t is a rotation: its transpose turns back. What does R_tᵀ R_j do to a vector?",
            "It turns by j − t: minus the distance. M is W^UK with its columns turned so.",
            "`rotate` turns rows; the columns of `w_uk` are the rows of `w_uk.T`.",
        ),
        wrong=(
            WrongAnswer("turned forwards", lambda w, f, d: matrix_for_distance(w, f, -d), says="minus the distance"),
            WrongAnswer("not turned", lambda w, f, d: w, says="W^UK itself"),
            WrongAnswer("transposed", lambda w, f, d: matrix_for_distance(w, f, d).T, says="transposed"),
            WrongAnswer("the distance left out", lambda w, f, d: matrix_for_distance(w, f, 1), says="distance 1"),
            WrongAnswer(
                "split halves", lambda w, f, d: _halves(w.T, (-d * f).expand(w.shape[1], -1)).T, says="split halves"
            ),
        ),
        also_right=(
            RightAnswer("a block-diagonal rotation", _block_matrix),
            RightAnswer("pairs of rows by hand", _row_pairs),
            RightAnswer("two rotations, from any two positions", _two_turns),
            RightAnswer("as complex numbers", lambda w, f, d: _by_complex(w.T, (-d * f).expand(w.shape[1], -1)).T),
        ),
        praise="Another matrix for every distance: nothing could be moved to the query once and for all.",
        spec=(
            ("w_uk", "[d_h, d_c]", "a head's up-projection of keys"),
            ("frequencies", "[d_h/2]", "radians a token, one for each pair"),
            ("distance", "a number", "t − j, how far back the key is"),
            ("returns", "[d_h, d_c]", "M of this distance"),
        ),
    ),
    Exercise(
        id="rope.3",
        title="from pairs to halves",
        dots=1,
        minutes=5,
        prompt=(
            "V3's checkpoint stores `x0 y0 x1 y1 …`; many ports want `x0 x1 … y0 y1 …`. Write `to_split_halves(x)` "
            "for the last dimension of `x`."
        ),
        solution=to_split_halves,
        checker=_check_layout,
        hints=("Every other number, twice.", "`x[..., 0::2]` are the first members of all pairs.", "`torch.cat`."),
        wrong=(
            WrongAnswer("the way back", lambda x: x.unflatten(-1, (2, -1)).mT.flatten(-2), says="way back"),
            WrongAnswer("nothing done", lambda x: x, says="came back"),
            WrongAnswer("odd places first", lambda x: torch.cat([x[..., 1::2], x[..., 0::2]], -1), says="odd places"),
            WrongAnswer(
                "members of a pair swapped", lambda x: x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2), says="swapped"
            ),
            WrongAnswer("the halves exchanged", lambda x: x.roll(x.shape[-1] // 2, -1), says="exchanged"),
        ),
        also_right=(
            RightAnswer("a transposed view", lambda x: x.unflatten(-1, (-1, 2)).mT.flatten(-2)),
            RightAnswer("an index", lambda x: x[..., torch.arange(x.shape[-1]).view(-1, 2).T.flatten()]),
            RightAnswer("unbind", lambda x: torch.cat(x.unflatten(-1, (-1, 2)).unbind(-1), -1)),
            RightAnswer("movedim", lambda x: x.reshape(*x.shape[:-1], -1, 2).movedim(-1, -2).reshape(x.shape)),
        ),
        praise="Apply it to the rows of two weight matrices, and a checkpoint changes its layout. To one: it breaks.",
        spec=(("x", "[…, R]", "neighbours are pairs"), ("returns", "[…, R]", "first members, then second members")),
    ),
    Exercise(
        id="rope.4",
        title="the pairs that never turn round",
        dots=2,
        minutes=7,
        prompt=(
            "Pair `i` turns by θ^(−2i/R) radians a token. Write `pairs_that_turn(dims, theta, length)`: how many "
            "of the R/2 pairs complete at least one whole turn within `length` tokens?"
        ),
        solution=pairs_that_turn,
        checker=_check_pairs,
        hints=(
            "A whole turn is 2π radians. How many tokens does pair i need for it?",
            "2π · θ^(2i/R) tokens.",
            "Count the i in `range(dims // 2)` for which that is at most `length`.",
        ),
        wrong=(
            WrongAnswer(
                "a radian for a turn",
                lambda r, t, n: sum(t ** (2 * i / r) <= n for i in range(r // 2)),
                says="radian",
            ),
            WrongAnswer("dimensions", lambda r, t, n: 2 * pairs_that_turn(r, t, n), says="dimensions"),
            WrongAnswer("those that do not", lambda r, t, n: r // 2 - pairs_that_turn(r, t, n), says="do not"),
            WrongAnswer(
                "half the exponent",
                lambda r, t, n: sum(2 * math.pi * t ** (i / r) <= n for i in range(r // 2)),
                says="exponent",
            ),
            WrongAnswer(
                "half a turn",
                lambda r, t, n: sum(math.pi * t ** (2 * i / r) <= n for i in range(r // 2)),
                says="half a turn",
            ),
        ),
        also_right=(
            RightAnswer("solved for i", _solved_for_i),
            RightAnswer(
                "angles at the end",
                lambda r, t, n: int((n * t ** (-torch.arange(0, r, 2).double() / r) >= 2 * math.pi).sum()),
            ),
            RightAnswer(
                "a tensor of one number",
                lambda r, t, n: (n * t ** (-torch.arange(0, r, 2).double() / r) >= 2 * math.pi).sum(),
            ),
            RightAnswer(
                "a loop that stops",
                lambda r, t, n: next((i for i in range(r // 2) if 2 * math.pi * t ** (2 * i / r) > n), r // 2),
            ),
        ),
        praise=(
            "At V3's sizes 23 of 32 within the 4,096 tokens that it is first trained on: the other 9 meet angles "
            "in a longer text that they have never seen. That is where notebook 08 begins."
        ),
        spec=(
            ("dims", "int", "R, rotary dimensions"),
            ("theta", "float", "RoPE's base, 10,000 in V3"),
            ("length", "int", "tokens"),
            ("returns", "int", "pairs that turn at least once"),
        ),
    ),
)
