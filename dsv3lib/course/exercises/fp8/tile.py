"""Exercise fp8.1: quantise a tile."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsv3lib.course.task import Exercise, Rejected, RightAnswer, WrongAnswer, describe

Quantizer = Callable[[Tensor], tuple[Tensor, Tensor]]


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
)  # fmt: skip
