"""Exercises: copies of a token over the network, and who waits for whom."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dsv3lib.course.task import (
    Exercise,
    Rejected,
    RightAnswer,
    WrongAnswer,
    expect_number,
    expect_same,
    expect_tensor,
)


def nodes_used(chosen, experts, nodes):
    """How many different nodes each token's experts lie on: so many copies of it cross the network."""
    node = chosen // (experts // nodes)
    return torch.nn.functional.one_hot(node, nodes).amax(-2).sum(-1)


def _check_nodes(answer: Callable[[Tensor, int, int], Tensor]) -> None:
    draw = torch.Generator().manual_seed(13)
    for tokens, experts, nodes, k in ((9, 32, 8, 4), (1, 8, 4, 3), (20, 256, 8, 8)):
        chosen = torch.stack([torch.randperm(experts, generator=draw)[:k] for _ in range(tokens)])
        got = answer(chosen.clone(), experts, nodes)
        right = nodes_used(chosen, experts, nodes)
        if isinstance(got, (list, tuple)):
            got = torch.tensor([int(one) for one in got])
        if isinstance(got, Tensor) and got.ndim == 0 and tokens > 1:
            raise Rejected("one number per token is wanted; yours is one for the whole batch.")
        node = chosen // (experts // nodes)
        slips = {
            "you counted experts. Two experts on one node need one copy of the token, not two.": (
                torch.full((tokens,), k)
            ),
            "experts lie in order: the first of them on node 0, not one on each node in turn.": nodes_used(
                chosen % nodes * (experts // nodes), experts, nodes
            ),
            "you divided by the number of nodes; what is needed is the number of experts per node.": (
                torch.tensor([len(set(row)) for row in (chosen // nodes).tolist()])
            ),
            "that is the node with the highest number, not how many there are.": node.amax(-1),
            "those are the most experts on one node, not the number of nodes.": (
                torch.nn.functional.one_hot(node, nodes).sum(-2).amax(-1)
            ),
            "that counts the nodes of the whole batch for every token.": torch.full(
                (tokens,), len(node.unique())
            ),
        }
        expect_same(got, {text: slip for text, slip in slips.items() if not torch.equal(slip, right)})
        expect_tensor(got, right, f"the nodes used with {experts} experts on {nodes} nodes")


def waiting(load, devices):
    """The share of all devices' time that is spent waiting for the fullest one."""
    work = load.unflatten(-1, (devices, -1)).sum(-1)
    return 1 - float(work.double().mean() / work.max())


def _check_waiting(answer: Callable[[Tensor, int], float]) -> None:
    draw = torch.Generator().manual_seed(15)
    cases = [(torch.tensor([5, 1, 2, 1, 4, 4, 1, 1]), 4), (torch.tensor([3, 3, 3, 3]), 2)]
    cases += [(torch.randint(1, 90, (16,), generator=draw), devices) for devices in (2, 8, 16)]
    for load, devices in cases:
        work = load.unflatten(-1, (devices, -1)).sum(-1).double()
        dealt = load.view(-1, devices).sum(0).double()
        right = float(1 - work.mean() / work.max())
        expect_number(
            answer(load.clone(), devices),
            right,
            f"the share of waiting for loads {load.tolist()[:4]}… on {devices} devices",
            slips={
                float(
                    1 - load.double().mean() / load.max()
                ): "A device does the work of all its experts: add them first.",
                float(
                    work.max() / work.mean() - 1
                ): "That is MaxVio of the devices. The share is of the time that passes.",
                float(work.mean() / work.max()): "That is the share of working; what is left is waiting.",
                float(
                    1 - work.min() / work.max()
                ): "That is the emptiest device; the mean over all of them is asked for.",
                float(
                    1 - dealt.mean() / dealt.max()
                ): "Experts lie in order: the first ones on the first device.",
                100 * right: "A share between 0 and 1, not percent.",
                float(
                    (work.max() - work).sum()
                ): "Those are tokens; divide by what all devices could have done.",
            },
        )


def _by_device(load: Tensor, devices: int) -> float:
    per = len(load) // devices
    work = [sum(load[d * per : (d + 1) * per].tolist()) for d in range(devices)]
    return math.fsum(max(work) - one for one in work) / (devices * max(work))


EXERCISES = (
    Exercise(
        id="routing.4",
        title="copies over the slow wire",
        dots=2,
        minutes=5,
        prompt=(
            "Experts lie in order on `nodes` machines, equally many on each. Write `nodes_used`: on how "
            "many different machines each token's experts lie. So many copies of the token cross the "
            "network between machines."
        ),
        spec=(
            ("chosen", "[tokens, k]", "numbers of the chosen experts (int64)"),
            ("experts, nodes", "numbers", "how many there are of each"),
            ("returns", "[tokens]", "machines per token, whole numbers"),
        ),
        solution=nodes_used,
        checker=_check_nodes,
        hints=(
            "Which machine does expert e lie on?",
            "`chosen // (experts // nodes)`. Now count different numbers in each row.",
            "One-hot over the machines, the largest over the experts, the sum over the machines.",
        ),
        also_right=(
            RightAnswer(
                "sets",
                lambda i, e, n: torch.tensor([len({x // (e // n) for x in row}) for row in i.tolist()]),
            ),
            RightAnswer(
                "a mask by scatter",
                lambda i, e, n: torch.zeros(len(i), n).scatter(1, i // (e // n), 1.0).sum(1),
            ),
            RightAnswer(
                "sorted neighbours",
                lambda i, e, n: 1 + ((i // (e // n)).sort(-1).values.diff(dim=-1) != 0).sum(-1),
            ),
            RightAnswer("unique, a list", lambda i, e, n: [len(row.unique()) for row in i // (e // n)]),
            RightAnswer(
                "node after node",
                lambda i, e, n: sum(
                    ((i >= m * (e // n)) & (i < (m + 1) * (e // n))).any(-1).long() for m in range(n)
                ),
            ),
        ),
        wrong=(
            WrongAnswer(
                "every expert costs a copy",
                lambda i, e, n: torch.full(i.shape[:1], i.shape[1]),
                says="counted experts",
            ),
            WrongAnswer(
                "experts dealt out in turn",
                lambda i, e, n: nodes_used(i % n * (e // n), e, n),
                says="in order",
            ),
            WrongAnswer(
                "divided by the nodes",
                lambda i, e, n: torch.tensor([len(set(r)) for r in (i // n).tolist()]),
                says="experts per node",
            ),
            WrongAnswer("the highest node", lambda i, e, n: (i // (e // n)).amax(-1), says="highest"),
            WrongAnswer(
                "the fullest node",
                lambda i, e, n: torch.nn.functional.one_hot(i // (e // n), n).sum(1).amax(1),
                says="most experts",
            ),
            WrongAnswer(
                "machines of the whole batch",
                lambda i, e, n: nodes_used(i.reshape(1, -1), e, n).expand(len(i)) + 0,
                says="whole batch",
            ),
            WrongAnswer(
                "one number in all",
                lambda i, e, n: (i // (e // n)).unique().numel() * torch.tensor(1),
                says="per token",
            ),
        ),
        praise="Limit this number to 4 and you have limited the traffic, whatever the experts want.",
    ),
    Exercise(
        id="routing.6",
        title="who waits for whom",
        dots=2,
        minutes=5,
        prompt=(
            "Experts lie in order on `devices` GPUs, equally many on each, and a token costs the same time "
            "everywhere. A layer is done when its fullest GPU is done. Write `waiting`: the share of all "
            "GPUs' time, between 0 and 1, that is spent waiting for the fullest one."
        ),
        spec=(
            ("load", "[experts]", "tokens per expert, whole numbers (int64)"),
            ("devices", "number", "GPUs"),
            ("returns", "number", "0: nobody waits"),
        ),
        solution=waiting,
        checker=_check_waiting,
        hints=(
            "A GPU's work is the sum over its experts.",
            "In the time that the fullest needs, all together could have done devices × that much.",
            "One minus mean work over greatest work.",
        ),
        also_right=(
            RightAnswer(
                "by splitting",
                lambda n, d: (lambda w: 1 - sum(w) / (d * max(w)))(
                    [int(part.sum()) for part in n.split(len(n) // d)]
                ),
            ),
            RightAnswer(
                "idle time over all time",
                lambda n, d: (lambda w: ((w.max() - w).sum() / (w.max() * d)).item())(n.view(d, -1).sum(1)),
            ),
            RightAnswer(
                "a tensor", lambda n, d: 1 - n.view(d, -1).sum(1).double().mean() / n.view(d, -1).sum(1).max()
            ),
            RightAnswer(
                "from MaxVio",
                lambda n, d: (lambda v: float(v / (1 + v)))(n.view(d, -1).sum(1).max() * d / n.sum() - 1),
            ),
            RightAnswer("device after device", lambda n, d: _by_device(n, d)),
        ),
        wrong=(
            WrongAnswer(
                "expert by expert", lambda n, d: float(1 - n.double().mean() / n.max()), says="add them first"
            ),
            WrongAnswer(
                "MaxVio", lambda n, d: float(n.view(d, -1).sum(1).max() * d / n.sum() - 1), says="MaxVio"
            ),
            WrongAnswer("the share of working", lambda n, d: 1 - waiting(n, d), says="what is left"),
            WrongAnswer(
                "the emptiest",
                lambda n, d: float(1 - n.view(d, -1).sum(1).min() / n.view(d, -1).sum(1).max()),
                says="emptiest",
            ),
            WrongAnswer("percent", lambda n, d: 100 * waiting(n, d), says="not percent"),
            WrongAnswer(
                "experts dealt out in turn",
                lambda n, d: waiting(n.view(-1, d).T.flatten(), d),
                says="in order",
            ),
        ),
        praise="It is MaxVio / (1 + MaxVio) of the devices: at MaxVio 1 half of the machine waits.",
    ),
)
