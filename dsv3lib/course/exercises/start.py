"""Exercises of 00_start_here: parameters, active parameters, and the loss of a model that knows nothing."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from dsv3lib.course.task import Exercise, WrongAnswer, expect_number


def expert_parameters(hidden_size: int, intermediate_size: int) -> int:
    """The weights of one expert: gate and up projections go in, one down projection comes out."""
    gate = hidden_size * intermediate_size
    up = hidden_size * intermediate_size
    down = intermediate_size * hidden_size
    return gate + up + down


def _check_expert(answer: Callable[[int, int], int]) -> None:
    draw = random.Random(1)
    sizes = [(7168, 2048), (256, 128)] + [(draw.randrange(2, 999), draw.randrange(2, 999)) for _ in range(5)]
    for hidden, inner in sizes:
        expected = 3 * hidden * inner
        expect_number(
            answer(hidden, inner),
            expected,
            f"the count for hidden size {hidden} and intermediate size {inner}",
            slips={
                2 * hidden * inner: "Two matrices were counted. SwiGLU has a third, the gate.",
                hidden * inner: "That is one matrix. An expert has three.",
                3 * hidden * inner + 2 * inner + hidden: "The linear layers of V3's experts carry no bias.",
            },
        )


def active_experts_share(experts: int, chosen: int, shared: int) -> float:
    """The share of a layer's expert weights that one token passes through."""
    return (chosen + shared) / (experts + shared)


def _check_share(answer: Callable[[int, int, int], float]) -> None:
    draw = random.Random(2)
    cases = [(256, 8, 1), (16, 4, 1)]
    for _ in range(5):
        experts = draw.randrange(4, 300)
        cases.append((experts, draw.randrange(1, experts), draw.randrange(1, 4)))
    for experts, chosen, shared in cases:
        expect_number(
            answer(experts, chosen, shared),
            (chosen + shared) / (experts + shared),
            f"the share with {experts} routed, {chosen} chosen and {shared} shared",
            slips={
                chosen / experts: "The shared expert is missing: it works for every token.",
                (chosen + shared)
                / experts: "The shared expert is among the active ones, but not in the total.",
                chosen / (experts + shared): "The shared expert is in the total, but it is active too.",
            },
        )


def untrained_loss(vocab_size: int) -> float:
    """The cross-entropy, in nats, of a model that gives every token the same probability."""
    return math.log(vocab_size)


def _check_loss(answer: Callable[[int], float]) -> None:
    for size in (129280, 1024, 2, 50257, 7):
        expect_number(
            answer(size),
            math.log(size),
            f"the loss for a vocabulary of {size}",
            slips={
                math.log2(size): "That is in bits. torch's cross-entropy is in nats: the natural logarithm.",
                math.log10(size): "That is a logarithm to base 10. torch's cross-entropy is in nats.",
                1 / size: "That is the probability of a token. The loss is minus its logarithm.",
                -math.log(size): "The sign: a loss is minus the logarithm of a probability below 1.",
            },
        )


EXERCISES = (
    Exercise(
        id="start.1",
        title="the weights of one expert",
        dots=1,
        minutes=3,
        prompt=(
            "An expert of V3 is a SwiGLU network: `down(silu(gate(x)) * up(x))`, three linear layers without "
            "bias. Write `expert_parameters(hidden_size, intermediate_size)`: how many weights it has."
        ),
        solution=expert_parameters,
        checker=_check_expert,
        hints=(
            "`gate` and `up` both go from `hidden_size` to `intermediate_size`; `down` goes back.",
            "Each of the three matrices has `hidden_size * intermediate_size` weights.",
        ),
        wrong=(
            WrongAnswer("a plain two-layer network, without the gate", lambda h, i: 2 * h * i),
            WrongAnswer("linear layers with bias", lambda h, i: 3 * h * i + 2 * i + h),
            WrongAnswer("the size of one matrix", lambda h, i: h * i),
        ),
        praise="For V3 that is 7168 × 2048 × 3: forty-four million weights, 257 times in each layer.",
    ),
    Exercise(
        id="start.2",
        title="how much of a layer one token uses",
        dots=1,
        minutes=5,
        prompt=(
            "A layer has `experts` routed experts, of which the router chooses `chosen` for each token, and "
            "`shared` experts that every token passes through. All are of one size. Write "
            "`active_experts_share(experts, chosen, shared)`: the share of the layer's expert weights that "
            "works for one token, between 0 and 1."
        ),
        solution=active_experts_share,
        checker=_check_share,
        hints=(
            "Count the experts that work for one token, and those that are there.",
            "The shared ones belong to both counts.",
        ),
        wrong=(
            WrongAnswer("the shared expert forgotten", lambda e, k, s: k / e),
            WrongAnswer("the shared expert active but not counted in the total", lambda e, k, s: (k + s) / e),
            WrongAnswer("the shared expert counted but not active", lambda e, k, s: k / (e + s)),
        ),
        praise="For V3 it is 9 of 257: 3.5 % of the expert weights. That is how 671B becomes 37B a token.",
    ),
    Exercise(
        id="start.3",
        title="the loss of a model that knows nothing",
        dots=1,
        minutes=3,
        prompt=(
            "A model that has learnt nothing gives each of `vocab_size` tokens the same probability. Write "
            "`untrained_loss(vocab_size)`: its cross-entropy in nats, which is where the training curve of "
            "this notebook starts."
        ),
        solution=untrained_loss,
        checker=_check_loss,
        hints=(
            "Each token has the probability `1 / vocab_size`; the loss is minus the logarithm of that.",
            "Nats means the natural logarithm: `math.log`.",
        ),
        wrong=(
            WrongAnswer("bits instead of nats", lambda v: math.log2(v)),
            WrongAnswer("the sign lost", lambda v: -math.log(v)),
            WrongAnswer("the probability instead of its logarithm", lambda v: 1 / v),
        ),
        praise="A first loss far above this means that the start is wrong; far below, that the model cheats.",
    ),
)
