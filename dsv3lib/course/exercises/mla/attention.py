"""Exercises: one new token's attention, expanded and absorbed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dsv3lib.course.task import (
    Exercise,
    Rejected,
    RightAnswer,
    WrongAnswer,
    expect_same,
    expect_tensor,
)


def attend_expanded(q, q_rope, c, k_rope, W_UK, W_UV):
    """Unpack every latent into each head's key and value, then attend as usual (Eqs. 2, 4, 5, 10)."""
    k = torch.einsum("sc,hkc->hsk", c, W_UK)
    v = torch.einsum("sc,hvc->hsv", c, W_UV)
    scores = torch.einsum("hk,hsk->hs", q, k) + q_rope @ k_rope.T
    scale = (q.shape[-1] + q_rope.shape[-1]) ** -0.5
    return torch.einsum("hs,hsv->hv", (scores * scale).softmax(-1), v)


def attend_absorbed(q, q_rope, c, k_rope, W_UK, W_UV):
    """The same attention on the latents as they lie: no key and no value is ever made."""
    q_latent = torch.einsum("hk,hkc->hc", q, W_UK)
    scores = q_latent @ c.T + q_rope @ k_rope.T
    scale = (q.shape[-1] + q_rope.shape[-1]) ** -0.5
    mixture = (scores * scale).softmax(-1) @ c
    return torch.einsum("hc,hvc->hv", mixture, W_UV)


def _attention_inputs(draw: torch.Generator, heads: int, tokens: int, k: int, r: int, v: int, c: int):
    shapes = ((heads, k), (heads, r), (tokens, c), (tokens, r), (heads, k, c), (heads, v, c))
    return [torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in shapes]


def _attention(inputs: list[Tensor], scale: float | None = None, p_of=None, position: bool = True) -> Tensor:
    """Eq. 10 with one thing changed."""
    q, q_rope, c, k_rope, W_UK, W_UV = inputs
    keys, values = torch.einsum("sc,hkc->hsk", c, W_UK), torch.einsum("sc,hvc->hsv", c, W_UV)
    scores = torch.einsum("hk,hsk->hs", q, keys)
    if position:
        scores = scores + q_rope @ k_rope.T
    scores = scores * ((q.shape[-1] + q_rope.shape[-1]) ** -0.5 if scale is None else scale)
    p = (lambda x: x.softmax(-1)) if p_of is None else p_of
    return torch.einsum("hs,hsv->hv", p(scores), values)


def _check_attention(answer: Callable[..., Tensor]) -> None:
    """The value of the attention, with the well-known slips named."""
    draw = torch.Generator().manual_seed(5)
    for heads, tokens, k, r, v, c in ((3, 5, 8, 4, 6, 7), (4, 9, 6, 2, 6, 10), (2, 4, 16, 8, 8, 4)):
        inputs = _attention_inputs(draw, heads, tokens, k, r, v, c)
        got = answer(*(one.clone() for one in inputs))
        right = _attention(inputs)
        expect_same(
            got,
            {
                "the scale is missing: scores are divided by the root of the dimensions that they sum over.": (
                    _attention(inputs, 1.0)
                ),
                f"the scale counts only the {k} content dimensions; the score sums over {k + r}.": (
                    _attention(inputs, k**-0.5)
                ),
                f"the scale is that of {c + r} numbers, the width of what is cached. It belongs to the score, and "
                f"stays ({k} + {r}) ** -0.5 in either order of the products.": _attention(
                    inputs, (c + r) ** -0.5
                ),
                "the scale is the wrong way up: divide by the root.": _attention(inputs, (k + r) ** 0.5),
                "the position is missing: add the product of `q_rope` and `k_rope` to the score.": _attention(
                    inputs, position=False
                ),
                "the softmax runs over the heads; it must run over the cached tokens.": _attention(
                    inputs, p_of=lambda x: x.softmax(0)
                ),
                "there is no softmax between scores and values.": _attention(inputs, p_of=lambda x: x),
            },
            atol=1e-9,
        )
        if isinstance(got, Tensor) and heads != v and got.shape == right.T.shape:
            raise Rejected(f"the shape is turned round: [heads, value] is {list(right.shape)}.")
        expect_tensor(got, right, "the output of the heads", atol=1e-9)


