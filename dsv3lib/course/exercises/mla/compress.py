"""Exercise: what a token leaves in the cache, the latent and the position key."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsv3lib.course.task import (
    Exercise,
    Rejected,
    RightAnswer,
    WrongAnswer,
    expect_same,
    expect_tensor,
)


def compress(h, W_DKV, W_KR, norm, rope):
    """The latent, normalised, and beside it the position key, turned (Eqs. 1 and 3)."""
    return torch.cat([norm(h @ W_DKV.T), rope(h @ W_KR.T)], dim=-1)


def _norm(x: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def _turn(x: Tensor) -> Tensor:
    """A stand-in for RoPE: turns neighbouring pairs by an angle that grows with the row."""
    angle = torch.arange(1, x.shape[-2] + 1, dtype=x.dtype)[:, None] * 0.7
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = (even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos())
    return torch.stack(turned, -1).flatten(-2)


def _check_compress(answer: Callable[..., Tensor]) -> None:
    draw = torch.Generator().manual_seed(3)
    for tokens, width, rank, dims in ((3, 8, 6, 4), (7, 12, 4, 2), (1, 6, 6, 6)):
        h, W_DKV, W_KR = (
            torch.randn(n, width, generator=draw, dtype=torch.float64) for n in (tokens, rank, dims)
        )
        c, k = h @ W_DKV.T, h @ W_KR.T
        got = answer(h.clone(), W_DKV.clone(), W_KR.clone(), _norm, _turn)
        if isinstance(got, (tuple, list)):
            raise Rejected(
                "return one tensor: the two parts lie beside each other in the cache, joined along the "
                "last dimension."
            )
        if isinstance(got, Tensor) and got.shape == (tokens, rank):
            raise Rejected("the position key is missing: the latent carries no position.")
        if isinstance(got, Tensor) and tokens > 1 and got.shape == (tokens, rank + 2 * dims):
            raise Rejected(
                "there are too many numbers: one position key serves all heads, and it is kept once."
            )
        expect_same(
            got,
            {
                "the latent is cached after its norm; yours is not normalised.": torch.cat([c, _turn(k)], -1),
                "the position key is not normalised, only the latent is.": torch.cat(
                    [_norm(c), _turn(_norm(k))], -1
                ),
                "the position key must be turned (`rope`) before it is cached.": torch.cat([_norm(c), k], -1),
                "`rope` belongs to the position key alone; the latent must not be turned.": (
                    torch.cat([_turn(_norm(c)), _turn(k)], -1) if rank % 2 == 0 else c
                ),
                "the norm came last, over both parts at once: it is for the latent alone.": _norm(
                    torch.cat([c, _turn(k)], -1)
                ),
                "the order is the other way round: first the latent, then the position key.": torch.cat(
                    [_turn(k), _norm(c)], -1
                ),
            },
            atol=1e-9,
        )
        expect_tensor(got, torch.cat([_norm(c), _turn(k)], -1), "what is cached", atol=1e-9)


def _filled(h: Tensor, a: Tensor, b: Tensor, norm: Callable, rope: Callable) -> Tensor:
    out = h.new_empty(len(h), len(a) + len(b))
    out[:, : len(a)] = norm(h @ a.T)
    out[:, len(a) :] = rope(h @ b.T)
    return out


EXERCISES = (
    Exercise(
        id="mla.1",
        title="what a token leaves in the cache",
        dots=1,
        minutes=5,
        prompt=(
            "Write `compress`: from the hidden states of some tokens what is cached of each of them, the "
            "latent (normalised) and beside it the position key (turned). `norm` and `rope` are functions; "
            "each takes `[tokens, numbers]` and returns the same shape."
        ),
        spec=(
            ("h", "[tokens, d]", "hidden states"),
            ("W_DKV", "[d_c, d]", "down to the latent"),
            ("W_KR", "[d_h^R, d]", "makes the position key"),
            ("norm, rope", "functions", "the norm of the latent; the turn of the position key"),
            ("returns", "[tokens, d_c + d_h^R]", "what is cached"),
        ),
        solution=compress,
        checker=_check_compress,
        hints=(
            "Follow the two boxes with a doubled edge back to h.",
            "A matrix `[out, in]` is applied to rows with `h @ W.T`.",
            "`norm` on the one part, `rope` on the other, then `torch.cat([…, …], dim=-1)`.",
        ),
        also_right=(
            RightAnswer(
                "linear layers",
                lambda h, a, b, norm, rope: torch.cat(
                    (norm(torch.nn.functional.linear(h, a)), rope(torch.nn.functional.linear(h, b))), -1
                ),
            ),
            RightAnswer(
                "einsum and hstack",
                lambda h, a, b, norm, rope: torch.hstack(
                    (norm(torch.einsum("td,cd->tc", h, a)), rope(torch.einsum("rd,td->tr", b, h)))
                ),
            ),
            RightAnswer(
                "one product, then split",
                lambda h, a, b, norm, rope: (
                    lambda both: torch.cat([norm(both[:, : len(a)]), rope(both[:, len(a) :])], 1)
                )(h @ torch.cat([a, b]).T),
            ),
            RightAnswer(
                "written into an empty tensor", lambda h, a, b, norm, rope: _filled(h, a, b, norm, rope)
            ),
            RightAnswer(
                "matrices on the left",
                lambda h, a, b, norm, rope: torch.cat(
                    [norm((a @ h.T).T.contiguous()), rope((b @ h.T).T.contiguous())], -1
                ),
            ),
        ),
        wrong=(
            WrongAnswer(
                "the latent not normalised",
                lambda h, a, b, n, r: torch.cat([h @ a.T, r(h @ b.T)], -1),
                says="not normalised",
            ),
            WrongAnswer(
                "the position key forgotten", lambda h, a, b, n, r: n(h @ a.T), says="position key is missing"
            ),
            WrongAnswer(
                "the position key not turned",
                lambda h, a, b, n, r: torch.cat([n(h @ a.T), h @ b.T], -1),
                says="must be turned",
            ),
            WrongAnswer(
                "the latent turned too",
                lambda h, a, b, n, r: torch.cat([r(n(h @ a.T)), r(h @ b.T)], -1),
                says="must not be turned",
            ),
            WrongAnswer(
                "the order swapped",
                lambda h, a, b, n, r: torch.cat([r(h @ b.T), n(h @ a.T)], -1),
                says="other way round",
            ),
            WrongAnswer(
                "norm over all",
                lambda h, a, b, n, r: n(torch.cat([h @ a.T, r(h @ b.T)], -1)),
                says="norm came last",
            ),
            WrongAnswer(
                "a pair instead of one tensor",
                lambda h, a, b, n, r: (n(h @ a.T), r(h @ b.T)),
                says="one tensor",
            ),
        ),
        praise=(
            "That is all that V3 keeps of a token in a layer: every head's keys and values are made from it."
        ),
    ),
)
