"""Exercises of 05_fp8_tile_quantization: a tile, the scale that loses least, promotion, what stays high."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dsv3lib.course.task import Exercise, Rejected, RightAnswer, WrongAnswer, describe, expect_tensor

Quantizer = Callable[[Tensor], tuple[Tensor, Tensor]]


# ---- fp8.1: a tile ------------------------------------------------------------------------------------------


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """One scale for each 128 values of a row; the largest of them becomes 448."""
    tiles = x.float().unflatten(-1, (-1, 128))
    amax = tiles.abs().amax(-1)
    scales = torch.where(amax > 0, amax / 448, 1.0)
    values = (tiles / scales[..., None]).to(torch.float8_e4m3fn)
    return values.flatten(-2), scales


def _check_quantize(answer: Quantizer) -> None:
    draw = torch.Generator().manual_seed(51)
    x = torch.randn(3, 384, generator=draw) * torch.tensor([1.0, 1e-4, 300.0])[:, None]
    x[0, 130], x[1, 256:] = -90.0, 0.0  # an outlier that is negative; a tile of zeros
    got = answer(x.clone())
    if not isinstance(got, (tuple, list)) or len(got) != 2:
        raise Rejected(f"return two tensors, (values, scales); you returned {describe(got)}.")
    values, scales = got
    for name, one in (("values", values), ("scales", scales)):
        if not isinstance(one, Tensor):
            raise Rejected(f"{name} should be a tensor; yours is {describe(one)}.")
    right_values, right_scales = quantize(x)
    if scales.shape == (3, 1) or scales.numel() == 1 or (scales.shape == (3, 3) and _alike(scales[:, :1], scales)):
        which = "tensor" if scales.numel() == 1 or _alike(scales[:1], scales) else "row"
        raise Rejected(f"that is one scale for the whole {which}: a scale belongs to 128 values, its tile.")
    if scales.shape != (3, 3):
        raise Rejected(f"scales should have shape [3, 3], one a tile; yours {list(scales.shape)}.")
    if values.shape != x.shape:
        raise Rejected(f"values should have the shape of x, {list(x.shape)}; yours {list(values.shape)}.")
    scales = scales.double()
    if not scales.isfinite().all() or values.float().isnan().any():
        raise Rejected("the tile of zeros gives NaN or infinity: its scale cannot come from its maximum.")
    if torch.allclose(scales * right_scales.double(), torch.ones(3, 3, dtype=torch.float64), rtol=1e-4):
        raise Rejected("your scales are the inverse: a scale is what a stored value is *multiplied* by.")
    if scales[0, 1] < 0.5 * right_scales[0, 1]:
        raise Rejected("the outlier is negative, and the scale missed it: the maximum is that of the sizes, |x|.")
    live = right_scales != 1.0
    ratio = (scales / right_scales)[live]
    if (ratio - 1).abs().max() > 1e-3:
        raise Rejected(
            f"the scales are {float(ratio.median()):.3g} times what they should be: the largest value of a tile "
            "becomes 448, E4M3's largest."
        )
    stored = values.float()
    if not torch.equal(stored, stored.to(torch.float8_e4m3fn).float()):
        raise Rejected("some values are none of E4M3's: after the division, cast to torch.float8_e4m3fn.")
    if torch.equal(stored, stored.round()) and not torch.equal(right_values.float(), stored):
        raise Rejected("the values are whole numbers: E4M3 is a floating-point format, with fractions near zero.")
    back = stored.double() * scales.repeat_interleave(128, -1)
    step = torch.maximum(x.abs() / 16, right_scales.repeat_interleave(128, -1) * 2.0**-10)
    if ((back - x).abs() > 1.01 * step).any():
        raise Rejected("values · scales does not give x back within half a step of E4M3.")


def _alike(part: Tensor, whole: Tensor) -> bool:
    return bool(torch.allclose(part.expand_as(whole).double(), whole.double(), rtol=1e-6))


def _with(amax: Callable[[Tensor], Tensor], top: float = 448.0) -> Quantizer:
    """A quantiser whose tiles' maxima are taken in another way."""

    def made(x: Tensor) -> tuple[Tensor, Tensor]:
        tiles = x.unflatten(-1, (-1, 128))
        scales = (amax(tiles) / top).clamp(min=1e-12).expand(tiles.shape[:-1])
        return (tiles / scales[..., None]).to(torch.float8_e4m3fn).flatten(-2), scales

    return made


