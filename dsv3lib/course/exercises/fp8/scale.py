"""Exercise fp8.2: the scale that loses least."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsv3lib.course.task import Exercise, Rejected, RightAnswer, WrongAnswer, describe


def best_scale(tile: Tensor, candidates: Tensor) -> Tensor:
    """The candidate with which the tile comes back with the least squared error."""
    scaled = tile / candidates[:, None]
    back = scaled.to(torch.float8_e4m3fn).float() * candidates[:, None]
    return candidates[(back - tile).square().sum(-1).argmin()]


def _check_best_scale(answer: Callable[[Tensor, Tensor], Tensor]) -> None:
    draw = torch.Generator().manual_seed(52)
    for case in range(6):
        tile = torch.randn(128, generator=draw) * 10.0 ** (case - 3)
        amax = tile.abs().max() / 448
        candidates = amax * torch.linspace(0.3, 2.2, 33)
        order = torch.randperm(33, generator=draw)
        got = answer(tile.clone(), candidates[order].clone())
        if isinstance(got, (int, float)):
            got = torch.tensor(float(got))
        if not isinstance(got, Tensor) or got.numel() != 1:
            raise Rejected(f"return one of the candidates; you returned {describe(got)}.")
        got = got.float().reshape(())
        right = best_scale(tile, candidates)
        if float(got).is_integer() and not torch.isclose(candidates, got).any():
            raise Rejected("that is the place of a candidate, not the scale itself.")
        if not torch.isclose(candidates, got, rtol=1e-5).any():
            raise Rejected("the answer is none of the candidates.")
        errors = {name: _error(tile, value) for name, value in (("yours", got), ("the best", right))}
        if errors["yours"] > errors["the best"] * 1.0001:
            if torch.isclose(got, candidates.min()):
                raise Rejected("that is the smallest candidate: values beyond 448 are cut off, which costs most.")
            if torch.isclose(got, candidates[(candidates - amax).abs().argmin()]):
                raise Rejected("that is amax/448: nothing is cut off, yet another candidate loses less.")
            if torch.isclose(got, candidates.max()):
                raise Rejected("that is the largest candidate: is the error measured after scaling back?")
            raise Rejected(
                f"another candidate has a squared error {errors['yours'] / errors['the best']:.3f} times smaller; "
                "squares count, over the whole tile, after scaling back."
            )


def _error(tile: Tensor, scale: Tensor) -> float:
    back = (tile / scale).to(torch.float8_e4m3fn).float() * scale
    return float((back - tile).double().square().sum())


def _best_by_loop(tile: Tensor, candidates: Tensor) -> Tensor:
    best, least = candidates[0], float("inf")
    for scale in candidates:
        error = float((((tile / scale).to(torch.float8_e4m3fn).float() * scale) - tile).pow(2).mean())
        if error < least:
            best, least = scale, error
    return best


def _best_without_scaling_back(tile: Tensor, candidates: Tensor) -> Tensor:
    scaled = tile / candidates[:, None]
    return candidates[(scaled.to(torch.float8_e4m3fn).float() - scaled).square().sum(-1).argmin()]


def _best_by_worst(tile: Tensor, candidates: Tensor) -> Tensor:
    back = (tile / candidates[:, None]).to(torch.float8_e4m3fn).float() * candidates[:, None]
    return candidates[(back - tile).abs().amax(-1).argmin()]


def _best_place(tile: Tensor, candidates: Tensor) -> int:
    back = (tile / candidates[:, None]).to(torch.float8_e4m3fn).float() * candidates[:, None]
    return int((back - tile).square().sum(-1).argmin())


EXERCISES = (
    Exercise(
        id="fp8.2",
        title="The scale that loses least",
        dots=2,
        minutes=7,
        prompt="Write `best_scale(tile, candidates)`. amax/448 cuts nothing off; is it the best? Of some candidate "
        "scales, return the one with which the tile comes back, from E4M3 and times the scale, with the "
        "least squared error.",
        solution=best_scale,
        checker=_check_best_scale,
        spec=(
            ("tile", "[128]", "FP32"),
            ("candidates", "[n]", "scales, in any order"),
            ("returns", "one number", "one of the candidates"),
        ),
        hints=(
            "Divide by the scale, cast, multiply by the scale: that is what comes back.",
            "All candidates at once: `tile / candidates[:, None]` is [n, 128].",
        ),
        also_right=(
            RightAnswer("a loop", _best_by_loop),
            RightAnswer("in FP64", lambda t, c: best_scale(t.double(), c.double())),
            RightAnswer("as a plain number", lambda t, c: float(best_scale(t, c))),
            RightAnswer("with min", lambda t, c: min(c, key=lambda s: _error(t, s))),
        ),
        wrong=(
            WrongAnswer("the nearest to amax/448", lambda t, c: c[(c - t.abs().max() / 448).abs().argmin()],
                        says="amax/448"),
            WrongAnswer("the smallest", lambda t, c: c.min(), says="smallest"),
            WrongAnswer("the error not scaled back", _best_without_scaling_back, says="scaling back"),
            WrongAnswer("the largest error counts", _best_by_worst, says="squares"),
            WrongAnswer("the place of it", _best_place, says="place"),
            WrongAnswer("none of them", lambda t, c: t.abs().max() / 200, says="none of the candidates"),
        ),
        praise="The gain is a few per cent of an error that is a few per cent: nobody searches in training.",
    ),
)  # fmt: skip
