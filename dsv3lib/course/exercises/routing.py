"""Exercises of 03_bias_based_routing: the bias in the choice alone, the update, node limits, and the bill."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from dsv3lib.course.task import Exercise, Rejected, WrongAnswer, describe, expect_number, expect_tensor


def choose(scores: Tensor, bias: Tensor, k: int, scale: float) -> tuple[Tensor, Tensor]:
    """The K best of score plus bias, weighted by the scores alone, normalised over the chosen."""
    indices = (scores + bias).topk(k, dim=-1).indices
    weights = scores.gather(-1, indices)
    return indices, scale * weights / weights.sum(-1, keepdim=True)


def _pair(got: object, names: str) -> tuple[Tensor, Tensor]:
    if not isinstance(got, tuple | list) or len(got) != 2:
        raise Rejected(f"return two tensors, {names}; you returned {describe(got)}.")
    for one in got:
        if not isinstance(one, Tensor):
            raise Rejected(f"return two tensors, {names}; one of them is {describe(one)}.")
    return got[0], got[1]


def _check_choose(answer: Callable[..., tuple[Tensor, Tensor]]) -> None:
    draw = torch.Generator().manual_seed(11)
    for tokens, experts, k, scale in ((1, 4, 1, 1.0), (5, 8, 2, 2.5), (7, 16, 4, 2.5)):
        scores = torch.rand(tokens, experts, generator=draw)
        bias = torch.randn(experts, generator=draw) * 0.8
        indices, weights = _pair(answer(scores.clone(), bias.clone(), k, scale), "(indices, weights)")
        expected, right = choose(scores, bias, k, scale)
        if indices.shape != expected.shape:
            raise Rejected(f"indices should have shape {list(expected.shape)}; yours {list(indices.shape)}.")
        if not torch.equal(indices.sort(-1).values, expected.sort(-1).values):
            plain = scores.topk(k, dim=-1).indices
            if torch.equal(indices.sort(-1).values, plain.sort(-1).values):
                raise Rejected(
                    "the experts are those with the best scores: the bias must take part in the choice."
                )
            raise Rejected("the chosen experts are not the K best of score plus bias.")
        if weights.shape != expected.shape:
            raise Rejected(f"weights should have shape {list(expected.shape)}; yours {list(weights.shape)}.")
        # Any order is right, as long as each weight stands where its expert does.
        full, mine = torch.zeros_like(scores), torch.zeros_like(scores)
        full.scatter_(-1, expected, right)
        mine.scatter_(-1, indices, weights.to(mine.dtype))
        biased = (scores + bias).gather(-1, expected)
        leaked = torch.zeros_like(scores)
        leaked.scatter_(-1, expected, scale * biased / biased.sum(-1, keepdim=True))
        if k > 1 and torch.allclose(mine, leaked, atol=1e-5):
            raise Rejected("the bias is inside the gate values. It may steer the choice and nothing else.")
        if k > 1 and torch.allclose(mine * scale, full, atol=1e-5) and scale != 1.0:
            raise Rejected("the weights sum to 1; the scale is missing.")
        expect_tensor(mine, full, "the weights, put back in the experts' places,")


def _leaky(scores: Tensor, bias: Tensor, k: int, scale: float) -> tuple[Tensor, Tensor]:
    weights, indices = (scores + bias).topk(k, dim=-1)
    return indices, scale * weights / weights.sum(-1, keepdim=True)


def _over_all(scores: Tensor, bias: Tensor, k: int, scale: float) -> tuple[Tensor, Tensor]:
    indices = (scores + bias).topk(k, dim=-1).indices
    return indices, scale * scores.gather(-1, indices) / scores.sum(-1, keepdim=True)


def update(bias: Tensor, load: Tensor, gamma: float) -> Tensor:
    """Against the load: down where an expert had more than the mean, up where it had less."""
    return bias + gamma * torch.sign(load.double().mean() - load).to(bias.dtype)


def _check_update(answer: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    draw = torch.Generator().manual_seed(12)
    cases = [(torch.zeros(4), torch.tensor([9, 5, 5, 1]), 0.25)]
    for experts in (8, 16):
        load = torch.randint(0, 50, (experts,), generator=draw)
        cases.append((torch.randn(experts, generator=draw), load, 0.01))
    for bias, load, gamma in cases:
        got = answer(bias.clone(), load.clone(), gamma)
        right = update(bias, load, gamma)
        if isinstance(got, Tensor) and got.shape == right.shape:
            if torch.allclose(got.to(right.dtype), 2 * bias - right, atol=1e-6):
                raise Rejected("the sign is wrong: an overloaded expert must become *less* attractive.")
            step = (got - bias).abs()
            if (
                step.max() > gamma * 1.01
                or (step > gamma * 1e-3).sum()
                and step[step > gamma * 1e-3].min() < gamma * 0.99
            ):
                raise Rejected(
                    "a step should be γ or nothing, whatever the size of the violation: only its sign counts."
                )
        expect_tensor(got, right, f"the new bias for loads {load.tolist()[:4]}…")


def nodes_used(indices: Tensor, experts: int, nodes: int) -> Tensor:
    """How many different nodes each token's experts lie on."""
    node = indices // (experts // nodes)
    return torch.nn.functional.one_hot(node, nodes).amax(-2).sum(-1)


