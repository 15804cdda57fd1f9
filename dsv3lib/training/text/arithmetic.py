"""Endless small word problems with worked answers: the one domain whose text is made, not found.

Problem ``i`` depends on nothing but the seed and ``i``. So the stream needs no state, can be entered
anywhere, and gives the same text on every machine. Only ``random.Random.random`` is used below: it is the
one drawing method whose sequence Python promises to keep from version to version.
"""

import random
from collections.abc import Sequence

NAMES = (
    "Ada",
    "Bao",
    "Carla",
    "Dev",
    "Elif",
    "Femi",
    "Greta",
    "Hugo",
    "Ines",
    "Jun",
    "Kaya",
    "Liam",
    "Mina",
    "Nils",
)
THINGS = (
    "apples",
    "books",
    "shells",
    "marbles",
    "stamps",
    "pencils",
    "tickets",
    "cups",
    "stones",
    "coins",
    "seeds",
)
PLACES = ("market", "school", "library", "harbour", "garden", "workshop", "station")


class _Draw:
    """Draws from a key: the same key gives the same draws for ever."""

    def __init__(self, key: str) -> None:
        self._random = random.Random(key)

    def number(self, low: int, high: int) -> int:
        """A whole number with ``low <= n <= high``."""
        return low + int(self._random.random() * (high - low + 1))

    def one(self, options: Sequence[str]) -> str:
        return options[self.number(0, len(options) - 1)]

    def two(self, options: Sequence[str]) -> tuple[str, str]:
        first = self.number(0, len(options) - 1)
        step = self.number(1, len(options) - 1)
        return options[first], options[(first + step) % len(options)]


# A kind of problem draws its numbers and returns the question and its steps, (expression, value) each; the
# last value is the answer.
Steps = list[tuple[str, int]]


def _gains_and_losses(draw: _Draw) -> tuple[str, Steps]:
    who, friend = draw.two(NAMES)
    thing = draw.one(THINGS)
    start, gain = draw.number(2, 400), draw.number(2, 300)
    both = start + gain
    loss = draw.number(1, both)
    return (
        f"{who} has {start} {thing}. {friend} brings {gain} more. Then {who} gives away {loss}. "
        f"How many {thing} are left?",
        [(f"{start} + {gain}", both), (f"{both} - {loss}", both - loss)],
    )


def _boxes(draw: _Draw) -> tuple[str, Steps]:
    who, thing = draw.one(NAMES), draw.one(THINGS)
    boxes, each, loose = draw.number(2, 24), draw.number(2, 40), draw.number(1, 60)
    packed = boxes * each
    return (
        f"{who} packs {boxes} boxes with {each} {thing} in each. {loose} {thing} do not fit. "
        f"How many {thing} did {who} start with?",
        [(f"{boxes} * {each}", packed), (f"{packed} + {loose}", packed + loose)],
    )


def _sharing(draw: _Draw) -> tuple[str, Steps]:
    who, thing = draw.one(NAMES), draw.one(THINGS)
    friends, each = draw.number(2, 12), draw.number(2, 50)
    rest = draw.number(0, friends - 1)
    given = friends * each
    return (
        f"{who} shares {given + rest} {thing} equally among {friends} friends and keeps what remains. "
        f"How many {thing} does {who} keep?",
        [
            (f"{given + rest} // {friends}", each),
            (f"{friends} * {each}", given),
            (f"{given + rest} - {given}", rest),
        ],
    )


def _shopping(draw: _Draw) -> tuple[str, Steps]:
    who, place, (first, second) = draw.one(NAMES), draw.one(PLACES), draw.two(THINGS)
    n_first, price_first = draw.number(2, 12), draw.number(1, 15)
    n_second, price_second = draw.number(2, 12), draw.number(1, 15)
    a, b = n_first * price_first, n_second * price_second
    return (
        f"At the {place} {who} buys {n_first} {first} at {price_first} euros each and "
        f"{n_second} {second} at {price_second} euros each. How many euros does {who} pay?",
        [(f"{n_first} * {price_first}", a), (f"{n_second} * {price_second}", b), (f"{a} + {b}", a + b)],
    )


def _journey(draw: _Draw) -> tuple[str, Steps]:
    who, place = draw.one(NAMES), draw.one(PLACES)
    speed, hours, walk = draw.number(4, 90), draw.number(2, 9), draw.number(1, 30)
    ride = hours * speed
    return (
        f"{who} travels {hours} hours at {speed} km an hour and then walks {walk} km to the {place}. "
        "How many km is that in all?",
        [(f"{hours} * {speed}", ride), (f"{ride} + {walk}", ride + walk)],
    )


def _ages(draw: _Draw) -> tuple[str, Steps]:
    who, friend = draw.two(NAMES)
    age, older, years = draw.number(3, 50), draw.number(1, 30), draw.number(2, 25)
    now = age + older
    return (
        f"{who} is {age} years old. {friend} is {older} years older. "
        f"How old will {friend} be in {years} years?",
        [(f"{age} + {older}", now), (f"{now} + {years}", now + years)],
    )


KINDS = (_gains_and_losses, _boxes, _sharing, _shopping, _journey, _ages)


def word_problem(seed: int, index: int) -> str:
    """Make problem number ``index`` of the stream named by ``seed``: question, steps, answer.

    Args:
        seed: names the stream; another seed gives other problems.
        index: number of the problem, 0 or more.

    Returns:
        Text of one document, four or more lines that end in a line break.
    """
    draw = _Draw(f"arithmetic/{seed}/{index}")
    question, steps = KINDS[draw.number(0, len(KINDS) - 1)](draw)
    worked = [f"{expression} = {value}" for expression, value in steps]
    return "\n".join([f"Question: {question}", *worked, f"Answer: {steps[-1][1]}", ""])
