"""Exercise: how a module joins the hidden state and the embedding of the token further on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsv3lib.course.task import Exercise, RightAnswer, WrongAnswer, expect_same, expect_tensor


def join(h, e, gain_h, gain_e, M):
    """M [norm e ; norm h], in the order of the released files: the embedding's half first (Eq. 21 has it last)."""

    def norm(x, gain):
        return gain * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()

    both = torch.cat([norm(e, gain_e), norm(h, gain_h)], dim=-1)
    return both @ M.T


def _norm(x: Tensor, gain: Tensor) -> Tensor:
    return gain * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def _check_join(answer: Callable[..., Any]) -> None:
    draw = torch.Generator().manual_seed(43)
    for rows, d in ((3, 4), (1, 8), (6, 16)):
        h, e = (scale * torch.randn(rows, d, generator=draw) for scale in (3.0, 0.2))
        gains = [0.5 + torch.rand(d, generator=draw) for _ in range(2)]
        M = torch.randn(d, 2 * d, generator=draw)
        right = join(h, e, *gains, M)
        got = answer(h.clone(), e.clone(), gains[0].clone(), gains[1].clone(), M.clone())
        nh, ne = _norm(h, gains[0]), _norm(e, gains[1])
        whole = torch.cat([e, h], -1)
        expect_same(
            got,
            {
                "the halves are the other way round: in the released files the embedding comes first.": (
                    torch.cat([nh, ne], -1) @ M.T
                ),
                "nothing is normalised: h is many times longer than e and drowns it.": whole @ M.T,
                "the norm is taken over both together; each half has a norm of its own.": (
                    _norm(whole, torch.cat([gains[1], gains[0]])) @ M.T
                ),
                "the two gains are swapped.": torch.cat([_norm(e, gains[0]), _norm(h, gains[1])], -1) @ M.T,
                "the gains are missing.": (
                    torch.cat([_norm(e, torch.ones(d)), _norm(h, torch.ones(d))], -1) @ M.T
                ),
                "only h is normalised.": torch.cat([e, nh], -1) @ M.T,
                "only e is normalised.": torch.cat([ne, h], -1) @ M.T,
                "that is LayerNorm: RMSNorm takes no mean off.": (
                    torch.cat([_norm(_centred(e), gains[1]), _norm(_centred(h), gains[0])], -1) @ M.T
                ),
                "that is the joined vector itself; M brings it back to the width d.": torch.cat([ne, nh], -1),
                "the two are added; they stand side by side, each with its own half of M.": ne + nh,
            },
        )
        expect_tensor(got, right, f"the block's input for d = {d}", atol=1e-4)


def _by_halves(h, e, gain_h, gain_e, M):
    d = h.shape[-1]
    return _norm(e, gain_e) @ M[:, :d].T + _norm(h, gain_h) @ M[:, d:].T


def _by_rms_norm(h, e, gain_h, gain_e, M):
    norm = torch.nn.functional.rms_norm
    sides = norm(e, e.shape[-1:], gain_e, 1e-6), norm(h, h.shape[-1:], gain_h, 1e-6)
    return torch.nn.functional.linear(torch.cat(sides, -1), M)


def _in_place(h, e, gain_h, gain_e, M):
    for x, gain in ((h, gain_h), (e, gain_e)):
        x /= (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        x *= gain
    return torch.hstack([e, h]).matmul(M.t())


def _by_einsum(h, e, gain_h, gain_e, M):
    sides = torch.stack([_norm(e, gain_e), _norm(h, gain_h)], dim=-2)
    return torch.einsum("tsd,osd->to", sides.double(), M.unflatten(-1, (2, -1)).double())


def _wrongly(sides: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda h, e, gain_h, gain_e, M: sides(h, e, gain_h, gain_e) @ M.T


EXERCISES = (
    Exercise(
        id="mtp.2",
        title="one link of the chain",
        dots=2,
        minutes=7,
        prompt=(
            "Write `join` (Eq. 21): what goes into a module's block. The hidden state `h` and the embedding `e` of the "
            "token further on are each normalised by an RMSNorm of their own (eps 1e-6, then the gain), laid side by "
            "side, and multiplied by `M`. The released files have the embedding's half *first*."
        ),
        spec=(
            ("h", "[T, d]", "h^{k−1}: what the depth before knew at each position"),
            ("e", "[T, d]", "embedding of the token k places ahead"),
            ("gain_h, gain_e", "[d]", "the gains of the two norms"),
            ("M", "[d, 2d]", "eh_proj, as a linear layer keeps it"),
            ("returns", "[T, d]", "the block's input"),
        ),
        solution=join,
        checker=_check_join,
        hints=(
            "RMSNorm: x divided by the root of its mean square, times the gain.",
            "`torch.cat([…, …], dim=-1)`, the embedding first.",
            "A linear layer's weight is [out, in]: multiply by `M.T`.",
        ),
        also_right=(
            RightAnswer("two products added", _by_halves),
            RightAnswer("torch's rms_norm and linear", _by_rms_norm),
            RightAnswer("in place", _in_place),
            RightAnswer("an einsum, in double", _by_einsum),
        ),
        wrong=(
            WrongAnswer(
                "halves swapped",
                _wrongly(lambda h, e, gh, ge: torch.cat([_norm(h, gh), _norm(e, ge)], -1)),
                says="other way round",
            ),
            WrongAnswer(
                "no norm", _wrongly(lambda h, e, gh, ge: torch.cat([e, h], -1)), says="drowns it"
            ),
            WrongAnswer(
                "one norm over both",
                _wrongly(lambda h, e, gh, ge: _norm(torch.cat([e, h], -1), torch.cat([ge, gh]))),
                says="over both together",
            ),
            WrongAnswer("gains swapped", lambda h, e, gh, ge, M: join(h, e, ge, gh, M), says="swapped"),
            WrongAnswer(
                "gains forgotten",
                lambda h, e, gh, ge, M: join(h, e, torch.ones_like(gh), torch.ones_like(ge), M),
                says="gains are missing",
            ),
            WrongAnswer(
                "only h normalised",
                _wrongly(lambda h, e, gh, ge: torch.cat([e, _norm(h, gh)], -1)),
                says="nly h is",
            ),
            WrongAnswer(
                "LayerNorm",
                lambda h, e, gh, ge, M: join(_centred(h), _centred(e), gh, ge, M),
                says="LayerNorm",
            ),
            WrongAnswer("added", lambda h, e, gh, ge, M: _norm(e, ge) + _norm(h, gh), says="are added"),
        ),
        praise="The rest of a module is an ordinary block, and the head is the main model's.",
    ),
)