def _check_nodes(answer: Callable[[Tensor, int, int], Tensor]) -> None:
    draw = torch.Generator().manual_seed(13)
    for tokens, experts, nodes, k in ((1, 8, 4, 3), (6, 16, 4, 4), (20, 256, 8, 8)):
        indices = torch.stack([torch.randperm(experts, generator=draw)[:k] for _ in range(tokens)])
        got = answer(indices.clone(), experts, nodes)
        right = nodes_used(indices, experts, nodes)
        if isinstance(got, Tensor) and got.shape == right.shape and (got == k).all() and (right != k).any():
            raise Rejected(
                "you counted experts. Two experts on one node need one copy of the token, not two."
            )
        expect_tensor(got, right, f"the nodes used with {experts} experts on {nodes} nodes")


def max_experts(nodes: int, nvlink: float, infiniband: float) -> float:
    """Experts a token could visit while NVLink hands its copies over no later than InfiniBand brings them."""
    return nodes * nvlink / infiniband


def _check_max_experts(answer: Callable[[int, float, float], float]) -> None:
    draw = random.Random(14)
    cases = [(4, 160.0, 50.0)] + [
        (draw.randrange(1, 9), draw.uniform(60, 900), draw.uniform(10, 59)) for _ in range(5)
    ]
    for nodes, nvlink, infiniband in cases:
        expect_number(
            answer(nodes, nvlink, infiniband),
            nodes * nvlink / infiniband,
            f"the bound for {nodes} nodes, {nvlink:.0f} and {infiniband:.0f} GB/s",
            slips={
                nvlink / infiniband: "That is what one node allows. The token goes to several.",
                nodes * infiniband / nvlink: "The ratio is upside down: NVLink is the faster one.",
                nodes
                * (nvlink / infiniband + 1): "NVLink and InfiniBand work at the same time; nothing is added.",
            },
        )