class _Made(TorchFunctionMode):
    """Records the largest tensor that a call in the block makes, and whether a latent was multiplied head "
    "by head."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.total, self.shape = 0, 0, []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {one.untyped_storage().data_ptr() for one in _tensors((args, kwargs))}
        out = func(*args, **kwargs)
        for one in _tensors(out):
            size = one.untyped_storage().size() // one.element_size()  # a view counts as what it views
            if one.untyped_storage().data_ptr() not in given:
                self.total += size
            if size > self.numel:
                self.numel, self.shape = size, list(one.shape)
        return out


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [one for part in value for one in _tensors(part)] if isinstance(value, (tuple, list)) else []


def _check_absorbed(answer: Callable[..., Tensor]) -> None:
    _check_attention(answer)
    heads, tokens, k, r, v, c = 8, 512, 32, 4, 24, 16
    inputs = _attention_inputs(torch.Generator().manual_seed(4), heads, tokens, k, r, v, c)
    with _Made() as made:
        answer(*inputs)
    largest = max(heads * tokens, tokens * (c + r), heads * max(k, v) * c)  # scores, what is cached, weights
    if made.numel > largest:
        kind = {k: "keys", v: "values"}.get(made.shape[-1], "keys or values")
        merged = made.numel == heads * k * v * c
        what = "the matrices of all heads merged" if merged else f"{kind} of {tokens} tokens"
        raise Rejected(
            f"the result is right, but on the way a tensor of shape {made.shape} is made ({what}). Absorption never "
            f"builds that: nothing larger than the latents or the scores ({largest:,} numbers here) is needed."
        )
    if made.total >= heads * tokens * min(k, v):  # all heads' keys, even if one after the other
        raise Rejected(
            f"the result is right, but over all heads your function makes {made.total:,} numbers: keys or values "
            "made one after the other are still all of them. Bring the query to the latents instead."
        )


def _over_heads(one: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An answer that takes head after head."""

    def answer(q: Tensor, q_rope: Tensor, c: Tensor, k_rope: Tensor, W_UK: Tensor, W_UV: Tensor) -> Tensor:
        scale = (q.shape[1] + q_rope.shape[1]) ** -0.5
        return torch.stack(
            [one(q[h], q_rope[h] @ k_rope.T, c, W_UK[h], W_UV[h], scale) for h in range(len(q))]
        )

    return answer


def _expanded_as_matrices(q, q_rope, c, k_rope, W_UK, W_UV):
    k, v = c @ W_UK.mT, c @ W_UV.mT
    keys = torch.cat([k, k_rope.expand(len(q), *k_rope.shape)], -1)
    query = torch.cat([q, q_rope], -1)
    return torch.nn.functional.scaled_dot_product_attention(query[:, None], keys, v)[:, 0]


def _expanded_in_place(q, q_rope, c, k_rope, W_UK, W_UV):
    scores = (q[:, None] * (c @ W_UK.mT)).sum(-1)
    scores += q_rope @ k_rope.T
    scores /= math.sqrt(q.shape[1] + q_rope.shape[1])
    q.zero_()
    return (scores.softmax(1).unsqueeze(-1) * (c @ W_UV.mT)).sum(1)


def _absorbed_as_matrices(q, q_rope, c, k_rope, W_UK, W_UV):
    moved = torch.cat([(q[:, None] @ W_UK)[:, 0], q_rope], -1)
    scores = moved @ torch.cat([c, k_rope], -1).T
    mixture = torch.softmax(scores / (q.shape[-1] + q_rope.shape[-1]) ** 0.5, dim=-1) @ c
    return (W_UV @ mixture[..., None])[..., 0]


