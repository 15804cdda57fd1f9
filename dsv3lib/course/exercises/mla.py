"""Exercises of 01_mla_latent_cache: cached bytes, absorbed scores, the scale, FLOPs of a decode step."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dsv3lib.course.task import Exercise, Rejected, WrongAnswer, describe, expect_number, expect_tensor


def cache_bytes(layers: int, kv_rank: int, rope_dim: int, bytes_per_value: int) -> int:
    """Per token and layer: the latent, and one rotary key that all heads share."""
    return layers * (kv_rank + rope_dim) * bytes_per_value


def _check_cache_bytes(answer: Callable[..., int]) -> None:
    draw = random.Random(3)
    cases = [(61, 512, 64, 2), (4, 64, 16, 4)]
    cases += [
        (draw.randrange(1, 90), draw.randrange(8, 999), draw.randrange(2, 99), draw.choice((1, 2, 4)))
        for _ in range(5)
    ]
    for layers, rank, rope, width in cases:
        expect_number(
            answer(layers, rank, rope, width),
            layers * (rank + rope) * width,
            f"the bytes a token for {layers} layers, rank {rank}, {rope} rotary dims, {width} bytes a value",
            slips={
                layers * rank * width: "The rotary key is missing: the latent carries no position.",
                2
                * layers
                * (rank + rope)
                * width: "One latent serves keys and values: nothing is kept twice.",
                layers * (2 * rank + rope) * width: "Keys and values share one latent: it is kept once.",
                (rank + rope) * width: "That is one layer. Each layer keeps its own.",
                layers * (rank + rope): "Those are values, not bytes.",
            },
        )


def absorbed_scores(q_BHN: Tensor, latent_BTC: Tensor, w_uk_HNC: Tensor) -> Tensor:
    """Move the query into the latent's space once, then compare it with the latents as they lie."""
    q_BHC = torch.einsum("bhn,hnc->bhc", q_BHN, w_uk_HNC)
    return torch.einsum("bhc,btc->bht", q_BHC, latent_BTC)


def _expanded_scores(q_BHN: Tensor, latent_BTC: Tensor, w_uk_HNC: Tensor) -> Tensor:
    k_BTHN = torch.einsum("btc,hnc->bthn", latent_BTC, w_uk_HNC)
    return torch.einsum("bhn,bthn->bht", q_BHN, k_BTHN)