EXERCISES = (
    Exercise(
        id="routing.1",
        title="the bias chooses, the score weighs",
        dots=1,
        minutes=5,
        prompt=(
            "Write `choose(scores, bias, k, scale)` without groups: the `k` best experts of each row of "
            "`scores` `[tokens, experts]`, steered by `bias` `[experts]`, and their gate values: normalised over "
            "the chosen, times `scale`. Return `(indices, weights)`, both `[tokens, k]`."
        ),
        solution=choose,
        checker=_check_choose,
        hints=(
            "Two questions, two quantities: who is chosen, and how much each counts.",
            "`topk` of the sum for the indices; `gather` from the scores alone for the weights.",
            "`weights / weights.sum(-1, keepdim=True)`, then the scale.",
        ),
        wrong=(
            WrongAnswer("the bias in the gate value", _leaky),
            WrongAnswer("the bias nowhere", lambda s, b, k, c: choose(s, torch.zeros_like(b), k, c)),
            WrongAnswer("normalised over all experts", _over_all),
            WrongAnswer("the scale forgotten", lambda s, b, k, c: choose(s, b, k, 1.0)),
        ),
        praise="A token's output depends on the bias only through who works for it.",
    ),
    Exercise(
        id="routing.2",
        title="the update",
        dots=1,
        minutes=5,
        prompt=(
            "Write `update(bias, load, gamma)`: the bias after a step in which the experts received `load` "
            "tokens (whole numbers, one an expert)."
        ),
        solution=update,
        checker=_check_update,
        hints=(
            "Compare each load with the mean load.",
            "Too many tokens: γ less. Too few: γ more. Exactly the mean: nothing.",
            "`torch.sign(load.double().mean() - load)` is all that is needed.",
        ),
        wrong=(
            WrongAnswer(
                "the sign the other way round",
                lambda b, n, g: b - g * torch.sign(n.double().mean() - n).float(),
            ),
            WrongAnswer(
                "steps as large as the violation", lambda b, n, g: b + g * (n.double().mean() - n).float()
            ),
            WrongAnswer(
                "against the median", lambda b, n, g: b + g * torch.sign(n.double().median() - n).float()
            ),
        ),
        praise="One line, no gradient, no loss. V3 was balanced by this for 14.3 trillion tokens.",
    ),
    Exercise(
        id="routing.3",
        title="copies over the slow wire",
        dots=2,
        minutes=10,
        prompt=(
            "Experts lie in order on `nodes` machines, equally many on each. Write "
            "`nodes_used(indices, experts, nodes)`: on how many different machines each token's experts lie, "
            "shape `[tokens]`, from `indices` `[tokens, k]`. So many copies of the token cross the network."
        ),
        solution=nodes_used,
        checker=_check_nodes,
        hints=(
            "Which machine does expert e lie on?",
            "`indices // (experts // nodes)`. Now count different numbers in each row.",
            "One-hot over the machines, the largest over the experts, the sum over the machines.",
        ),
        wrong=(
            WrongAnswer("every expert costs a copy", lambda i, e, n: torch.full(i.shape[:1], i.shape[1])),
            WrongAnswer("experts dealt out in turn", lambda i, e, n: nodes_used(i % n * (e // n), e, n)),
            WrongAnswer(
                "different machines of the whole batch",
                lambda i, e, n: nodes_used(i.reshape(1, -1), e, n).expand(len(i)) + 0,
            ),
        ),
        praise="Limit this number to 4 and you have limited the traffic, whatever the experts want.",
    ),
    Exercise(
        id="routing.4",
        title="how many experts for the price of eight",
        dots=2,
        minutes=10,
        prompt=(
            "A token is sent once to each of `nodes` machines at `infiniband` GB/s, and inside a machine once to "
            "each of its experts there at `nvlink` GB/s, at the same time. Write "
            "`max_experts(nodes, nvlink, infiniband)`: how many experts it could visit before NVLink becomes the "
            "slower one (a real number)."
        ),
        solution=max_experts,
        checker=_check_max_experts,
        hints=(
            "Both carry copies of the same size. How many does NVLink carry while InfiniBand carries one?",
            "That ratio is what one machine allows; the paper calls it 3.2 experts per node.",
        ),
        wrong=(
            WrongAnswer("3.2 experts per token", lambda n, fast, slow: fast / slow),
            WrongAnswer("the ratio upside down", lambda n, fast, slow: n * slow / fast),
            WrongAnswer("the times added", lambda n, fast, slow: n * (fast / slow + 1)),
        ),
        praise="4 × 3.2 = 12.8: the paper's 13 experts at the cost of 8.",
    ),
)