def _absorbed_in_place(q, q_rope, c, k_rope, W_UK, W_UV):
    scores = torch.einsum("hkc,hk->hc", W_UK, q).matmul(c.t())
    scores.add_(q_rope @ k_rope.t()).mul_((q.shape[1] + q_rope.shape[1]) ** -0.5)
    return torch.einsum("hvc,hc->hv", W_UV, scores.softmax(1) @ c)


def _one_einsum(q, q_rope, c, k_rope, W_UK, W_UV):
    scores = torch.einsum("hk,hkc->hc", q, W_UK) @ c.T + torch.einsum("hr,sr->hs", q_rope, k_rope)
    p = torch.nn.functional.softmax(scores * (q.shape[1] + q_rope.shape[1]) ** -0.5, dim=1)
    return torch.einsum("hc,hvc->hv", torch.einsum("sc,hs->hc", c, p), W_UV)


def _three_factors(q, q_rope, c, k_rope, W_UK, W_UV):
    scores = torch.einsum("hk,hkc,sc->hs", q, W_UK, c) + q_rope @ k_rope.T
    p = (scores * (q.shape[1] + q_rope.shape[1]) ** -0.5).softmax(-1)
    return torch.einsum("hs,sc,hvc->hv", p, c, W_UV)


def _keys_absorbed_values_not(q, q_rope, c, k_rope, W_UK, W_UV):
    scores = torch.einsum("hk,hkc->hc", q, W_UK) @ c.T + q_rope @ k_rope.T
    p = (scores * (q.shape[1] + q_rope.shape[1]) ** -0.5).softmax(-1)
    return torch.einsum("hs,hsv->hv", p, torch.einsum("sc,hvc->hsv", c, W_UV))


def _token_by_token(q, q_rope, c, k_rope, W_UK, W_UV):
    scores = torch.stack([(q * (W_UK @ one)).sum(-1) for one in c], -1) + q_rope @ k_rope.T
    p = (scores * (q.shape[1] + q_rope.shape[1]) ** -0.5).softmax(-1)
    return torch.einsum("hvc,hc->hv", W_UV, p @ c)


def _merged(q, q_rope, c, k_rope, W_UK, W_UV):
    both = torch.einsum("hkc,hvc->hkvc", W_UK, W_UV)  # [heads, k, v, c]
    return attend_absorbed(q, q_rope, c, k_rope, W_UK, W_UV) + 0 * both.sum()


def _scaled_by(power: Callable[..., float]) -> Callable[..., Tensor]:
    return lambda *inputs: _attention(list(inputs), power(inputs))


_ATTENTION_SLIPS = (
    WrongAnswer("no scale", _scaled_by(lambda i: 1.0), says="scale is missing"),
    WrongAnswer(
        "the scale of the content alone", _scaled_by(lambda i: i[0].shape[1] ** -0.5), says="only the"
    ),
    WrongAnswer(
        "the scale of what is cached",
        _scaled_by(lambda i: (i[2].shape[1] + i[3].shape[1]) ** -0.5),
        says="width of what is cached",
    ),
    WrongAnswer(
        "the position forgotten", lambda *i: _attention(list(i), position=False), says="position is missing"
    ),
    WrongAnswer(
        "softmax over the heads",
        lambda *i: _attention(list(i), p_of=lambda x: x.softmax(0)),
        says="over the heads",
    ),
    WrongAnswer("no softmax", lambda *i: _attention(list(i), p_of=lambda x: x), says="no softmax"),
)

_ATTENTION_SPEC = (
    ("q", "[heads, d_h]", "the new token's query, content"),
    ("q_rope", "[heads, d_h^R]", "the new token's query, position (turned already)"),
    ("c", "[tokens, d_c]", "the cached latents"),
    ("k_rope", "[tokens, d_h^R]", "the cached position keys"),
    ("W_UK", "[heads, d_h, d_c]", "makes each head's key from a latent"),
    ("W_UV", "[heads, d_v, d_c]", "makes each head's value from a latent"),
    ("returns", "[heads, d_v]", "each head's output for the new token"),
)