class _LargestTensor(TorchFunctionMode):
    """Records the largest tensor that any call of torch in the block makes; a view counts as what it views."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0
        self.shape: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, Tensor) and one.untyped_storage().size() // one.element_size() > self.numel:
                self.numel, self.shape = one.untyped_storage().size() // one.element_size(), list(one.shape)
        return out


def _check_absorbed(answer: Callable[..., Tensor]) -> None:
    draw = torch.Generator().manual_seed(4)
    for batch, heads, nope, rank, tokens in ((2, 4, 8, 6, 5), (1, 3, 4, 4, 7), (3, 2, 5, 12, 1)):
        q = torch.randn(batch, heads, nope, generator=draw, dtype=torch.float64)
        latent = torch.randn(batch, tokens, rank, generator=draw, dtype=torch.float64)
        w = torch.randn(heads, nope, rank, generator=draw, dtype=torch.float64)
        expected = _expanded_scores(q, latent, w)
        expect_tensor(answer(q.clone(), latent.clone(), w.clone()), expected, "the scores", atol=1e-9)
    batch, heads, nope, rank, tokens = 1, 8, 32, 16, 512
    q, latent = torch.randn(batch, heads, nope), torch.randn(batch, tokens, rank)
    w = torch.randn(heads, nope, rank)
    with _LargestTensor() as seen:
        answer(q, latent, w)
    needed = max(batch * heads * tokens, latent.numel(), w.numel())  # scores, latents, weights: no more
    if seen.numel > needed:
        raise Rejected(
            f"the scores are right, but on the way your function makes a tensor of shape {seen.shape}: keys "
            f"for {tokens} tokens. Absorption never builds them, not even one head's: nothing larger than "
            f"the latents ({needed:,} values here) is needed. Bring the query to the latents instead."
        )


def attention_scores(q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor) -> Tensor:
    """Content and position are added, and the scale counts the dims of both."""
    content = torch.einsum("bhn,bthn->bht", q_nope, k_nope)
    position = torch.einsum("bhr,btr->bht", q_rope, k_rope)
    return (content + position) * (q_nope.shape[-1] + q_rope.shape[-1]) ** -0.5


def _unscaled(q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor) -> Tensor:
    content = torch.einsum("bhn,bthn->bht", q_nope, k_nope)
    return content + torch.einsum("bhr,btr->bht", q_rope, k_rope)


def _check_attention_scores(answer: Callable[..., Tensor]) -> None:
    draw = torch.Generator().manual_seed(5)
    for batch, heads, nope, rope, tokens in ((2, 3, 8, 4, 5), (1, 4, 6, 2, 9), (2, 2, 16, 8, 1)):
        q_nope = torch.randn(batch, heads, nope, generator=draw)
        q_rope = torch.randn(batch, heads, rope, generator=draw)
        k_nope = torch.randn(batch, tokens, heads, nope, generator=draw)
        k_rope = torch.randn(batch, tokens, rope, generator=draw)
        inputs = (q_nope, q_rope, k_nope, k_rope)
        got = answer(*(one.clone() for one in inputs))
        expected = attention_scores(*inputs)
        if isinstance(got, Tensor) and got.shape == expected.shape:
            _name_the_slip(got, inputs)
        expect_tensor(got, expected, "the scores")


def _name_the_slip(got: Tensor, inputs: tuple[Tensor, ...]) -> None:
    """Reject the three well-known slips by name."""
    q_nope, q_rope, k_nope, _ = inputs
    total = _unscaled(*inputs)
    content = torch.einsum("bhn,bthn->bht", q_nope, k_nope)
    nope, both = q_nope.shape[-1], q_nope.shape[-1] + q_rope.shape[-1]
    if torch.allclose(got, total, atol=1e-5):
        raise Rejected("the sum is right; the scale is missing.")
    if torch.allclose(got, total * nope**-0.5, atol=1e-5):
        raise Rejected(
            f"the scale counts only the {nope} content dims; the score sums over {both} dims, so its scale "
            f"is {both} ** -0.5."
        )
    if torch.allclose(got, content * both**-0.5, atol=1e-5):
        raise Rejected("the position is missing: add the rotary part of the score before scaling.")


def decode_flops(heads: int, nope: int, rope: int, value: int, kv_rank: int) -> tuple[int, int]:
    """Two FLOPs a multiply-add, for one cached token in one layer: (expanded, absorbed)."""
    expand = 2 * kv_rank * heads * (nope + value)
    expanded = expand + 2 * heads * (nope + rope) + 2 * heads * value
    absorbed = 2 * heads * (kv_rank + rope) + 2 * heads * kv_rank
    return expanded, absorbed


def _check_decode_flops(answer: Callable[..., tuple[int, int]]) -> None:
    draw = random.Random(6)
    cases = [(128, 128, 64, 128, 512), (8, 32, 16, 32, 64)]
    cases += [tuple(draw.randrange(2, 200) for _ in range(5)) for _ in range(5)]
    for heads, nope, rope, value, rank in cases:
        where = f"with heads {heads}, nope {nope}, rope {rope}, value {value}, rank {rank}"
        got = answer(heads, nope, rope, value, rank)
        if not isinstance(got, (tuple, list)) or len(got) != 2:
            raise Rejected(f"return two numbers, (expanded, absorbed); you returned {describe(got)}.")
        expanded, absorbed = decode_flops(heads, nope, rope, value, rank)
        attend = 2 * heads * (nope + rope + value)
        expect_number(
            got[0],
            expanded,
            f"the expanded count {where}",
            slips={
                expanded / 2: "A multiply-add is two FLOPs.",
                attend: "The expansion of the latent into keys and values is missing.",
                expanded - attend: "The attention over the expanded keys and values is missing.",
            },
        )
        expect_number(
            got[1],
            absorbed,
            f"the absorbed count {where}",
            slips={
                absorbed / 2: "A multiply-add is two FLOPs.",
                4 * heads * rank: "The rotary part of the score is missing.",
                4 * heads * (rank + rope): "The values are the latents alone: no rotary dims in the sum.",
                absorbed / heads: "Every head has a query of its own, so every head compares.",
            },
        )


EXERCISES = (
    Exercise(
        id="mla.1",
        title="what a token leaves in the cache",
        dots=1,
        minutes=5,
        prompt=(
            "Write `cache_bytes(layers, kv_rank, rope_dim, bytes_per_value)`: how many bytes one token adds "
            "to the latent cache of the whole model."
        ),
        solution=cache_bytes,
        checker=_check_cache_bytes,
        hints=(
            "What must be kept so that every head can form its key and its value later?",
            "The latent carries no position. The rotary key is kept beside it, once for all heads.",
            "`kv_rank + rope_dim` values in each layer.",
        ),
        wrong=(
            WrongAnswer("the rotary key forgotten", lambda n, c, r, b: n * c * b),
            WrongAnswer("one latent for keys and one for values", lambda n, c, r, b: n * (2 * c + r) * b),
            WrongAnswer("one layer instead of all", lambda n, c, r, b: (c + r) * b),
        ),
        praise="With V3's sizes it gives 70,272 bytes: the number this notebook opened with.",
    ),
    Exercise(
        id="mla.2",
        title="scores without keys",
        dots=2,
        minutes=10,
        prompt=(
            "Write `absorbed_scores(q_BHN, latent_BTC, w_uk_HNC)`: the content part of the attention scores, "
            "shape `[B, H, T]`, of one query per head against `T` cached latents.\n\n"
            "The keys would be `k = einsum('btc,hnc->bthn', latent_BTC, w_uk_HNC)`. Do not build them."
        ),
        solution=absorbed_scores,
        checker=_check_absorbed,
        hints=(
            "The score is a product of three things. Which two can be multiplied first, once for all tokens?",
            "`w_uk` can act on the query instead of on every latent: that gives a query with `C` numbers.",
            "`einsum('bhn,hnc->bhc', …)`, then compare with the latents: `einsum('bhc,btc->bht', …)`.",
        ),
        wrong=(
            WrongAnswer("right numbers, but the keys are built", _expanded_scores),
            WrongAnswer(
                "right numbers, but each head's keys are built in turn",
                lambda q, c, w: torch.stack(
                    [torch.einsum("bn,btn->bt", q[:, h], c @ w[h].T) for h in range(q.shape[1])], dim=1
                ),
            ),
            WrongAnswer(
                "the same weight for every head",
                lambda q, c, w: torch.einsum("bhn,nc,btc->bht", q, w[0], c),
            ),
            WrongAnswer(
                "the heads summed away",
                lambda q, c, w: torch.einsum("bhn,hnc,btc->bt", q, w, c),
            ),
        ),
        praise="Same scores, and nothing as large as the keys was ever made.",
    ),
    Exercise(
        id="mla.3",
        title="the whole score, and its scale",
        dots=2,
        minutes=10,
        prompt=(
            "Write `attention_scores(q_nope, q_rope, k_nope, k_rope)`: content plus position, scaled, before "
            "the softmax, shape `[B, H, T]`.\n\n"
            "Shapes: `q_nope [B, H, N]`, `q_rope [B, H, R]`, `k_nope [B, T, H, N]`, `k_rope [B, T, R]`. The "
            "rotary key has no head: all heads share it. Leave the correction for long texts out."
        ),
        solution=attention_scores,
        checker=_check_attention_scores,
        hints=(
            "Two sums over two different sets of dims, added.",
            "The scale is one over the root of the number of dims that the score sums over.",
            "`einsum('bhr,btr->bht', q_rope, k_rope)` shares the rotary key.",
        ),
        wrong=(
            WrongAnswer(
                "scaled by the content dims alone",
                lambda a, b, c, d: _unscaled(a, b, c, d) * a.shape[-1] ** -0.5,
            ),
            WrongAnswer("no scale", _unscaled),
            WrongAnswer(
                "the position forgotten",
                lambda a, b, c, d: torch.einsum("bhn,bthn->bht", a, c) * (a.shape[-1] + b.shape[-1]) ** -0.5,
            ),
        ),
        praise="In the absorbed form the vectors are 576 wide, but the scale stays that of 192: same scores.",
    ),
    Exercise(
        id="mla.4",
        title="why absorption pays",
        dots=3,
        minutes=15,
        prompt=(
            "Write `decode_flops(heads, nope, rope, value, kv_rank)`: the FLOPs that one cached token "
            "costs in one layer at one decode step, as `(expanded, absorbed)`. A multiply-add is two FLOPs; "
            "leave the softmax out, and everything that does not grow with the context.\n\n"
            "Expanded: the latent becomes all heads' content keys and values, then each head compares and "
            "sums. Absorbed: each head compares its query with latent and rotary key, and sums latents."
        ),
        solution=decode_flops,
        checker=_check_decode_flops,
        hints=(
            "Expanding is a matrix product: `kv_rank` in, `heads * (nope + value)` out.",
            "Comparing costs 2 FLOPs a dim and head; summing the values costs 2 FLOPs a dim and head.",
            "Absorbed: keys are `kv_rank + rope` wide, values `kv_rank` wide.",
        ),
        wrong=(
            WrongAnswer(
                "the expansion forgotten",
                lambda h, n, r, v, c: (2 * h * (n + r + v), 2 * h * (2 * c + r)),
            ),
            WrongAnswer(
                "multiply-adds instead of FLOPs",
                lambda h, n, r, v, c: tuple(count // 2 for count in decode_flops(h, n, r, v, c)),
            ),
            WrongAnswer(
                "rotary dims in the absorbed values",
                lambda h, n, r, v, c: (decode_flops(h, n, r, v, c)[0], 4 * h * (c + r)),
            ),
        ),
        praise="At V3's sizes: 33.6 million against 0.279 million. About 121 times less.",
    ),
)
