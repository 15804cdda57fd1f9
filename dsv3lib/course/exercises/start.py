"""Exercises of 00_start_here: parameters, what a token uses, the loss of knowing nothing, bits per byte, GPUs."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch

from dsv3lib.course.task import Exercise, RightAnswer, WrongAnswer, expect_number


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
                3
                * hidden
                * hidden: "Each matrix was taken as square. One of its sides is the intermediate size.",
                3 * (hidden + inner): "The sides were added. A matrix has rows times columns weights.",
                6 * hidden * inner: "That is the operations, two for each weight. Count the weights.",
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
        right = (chosen + shared) / (experts + shared)
        expect_number(
            answer(experts, chosen, shared),
            right,
            f"the share with {experts} routed, {chosen} chosen and {shared} shared",
            slips={
                chosen / experts: "The shared expert is missing: it works for every token.",
                (chosen + shared)
                / experts: "The shared expert is among the active ones, but not in the total.",
                chosen / (experts + shared): "The shared expert is in the total, but it is active too.",
                100 * right: "That is in percent. Return the share itself, between 0 and 1.",
                1 - right: "That is the share that rests.",
                1 / right: "The fraction stands on its head.",
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
                size: "That is the perplexity, the loss's exponential. Return the loss.",
                math.log(size)
                / size: "One token comes, not all of them: nothing is divided by the vocabulary.",
            },
        )


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """A loss that tokenizers cannot change: bits, for each byte of the text."""
    return nats_per_token / math.log(2) / bytes_per_token


def _check_bits(answer: Callable[[float, float], float]) -> None:
    draw = random.Random(3)
    cases = [(8.318, 2.5), (math.log(256), 1.0)] + [
        (draw.uniform(0.5, 9), draw.uniform(1.5, 6)) for _ in range(5)
    ]
    for nats, width in cases:
        right = nats / math.log(2) / width
        expect_number(
            answer(nats, width),
            right,
            f"the bits per byte of {nats:.4g} nats per token and {width:.4g} bytes per token",
            slips={
                nats / width: "That is in nats. A bit is ln 2 nats: how many bits is one nat?",
                nats / math.log(2): "That is for a token. It stands for several bytes, which share the cost.",
                nats / math.log(2) * width: "Divide by the bytes: they share what the token costs.",
                nats
                * math.log(2)
                / width: "Nats become bits by dividing by ln 2: there are more bits than nats.",
                nats / math.log(10) / width: "That is in decimal digits. A bit is ln 2 nats.",
                8 * right: "A byte is what is asked for; it is not divided into its eight bits again.",
            },
        )


def gpus_to_hold(parameters: int, bytes_each: float, gpu_bytes: int) -> int:
    """How many GPUs it takes to hold the weights, and nothing but the weights."""
    return math.ceil(parameters * bytes_each / gpu_bytes)


def _check_gpus(answer: Callable[[int, float, int], int]) -> None:
    gib = 2**30
    cases = [(671_026_419_200, 2.0, 80 * gib), (671_026_419_200, 1.0, 80 * gib), (80 * gib, 1.0, 80 * gib)]
    cases += [(80 * gib + 1, 1.0, 80 * gib), (10**9, 0.5, 16 * gib), (7 * 10**9, 4.0, 24 * gib)]
    for parameters, width, room in cases:
        needed = parameters * width / room
        slips = {
            needed: "That is no whole number of GPUs: a part of one does not exist.",
            math.floor(needed): "Rounded down, the last weights have no place. Round up.",
            math.ceil(parameters / room): "The bytes of each weight are missing.",
            math.ceil(parameters * width * 8 / room): "Those are bits. A byte holds eight of them.",
            math.ceil(parameters * width / (room / gib * 10**9)): "The GPU's memory is in bytes already.",
            math.floor(needed) + 1: "When the weights fill the last GPU exactly, no further one is needed.",
        }
        got = answer(parameters, width, room)
        what = f"the count for {parameters:,} weights of {width:g} bytes and {room:,} bytes a GPU"
        right = math.ceil(needed)
        expect_number(got, right, what, rel=1e-12, slips={v: t for v, t in slips.items() if v != right})


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
        spec=(
            ("hidden_size", "int", "d, the width of a token's vector, which comes in and goes out"),
            ("intermediate_size", "int", "the width between the two"),
            ("returns", "int", "weights of all three matrices"),
        ),
        solution=expert_parameters,
        checker=_check_expert,
        hints=(
            "`gate` and `up` both go from `hidden_size` to `intermediate_size`; `down` goes back.",
            "Each of the three matrices has `hidden_size * intermediate_size` weights.",
        ),
        also_right=(
            RightAnswer("three times one matrix", lambda h, i: 3 * h * i),
            RightAnswer(
                "a sum over the layers", lambda h, i: sum(a * b for a, b in ((h, i), (h, i), (i, h)))
            ),
            RightAnswer("as a float", lambda h, i: 3.0 * h * i),
            RightAnswer("as a tensor of one number", lambda h, i: torch.tensor(3 * h * i)),
            RightAnswer(
                "built and counted, on the meta device",
                lambda h, i: sum(
                    torch.nn.Linear(*sides, bias=False, device="meta").weight.numel()
                    for sides in ((h, i), (h, i), (i, h))
                ),
            ),
        ),
        wrong=(
            WrongAnswer("a plain two-layer network, without the gate", lambda h, i: 2 * h * i, "the gate"),
            WrongAnswer("linear layers with bias", lambda h, i: 3 * h * i + 2 * i + h, "no bias"),
            WrongAnswer("the size of one matrix", lambda h, i: h * i, "one matrix"),
            WrongAnswer("square matrices", lambda h, i: 3 * h * h, "square"),
            WrongAnswer("the sides added", lambda h, i: 3 * (h + i), "added"),
            WrongAnswer("operations instead of weights", lambda h, i: 6 * h * i, "operations"),
        ),
        praise="The count below is built on it. For V3 it is forty-four million, 257 times in each layer.",
    ),
    Exercise(
        id="start.2",
        title="how much of a layer one token uses",
        dots=1,
        minutes=4,
        prompt=(
            "A layer has `experts` routed experts, of which the router chooses `chosen` for each token, and "
            "`shared` experts that every token passes through. All are of one size. Write "
            "`active_experts_share(experts, chosen, shared)`: the share of the layer's expert weights that "
            "works for one token."
        ),
        spec=(
            ("experts", "int", "routed experts that are there"),
            ("chosen", "int", "of them, how many a token is sent to"),
            ("shared", "int", "further experts, which every token passes through"),
            ("returns", "float", "a share, between 0 and 1"),
        ),
        solution=active_experts_share,
        checker=_check_share,
        hints=(
            "Count the experts that work for one token, and those that are there.",
            "The shared ones belong to both counts.",
        ),
        also_right=(
            RightAnswer("one minus what rests", lambda e, k, s: 1 - (e - k) / (e + s)),
            RightAnswer(
                "through the sizes, which cancel", lambda e, k, s: (k * 96 + s * 96) / (e * 96 + s * 96)
            ),
            RightAnswer("as a tensor", lambda e, k, s: torch.tensor([float(k + s)]) / (e + s)),
            RightAnswer(
                "as a mean of zeros and ones", lambda e, k, s: sum([1] * (k + s) + [0] * (e - k)) / (e + s)
            ),
        ),
        wrong=(
            WrongAnswer("the shared expert forgotten", lambda e, k, s: k / e, "shared expert is missing"),
            WrongAnswer(
                "the shared expert active but not counted in the total",
                lambda e, k, s: (k + s) / e,
                "not in the total",
            ),
            WrongAnswer(
                "the shared expert counted but not active", lambda e, k, s: k / (e + s), "active too"
            ),
            WrongAnswer("percent", lambda e, k, s: 100 * (k + s) / (e + s), "percent"),
            WrongAnswer("the share that rests", lambda e, k, s: (e - k) / (e + s), "rests"),
            WrongAnswer("upside down", lambda e, k, s: (e + s) / (k + s), "head"),
        ),
        praise="For V3 it is 9 of 257: that is how so large a model becomes affordable, token by token.",
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
        spec=(
            ("vocab_size", "int", "V, the number of different tokens"),
            ("returns", "float", "nats per token"),
        ),
        solution=untrained_loss,
        checker=_check_loss,
        hints=(
            "Each token has the probability `1 / vocab_size`; the loss is minus the logarithm of that.",
            "Nats means the natural logarithm: `math.log`.",
        ),
        also_right=(
            RightAnswer("minus the logarithm of the probability", lambda v: -math.log(1 / v)),
            RightAnswer("torch's logarithm", lambda v: torch.tensor(float(v), dtype=torch.float64).log()),
            RightAnswer("from bits", lambda v: math.log2(v) * math.log(2)),
            RightAnswer(
                "torch's own cross-entropy of equal logits",
                lambda v: torch.nn.functional.cross_entropy(
                    torch.zeros(1, v, dtype=torch.float64), torch.tensor([0])
                ),
            ),
        ),
        wrong=(
            WrongAnswer("bits instead of nats", lambda v: math.log2(v), "bits"),
            WrongAnswer("the sign lost", lambda v: -math.log(v), "sign"),
            WrongAnswer("the probability instead of its logarithm", lambda v: 1 / v, "probability"),
            WrongAnswer("base 10", lambda v: math.log10(v), "base 10"),
            WrongAnswer("the perplexity", lambda v: v, "perplexity"),
            WrongAnswer(
                "averaged over the vocabulary", lambda v: math.log(v) / v, "divided by the vocabulary"
            ),
        ),
        praise="A first loss far above this means that the start is wrong; far below, that the model cheats.",
    ),
    Exercise(
        id="start.4",
        title="a loss that no tokenizer can change",
        dots=2,
        minutes=5,
        prompt=(
            "Losses in nats per token cannot be compared between tokenizers: one with longer tokens has fewer of "
            "them to pay for. Write `bits_per_byte(nats_per_token, bytes_per_token)`, which can be."
        ),
        spec=(
            ("nats_per_token", "float", "a cross-entropy as torch gives it"),
            ("bytes_per_token", "float", "how many bytes of text a token stands for, on average"),
            ("returns", "float", "bits per byte of text"),
        ),
        solution=bits_per_byte,
        checker=_check_bits,
        hints=(
            "Two steps: from nats to bits, and from a token to its bytes.",
            "A bit is ln 2 nats, so a number of nats is a larger number of bits.",
            "A token's cost is shared by the bytes that it stands for.",
        ),
        also_right=(
            RightAnswer("times log2 of e", lambda n, b: n * math.log2(math.e) / b),
            RightAnswer("per byte first", lambda n, b: (n / b) / math.log(2)),
            RightAnswer("through the probability", lambda n, b: -math.log2(math.exp(-n)) / b),
            RightAnswer("as a tensor", lambda n, b: torch.tensor(n, dtype=torch.float64) / (b * math.log(2))),
        ),
        wrong=(
            WrongAnswer("nats per byte", lambda n, b: n / b, "in nats"),
            WrongAnswer("bits per token", lambda n, b: n / math.log(2), "for a token"),
            WrongAnswer("bytes multiplied", lambda n, b: n / math.log(2) * b, "Divide by the bytes"),
            WrongAnswer("ln 2 multiplied", lambda n, b: n * math.log(2) / b, "more bits than nats"),
            WrongAnswer("base 10", lambda n, b: n / math.log(10) / b, "decimal"),
            WrongAnswer("eight times too much", lambda n, b: 8 * n / math.log(2) / b, "eight bits"),
        ),
        praise="This is why the bars above begin at different heights though nothing is known of any domain.",
    ),
    Exercise(
        id="start.5",
        title="how many GPUs hold the weights",
        dots=1,
        minutes=4,
        prompt=(
            "Write `gpus_to_hold(parameters, bytes_each, gpu_bytes)`: the least number of GPUs whose memory "
            "together holds all weights. Leave everything else that needs memory aside."
        ),
        spec=(
            ("parameters", "int", "weights of the model"),
            ("bytes_each", "float", "2 for BF16, 1 for FP8, 0.5 for four bits"),
            ("gpu_bytes", "int", "memory of one GPU, in bytes"),
            ("returns", "int", "GPUs"),
        ),
        solution=gpus_to_hold,
        checker=_check_gpus,
        hints=(
            "How many bytes are the weights? How many times does a GPU's memory go into that?",
            "A part of a GPU must be bought whole: `math.ceil`.",
        ),
        also_right=(
            RightAnswer("whole division, turned round", lambda p, b, g: int(-(-(p * b) // g))),
            RightAnswer("floor of one less", lambda p, b, g: int((p * b - 1) // g) + 1),
            RightAnswer("floor, and one more for a rest", lambda p, b, g: int(p * b // g) + bool(p * b % g)),
            RightAnswer("as a float", lambda p, b, g: float(math.ceil(p * b / g))),
        ),
        wrong=(
            WrongAnswer("not rounded", lambda p, b, g: p * b / g, "no whole number"),
            WrongAnswer("rounded down", lambda p, b, g: int(p * b // g), "Round up"),
            WrongAnswer("always one more", lambda p, b, g: int(p * b // g) + 1, "exactly"),
            WrongAnswer("bytes forgotten", lambda p, b, g: math.ceil(p / g), "bytes of each weight"),
            WrongAnswer("bits", lambda p, b, g: math.ceil(p * b * 8 / g), "bits"),
            WrongAnswer(
                "gigabytes of two kinds", lambda p, b, g: math.ceil(p * b / (g / 2**30 * 10**9)), "already"
            ),
        ),
        praise="Sixteen GPUs of 80 GiB for V3 in BF16, eight for its FP8 weights: one machine. Lesson 05 says how.",
    ),
)