EXERCISES = (
    Exercise(
        id="mla.2",
        title="attention, with everything unpacked",
        dots=2,
        minutes=6,
        prompt=(
            "Write `attend_expanded`: one new token's query against all cached tokens. Make each head's "
            "keys and values from the latents first, then attend as usual: score (content plus position, "
            "scaled), softmax over the tokens, mixture of the values. Leave the correction for long texts "
            "out."
        ),
        spec=_ATTENTION_SPEC,
        solution=attend_expanded,
        checker=_check_attention,
        hints=(
            "Keys and values first: each head applies its own matrix to every latent.",
            "The score is a sum of two products; `k_rope` has no head, all heads share it.",
            "The scale is one over the root of `d_h + d_h^R`; then `softmax(-1)`, then the values.",
        ),
        also_right=(
            RightAnswer("torch's own attention", _expanded_as_matrices),
            RightAnswer("sums of products, in place", _expanded_in_place),
            RightAnswer(
                "head after head",
                _over_heads(
                    lambda q, position, c, uk, uv, scale: (
                        ((c @ uk.T @ q + position) * scale).softmax(0) @ (c @ uv.T)
                    )
                ),
            ),
            RightAnswer("absorbed already", attend_absorbed),
            RightAnswer("other orders of einsum", _three_factors),
        ),
        wrong=(
            *_ATTENTION_SLIPS,
            WrongAnswer(
                "the root multiplied",
                _scaled_by(lambda i: (i[0].shape[1] + i[1].shape[1]) ** 0.5),
                says="wrong way up",
            ),
            WrongAnswer("the result turned round", lambda *i: _attention(list(i)).T, says="turned round"),
        ),
        praise="Right, and expensive: for one new token it unpacked every latent of the past.",
    ),
    Exercise(
        id="mla.3",
        title="the same attention, never unpacked",
        dots=2,
        minutes=8,
        prompt=(
            "Write `attend_absorbed`: the same result from the same arguments, but build no key and no "
            "value, not even one head's. The check looks at every tensor that your function makes."
        ),
        spec=_ATTENTION_SPEC,
        solution=attend_absorbed,
        checker=_check_absorbed,
        hints=(
            "A content score is query · matrix · latent. Which two can be multiplied once for all tokens?",
            "`q_latent = einsum('hk,hkc->hc', q, W_UK)` is a query with as many numbers as a latent.",
            "For the values the other way round: mix the latents (`p @ c`), then apply `W_UV` once to the mixture.",
        ),
        also_right=(
            RightAnswer("batched matrices, both parts in one product", _absorbed_as_matrices),
            RightAnswer("in place", _absorbed_in_place),
            RightAnswer("other orders of einsum", _one_einsum),
            RightAnswer("three factors in one einsum, taken from the left", _three_factors),
            RightAnswer(
                "head after head",
                _over_heads(
                    lambda q, position, c, uk, uv, scale: (
                        uv @ (((c @ (uk.T @ q) + position) * scale).softmax(0) @ c)
                    )
                ),
            ),
        ),
        wrong=(
            *_ATTENTION_SLIPS,
            WrongAnswer("keys and values are built", attend_expanded, says="never builds"),
            WrongAnswer(
                "each head's keys are built in turn",
                _over_heads(
                    lambda q, position, c, uk, uv, scale: (
                        ((c @ uk.T @ q + position) * scale).softmax(0) @ (c @ uv.T)
                    )
                ),
                says="never builds",
            ),
            WrongAnswer("each token's keys are built in turn", _token_by_token, says="after the other"),
            WrongAnswer("the values are still built", _keys_absorbed_values_not, says="never builds"),
            WrongAnswer("the matrices merged in advance", _merged, says="never"),
        ),
        praise="The same numbers, and nothing as large as the keys was ever made.",
    ),
)
