"""Exercises: the choice of experts, and the groups that bound it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsv3lib.course.task import (
    Exercise,
    Rejected,
    RightAnswer,
    WrongAnswer,
    describe,
    expect_same,
    expect_tensor,
)


def choose(s, b, k, scale):
    """The k best of affinity plus bias, weighted by the affinities alone (Eqs. 13 and 16)."""
    chosen = (s + b).topk(k, dim=-1).indices
    g = s.gather(-1, chosen)  # the bias is not in here
    return chosen, scale * g / g.sum(-1, keepdim=True)


def _pair(got: object, names: str) -> tuple[Tensor, Tensor]:
    if not isinstance(got, tuple | list) or len(got) != 2:
        raise Rejected(f"return two tensors, {names}; you returned {describe(got)}.")
    for one in got:
        if not isinstance(one, Tensor):
            raise Rejected(f"return two tensors, {names}; one of them is {describe(one)}.")
    return got[0], got[1]


def _check_choose(answer: Callable[..., tuple[Tensor, Tensor]]) -> None:
    draw = torch.Generator().manual_seed(11)
    for tokens, experts, k, scale in ((5, 8, 2, 2.5), (1, 4, 1, 1.0), (7, 16, 4, 2.5)):
        s = torch.rand(tokens, experts, generator=draw)
        b = torch.randn(experts, generator=draw) * 0.8
        chosen, g = _pair(answer(s.clone(), b.clone(), k, scale), "(chosen, g)")
        right, weights = choose(s, b, k, scale)
        if chosen.is_floating_point():
            raise Rejected(
                "the first of the two should be the experts' numbers, as whole numbers: swap them?"
            )
        if chosen.shape != right.shape:
            raise Rejected(f"chosen should have shape {list(right.shape)}; yours has {list(chosen.shape)}.")
        if int(chosen.min()) < 0 or int(chosen.max()) >= experts:
            raise Rejected(
                f"chosen holds {int(chosen.max())}, but there are only experts 0 to {experts - 1}."
            )
        _judge_choice(chosen, s, b, k)
        if g.shape != right.shape:
            raise Rejected(f"g should have shape {list(right.shape)}; yours has {list(g.shape)}.")
        # Any order is right, as long as each gate value stands where its expert does.
        mine = torch.zeros_like(s).scatter_(-1, chosen.long(), g.detach().to(s.dtype))

        def at_home(values: Tensor, places: Tensor = right, like: Tensor = s) -> Tensor:
            return torch.zeros_like(like).scatter_(-1, places, values)

        full, picked, leaked = at_home(weights), s.gather(-1, right), (s + b).gather(-1, right)
        if k > 1:
            expect_same(
                mine,
                {
                    "the bias is inside the gate values. It may steer the choice and nothing else.": at_home(
                        scale * leaked / leaked.sum(-1, keepdim=True)
                    ),
                    "the gate values sum to 1; the scale is missing.": full / scale,
                    "the gate values are not normalised: divide by the sum over the chosen.": at_home(
                        scale * picked
                    ),
                    "the gate values are normalised over all experts; only the chosen count.": at_home(
                        scale * picked / s.sum(-1, keepdim=True)
                    ),
                    "the gate values come from a softmax; they should be shares of the affinities.": at_home(
                        scale * picked.softmax(-1)
                    ),
                    "all gate values are alike: each should be its affinity's share.": at_home(
                        torch.full_like(picked, scale / k)
                    ),
                },
            )
        expect_tensor(mine, full, "the gate values, put back in the experts' places,")


def _judge_choice(chosen: Tensor, s: Tensor, b: Tensor, k: int) -> None:
    def same(values: Tensor) -> bool:
        return torch.equal(chosen.sort(-1).values.long(), values.topk(k, dim=-1).indices.sort(-1).values)

    if same(s + b):
        return
    if same(s):
        raise Rejected(
            "the experts are those with the best affinities: the bias must take part in the choice."
        )
    if same(s - b):
        raise Rejected("the bias is subtracted; it is added.")
    if same(-(s + b)):
        raise Rejected("those are the experts with the smallest sums; the largest are chosen.")
    if same(s * b) or same(s * (1 + b)):
        raise Rejected("the bias is multiplied; it is added.")
    raise Rejected("the chosen experts are not the k best of affinity plus bias.")


def _leaky(s, b, k, scale):
    g, chosen = (s + b).topk(k, dim=-1)
    return chosen, scale * g / g.sum(-1, keepdim=True)


def _choose_weighing(weigh: Callable[[Tensor, Tensor], Tensor]) -> Callable:
    def answer(s, b, k, scale):
        chosen = (s + b).topk(k, dim=-1).indices
        return chosen, scale * weigh(s.gather(-1, chosen), s)

    return answer


def _choose_by_mask(s, b, k, scale):
    chosen = torch.topk(b + s, k).indices
    kept = torch.where(torch.zeros_like(s, dtype=torch.bool).scatter(-1, chosen, True), s, 0.0)
    g = kept / kept.sum(-1, keepdim=True) * scale
    return chosen, torch.take_along_dim(g, chosen, -1)


def _choose_in_place(s, b, k, scale):
    own = s.clone()
    s += b
    chosen = s.argsort(-1, descending=True)[:, :k]
    g = own[torch.arange(len(own))[:, None], chosen]
    g /= g.sum(-1, keepdim=True)
    return [chosen, g.mul_(scale)]


def _choose_row_by_row(s, b, k, scale):
    rows = [sorted(range(len(b)), key=lambda e, t=t: -float(s[t, e] + b[e]))[:k] for t in range(len(s))]
    chosen = torch.tensor(rows)
    return chosen.int(), torch.stack([scale * s[t, r] / s[t, r].sum() for t, r in enumerate(rows)])


def close_groups(steered, groups, kept):
    """All but the kept best groups get minus infinity; a group is as good as the sum of its two best."""
    parts = steered.unflatten(-1, (groups, -1))
    quality = parts.topk(2, dim=-1).values.sum(-1)
    best = quality.topk(kept, dim=-1).indices
    closed = torch.ones_like(quality, dtype=torch.bool).scatter(-1, best, False)
    return parts.masked_fill(closed[..., None], -torch.inf).flatten(-2)


def _closing(
    steered: Tensor, groups: int, kept: int, quality: Callable[[Tensor], Tensor], fill: float = -torch.inf
):
    parts = steered.unflatten(-1, (groups, -1))
    best = quality(parts).topk(kept, dim=-1).indices
    closed = torch.ones(parts.shape[:-1], dtype=torch.bool).scatter(-1, best, False)
    return parts.masked_fill(closed[..., None], fill).flatten(-2)


def _two_best(parts: Tensor) -> Tensor:
    return parts.topk(2, dim=-1).values.sum(-1)


def _check_groups(answer: Callable[[Tensor, int, int], Tensor]) -> None:
    draw = torch.Generator().manual_seed(12)
    for tokens, experts, groups, kept in ((6, 16, 4, 2), (3, 8, 4, 1), (20, 64, 8, 4)):
        steered = torch.randn(tokens, experts, generator=draw) * 0.6
        got = answer(steered.clone(), groups, kept)
        right = close_groups(steered, groups, kept)
        if isinstance(got, Tensor) and got.shape == (tokens, groups, experts // groups):
            raise Rejected(f"one row per token is wanted, {list(right.shape)}: flatten the groups again.")
        if isinstance(got, Tensor) and got.shape == right.shape:
            got = got.detach().to(torch.float64)
            if torch.isnan(got).any():
                raise Rejected(
                    "there is NaN in the result: −∞ times 0 is not a number. Fill, do not multiply."
                )
            # Infinity does not compare as a difference, so it is counted apart.
            finite = {text: _closing(steered, groups, kept, how, fill) for text, how, fill in _GROUP_SLIPS}
            for text, slip in finite.items():
                if torch.equal(slip, right):  # with two experts per group some slips are none
                    continue
                if torch.equal(
                    torch.nan_to_num(got, neginf=-9e9), torch.nan_to_num(slip.double(), neginf=-9e9)
                ):
                    raise Rejected(text)
            if bool((got <= -1e4).any()) and torch.equal(got <= -1e4, right == -torch.inf):
                got = got.masked_fill(got <= -1e4, -torch.inf)  # so large a number serves as well
            if torch.equal(got.isinf(), _groups_dealt_out(steered, groups, kept).isinf()):
                raise Rejected(
                    "groups lie in order: the first experts are group 0, not one of them in each group."
                )
            if torch.equal(got.isinf(), (right != -torch.inf)):
                raise Rejected("the best groups are closed and the others open: it is the other way round.")
            if not torch.equal(got.isinf(), right.isinf()):
                shut = int(got.isinf().sum(-1).max())
                raise Rejected(
                    f"other experts are at −∞ than should be: {shut} in a row, expected the "
                    f"{experts - kept * experts // groups} of the {groups - kept} worst groups."
                )
            got, right = (torch.nan_to_num(x, neginf=0.0) for x in (got, right))
        expect_tensor(got, right, "what stays open")


_GROUP_SLIPS: tuple[tuple[str, Callable[[Tensor], Tensor], float], ...] = (
    (
        "a closed group gets −∞, not 0: a biased affinity may be negative, and then a 0 would win.",
        _two_best,
        0.0,
    ),
    (
        "a group is scored by its best expert alone; it is the sum of its two best.",
        lambda p: p.amax(-1),
        -torch.inf,
    ),
    ("a group is scored by all its experts; it is the sum of its two best.", lambda p: p.sum(-1), -torch.inf),
    (
        "a group is scored by its second best alone; it is the sum of its two best.",
        lambda p: p.topk(2, -1).values[..., 1],
        -torch.inf,
    ),
    ("the worst groups are kept.", lambda p: -_two_best(p), -torch.inf),
)


def _groups_dealt_out(steered, groups, kept):
    per = steered.shape[-1] // groups
    order = torch.arange(steered.shape[-1]).view(per, groups).T.flatten()
    return close_groups(steered[..., order], groups, kept)[..., order.argsort()]


def _groups_by_view(steered, groups, kept):
    parts = steered.view(len(steered), groups, -1)
    quality = parts.sort(-1, descending=True).values[..., :2].sum(-1)
    limit = quality.sort(-1, descending=True).values[:, kept - 1 : kept]
    return torch.where((quality >= limit)[..., None], parts, torch.tensor(-torch.inf)).reshape(steered.shape)


def _groups_in_place(steered, groups, kept):
    per = steered.shape[-1] // groups
    for row in steered:
        quality = torch.stack([part.topk(2).values.sum() for part in row.split(per)])
        for g in quality.argsort(descending=True)[kept:].tolist():
            row[g * per : (g + 1) * per] = float("-inf")
    return steered


def _groups_by_adding(steered, groups, kept):
    quality = _two_best(steered.unflatten(-1, (groups, -1)))
    wall = torch.full_like(quality, -torch.inf).scatter(-1, quality.topk(kept).indices, 0.0)
    return steered + wall.repeat_interleave(steered.shape[-1] // groups, -1)


def _groups_by_worst(steered, groups, kept):
    parts = steered.reshape(-1, groups, steered.shape[-1] // groups)
    worst = _two_best(parts).topk(groups - kept, largest=False).indices
    shut = torch.nn.functional.one_hot(worst, groups).sum(-2).bool()
    return parts.masked_fill(shut.unsqueeze(-1), -1e9).flatten(1)


EXERCISES = (
    Exercise(
        id="routing.1",
        title="the bias chooses, the affinity weighs",
        dots=1,
        minutes=5,
        prompt=(
            "Write `choose`, without groups: each token's `k` best experts by affinity plus bias, and "
            "their gate values: the affinities of the chosen, normalised to sum to `scale`. Return "
            "`(chosen, g)`."
        ),
        spec=(
            ("s", "[tokens, experts]", "affinities, between 0 and 1"),
            ("b", "[experts]", "biases"),
            ("k, scale", "numbers", "experts per token; what the gate values of a token sum to"),
            ("returns", "[tokens, k] twice", "the experts' numbers, and their gate values in the same order"),
        ),
        solution=choose,
        checker=_check_choose,
        hints=(
            "Two questions, two quantities: who is chosen, and how much each counts.",
            "`topk` of the sum for the experts; `gather` from the affinities alone for the gate values.",
            "`scale * g / g.sum(-1, keepdim=True)`.",
        ),
        also_right=(
            RightAnswer("by a mask", _choose_by_mask),
            RightAnswer("sorted, in place, a list", _choose_in_place),
            RightAnswer("token after token", _choose_row_by_row),
            RightAnswer(
                "in rising order",
                lambda s, b, k, c: (
                    lambda i: (i, c * torch.nn.functional.normalize(s.gather(1, i), p=1, dim=1))
                )((s + b).argsort(-1)[:, -k:]),
            ),
            RightAnswer(
                "unsorted topk, float64",
                lambda s, b, k, c: (
                    lambda i: (i, (s.double().gather(1, i) / s.double().gather(1, i).sum(1)[:, None] * c))
                )(torch.topk(s + b, k, sorted=False).indices),
            ),
        ),
        wrong=(
            WrongAnswer("the bias in the gate value", _leaky, says="inside the gate"),
            WrongAnswer("the bias nowhere", lambda s, b, k, c: choose(s, 0 * b, k, c), says="must take part"),
            WrongAnswer("the bias subtracted", lambda s, b, k, c: choose(s, -b, k, c), says="subtracted"),
            WrongAnswer(
                "normalised over all experts",
                _choose_weighing(lambda g, s: g / s.sum(-1, keepdim=True)),
                says="over all experts",
            ),
            WrongAnswer(
                "the scale forgotten", lambda s, b, k, c: choose(s, b, k, 1.0), says="scale is missing"
            ),
            WrongAnswer("not normalised", _choose_weighing(lambda g, s: g), says="not normalised"),
            WrongAnswer(
                "a softmax over the chosen", _choose_weighing(lambda g, s: g.softmax(-1)), says="softmax"
            ),
            WrongAnswer(
                "the two returned the wrong way round",
                lambda s, b, k, c: choose(s, b, k, c)[::-1],
                says="swap",
            ),
        ),
        praise="A token's output depends on the bias only through who works for it.",
    ),
    Exercise(
        id="routing.2",
        title="close all groups but the best",
        dots=2,
        minutes=6,
        prompt=(
            "Experts lie in order in `groups` groups of equal size. Write `close_groups`: a group is as "
            "good as the sum of its two best biased affinities; the `kept` best groups of each token stay "
            "as they are, all other experts get `-torch.inf`, so that no choice can fall on them."
        ),
        spec=(
            ("steered", "[tokens, experts]", "affinity plus bias; may be negative"),
            ("groups, kept", "numbers", "how many groups there are, and how many stay open"),
            ("returns", "[tokens, experts]", "the same, with minus infinity in closed groups"),
        ),
        solution=close_groups,
        checker=_check_groups,
        hints=(
            "`steered.unflatten(-1, (groups, -1))` puts the experts of a group into a dimension of their own.",
            "`topk(2)` in each group, summed; `topk(kept)` of that.",
            "`scatter` the kept groups into a mask of `True`, then `masked_fill` and `flatten(-2)`.",
        ),
        also_right=(
            RightAnswer("view, sort, where", _groups_by_view),
            RightAnswer("token after token, in place", _groups_in_place),
            RightAnswer("by adding minus infinity", _groups_by_adding),
            RightAnswer("the worst groups to minus a billion", _groups_by_worst),
            RightAnswer("in float64", lambda x, g, m: close_groups(x.double(), g, m)),
        ),
        wrong=(
            WrongAnswer("a mask of 0", lambda x, g, m: _closing(x, g, m, _two_best, 0.0), says="not 0"),
            WrongAnswer(
                "a group's best alone",
                lambda x, g, m: _closing(x, g, m, lambda p: p.amax(-1)),
                says="best expert alone",
            ),
            WrongAnswer(
                "a group's sum",
                lambda x, g, m: _closing(x, g, m, lambda p: p.sum(-1)),
                says="all its experts",
            ),
            WrongAnswer(
                "the worst groups kept",
                lambda x, g, m: _closing(x, g, m, lambda p: -_two_best(p)),
                says="worst",
            ),
            WrongAnswer("experts dealt out in turn", _groups_dealt_out, says="in order"),
            WrongAnswer(
                "not flattened", lambda x, g, m: close_groups(x, g, m).unflatten(-1, (g, -1)), says="flatten"
            ),
            WrongAnswer("multiplied by infinity", lambda x, g, m: close_groups(x, g, m) * 0, says="NaN"),
        ),
        praise=(
            "With this in front of the choice a token's experts lie in at most that many groups, "
            "whatever the affinities."
        ),
    ),
)