def _by_loop(x: Tensor) -> tuple[Tensor, Tensor]:
    values, scales = torch.empty_like(x), torch.ones(*x.shape[:-1], x.shape[-1] // 128)
    for t in range(scales.shape[-1]):
        part = x[..., t * 128 : (t + 1) * 128]
        top = part.abs().max(-1).values
        scales[..., t] = torch.where(top == 0, torch.ones_like(top), top / 448)
        values[..., t * 128 : (t + 1) * 128] = (part / scales[..., t : t + 1]).to(torch.float8_e4m3fn).float()
    return values, scales


def _inverse_first(x: Tensor) -> tuple[Tensor, Tensor]:
    tiles = x.reshape(*x.shape[:-1], x.shape[-1] // 128, 128)
    inverse = 448 / tiles.abs().amax(-1, keepdim=True).clamp(min=1e-20)
    return (tiles * inverse).clamp(-448, 448).to(torch.float8_e4m3fn).reshape(x.shape), (1 / inverse).squeeze(-1)


def _no_care_for_zeros(x: Tensor) -> tuple[Tensor, Tensor]:
    tiles = x.unflatten(-1, (-1, 128))
    scales = tiles.abs().amax(-1) / 448
    return (tiles / scales[..., None]).to(torch.float8_e4m3fn).flatten(-2), scales


def _as_integers(x: Tensor) -> tuple[Tensor, Tensor]:
    tiles = x.unflatten(-1, (-1, 128))
    scales = (tiles.abs().amax(-1) / 448).clamp(min=1e-12)
    return (tiles / scales[..., None]).round().to(torch.float8_e4m3fn).flatten(-2), scales


# ---- fp8.2: the scale that loses least ----------------------------------------------------------------------


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


# ---- fp8.3: promotion ---------------------------------------------------------------------------------------


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


# ---- fp8.4: what stays high ---------------------------------------------------------------------------------


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
        id="fp8.1",
        title="Quantise a tile",
        dots=2,
        minutes=8,
        prompt="Write `quantize(x)`: give each 128 values of a row a scale of their own, so that the largest of "
        "them becomes 448, and cast them to E4M3. A tile of zeros has no largest value to go by: its scale "
        "is 1.",
        solution=quantize,
        checker=_check_quantize,
        spec=(
            ("x", "[T, 128 n]", "an activation, any floating dtype"),
            ("values", "[T, 128 n]", "E4M3 (or floats that hold its values)"),
            ("scales", "[T, n]", "what a stored value is multiplied by"),
        ),
        hints=(
            "`x.unflatten(-1, (-1, 128))` has a dimension for tiles.",
            "Divide each tile by `amax / 448`, with amax the largest |x| in it.",
            "`torch.where(amax > 0, amax / 448, 1.0)`, then `.to(torch.float8_e4m3fn)`.",
        ),
        also_right=(
            RightAnswer("a loop over the tiles", _by_loop),
            RightAnswer("multiplying by the inverse", _inverse_first),
            RightAnswer("a floor under the maximum", _with(lambda t: t.abs().amax(-1).clamp(min=1e-20))),
            RightAnswer("through max and min", _with(lambda t: torch.maximum(t.amax(-1), -t.amin(-1)))),
        ),
        wrong=(
            WrongAnswer("one scale for all", _with(lambda t: t.abs().max()), says="whole tensor"),
            WrongAnswer("one scale a row", _with(lambda t: t.abs().amax((-1, -2))[..., None]), says="whole row"),
            WrongAnswer("the sign forgotten", _with(lambda t: t.amax(-1)), says="negative"),
            WrongAnswer("another format's largest", _with(lambda t: t.abs().amax(-1), 240.0), says="448"),
            WrongAnswer("zeros forgotten", _no_care_for_zeros, says="zeros"),
            WrongAnswer("the inverse", lambda x: (quantize(x)[0], 1 / quantize(x)[1]), says="inverse"),
            WrongAnswer("whole numbers", _as_integers, says="whole numbers"),
            WrongAnswer("no cast", lambda x: (x / quantize(x)[1].repeat_interleave(128, -1), quantize(x)[1]),
                        says="none of E4M3's"),
        ),
        praise="An outlier now spoils 127 neighbours and nobody else.",
    ),
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
