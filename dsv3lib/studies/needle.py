"""Needle in a haystack, for models small enough to train here: facts planted in real text, one asked for at the end.

A row is bytes of text in which a few *needles* stand, each one token that says "key k has value v". At its end stands a
question, "what has key k?", and the next token is the answer. Keys and values of a row are all different, and behind
the needle that is asked for there is always another one: a model that names the last value, or any value but by its
key, scores nothing.

In training no needle stands in three bands of depth; ``prompts`` asks at those depths too. A second kind of question
needs *two* facts: "key k is as key l" and "key l has value v"; a model that only looks up cannot answer it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn

from ..errors import InputError
from .small_models import BYTES, rows_of

KEYS, VALUES = 8, 8
NEEDLES = 6
"""Needles in a row: a model that takes any of them by chance is right once in six times."""
KINDS = ("one", "one", "two", "plain")
"""Of training rows, each as likely as another; see ``training_rows``."""
UNSEEN_BANDS = ((0.2, 0.3), (0.5, 0.6), (0.8, 0.9))
"""Depths, as shares of the haystack from its beginning, at which no needle stands in training."""

_NEEDLE = BYTES  # + key · VALUES + value
_LINK = _NEEDLE + KEYS * VALUES  # + key · KEYS + other key: «this key is as that one»
_ASK = _LINK + KEYS * KEYS  # + key
ASK_LINKED = _ASK + KEYS  # + key
_ANSWER = ASK_LINKED + KEYS  # + value
VOCABULARY = _ANSWER + VALUES


@dataclass(frozen=True)
class Prompts:
    """Rows that end with a question.

    Attributes:
        ids: [B, T], the last token asks. answers: the right next token. last: the value of the last needle in the
            row, as an answer: what a model would say that looks only there.
    """

    ids: Int64[Tensor, "B T"]
    answers: Int64[Tensor, " B"]
    last: Int64[Tensor, " B"]


@dataclass(frozen=True)
class Score:
    """What came of questions: the share of right answers, and the right answers' mean loss in nats."""

    right: float
    loss: float


def unseen(depth: float) -> bool:
    """Whether training has no needle at that depth."""
    return any(low <= depth < high for low, high in UNSEEN_BANDS)


def prompts(
    text: UInt8[Tensor, " bytes"],
    rows: int,
    length: int,
    depth: float,
    generator: torch.Generator,
    linked: bool = False,
) -> Prompts:
    """Rows whose question is about the needle at one depth.

    Args:
        text: the haystack. rows: B. length: T, with the question. depth: 0 is the row's beginning, below 1.
        generator: of everything. linked: ask for the value of another key that a second needle names.

    Raises:
        InputError: the depth is not in [0, 1), or the row is too short for its needles.
    """
    body = length - 1
    if not 0.0 <= depth < 1.0 or body < 4 * NEEDLES:
        raise InputError(
            f"depth, length: {depth}, {length}; expected 0 <= depth < 1 and at least {4 * NEEDLES + 1} tokens"
        )
    place = min(int(depth * body), body - 2)  # another needle stands behind it
    ids = rows_of(text, rows, length, generator)
    keys, values = _facts(rows, generator)
    free = torch.rand(rows, body, generator=generator)
    free[:, place] = -1.0
    behind = place + 1 + (torch.rand(rows, generator=generator) * (body - place - 1)).long()
    free.scatter_(1, behind[:, None], -0.5)
    places = free.argsort(1)[:, : NEEDLES + 1]  # first the one asked for, then one behind it, then anywhere
    ids.scatter_(1, places[:, :NEEDLES], _NEEDLE + keys * VALUES + values)
    asked = keys[:, 0]
    if linked:  # a key that has no needle of its own is as the asked one
        other = _other_key(keys, generator)
        ids.scatter_(1, places[:, NEEDLES:], (_LINK + other * KEYS + asked)[:, None])
        ids[:, -1] = ASK_LINKED + other
    else:
        ids[:, -1] = _ASK + asked
    latest = places[:, :NEEDLES].argmax(1, keepdim=True)
    return Prompts(ids, _ANSWER + values[:, 0], _ANSWER + values.gather(1, latest)[:, 0])


def shuffled_keys(asked: Prompts, generator: torch.Generator) -> Prompts:
    """The control: the same rows with the needles' keys handed round, and the former answers.

    Whoever answers by the key now says something else, so that the former answer scores nothing.
    """
    ids = asked.ids.clone()
    for row in ids:
        at = ((row >= _NEEDLE) & (row < _LINK)).nonzero().flatten()
        key, value = (row[at] - _NEEDLE) // VALUES, (row[at] - _NEEDLE) % VALUES
        shift = int(torch.randint(1, len(at), (), generator=generator))
        row[at] = _NEEDLE + key.roll(shift) * VALUES + value
    return Prompts(ids, asked.answers, asked.last)


def training_rows(
    text: UInt8[Tensor, " bytes"],
    rows: int,
    length: int,
    generator: torch.Generator,
    kinds: Sequence[str] = KINDS,
) -> tuple[Int64[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Rows of text with needles outside the unseen bands, and questions for all of them at the end.

    Args:
        text: what is trained on. rows: B. length: T. generator: of everything.
        kinds: each row is by chance of one of them. "plain" is text to its end, so that an end does not mean questions;
            in "two" the first question is for a linked key, with a link for it; in "one" each needs one needle.

    Returns:
        The rows, and where the answers stand.
    """
    ids = rows_of(text, rows, length, generator)
    plain = ids.clone()
    keys, values = _facts(rows, generator)
    body = length - 2 * NEEDLES
    allowed = torch.tensor([not unseen(place / body) for place in range(body)])
    free = torch.rand(rows, body, generator=generator).masked_fill(~allowed, 2.0)
    places = free.argsort(1)[:, : NEEDLES + 1]
    ids.scatter_(1, places[:, :NEEDLES], _NEEDLE + keys * VALUES + values)
    order = torch.rand(rows, NEEDLES, generator=generator).argsort(1)
    questions, answers = _ASK + keys.gather(1, order), _ANSWER + values.gather(1, order)
    kind = torch.randint(len(kinds), (rows,), generator=generator)
    linked, without = (torch.tensor([one == name for one in kinds])[kind] for name in ("two", "plain"))
    other, asked = _other_key(keys, generator), keys[:, 0]
    ids[linked, places[linked, NEEDLES]] = (_LINK + other * KEYS + asked)[linked]
    questions[linked, 0], answers[linked, 0] = (ASK_LINKED + other)[linked], (_ANSWER + values[:, 0])[linked]
    ids[:, body::2], ids[:, body + 1 :: 2] = questions, answers
    ids[without] = plain[without]
    is_answer = torch.zeros(ids.shape, dtype=torch.bool)
    is_answer[:, body + 1 :: 2] = ~without[:, None]
    return ids, is_answer


def needs_two(ids: Int64[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Where an answer stands that needs two needles: behind a question for a linked key."""
    asks = (ids >= ASK_LINKED) & (ids < _ANSWER)
    return F.pad(asks[:, :-1], (1, 0))


@torch.no_grad()
def score(model: nn.Module, asked: Prompts, batch: int = 8) -> Score:
    """How often the likeliest next token is the answer, and how little the answer surprises.

    Args:
        model: gives logits. asked: the questions and their answers. batch: rows at a time.
    """
    right, loss = 0, 0.0
    for ids, answers in zip(asked.ids.split(batch), asked.answers.split(batch), strict=True):
        logits = model(ids).logits[:, -1]
        right += int((logits.argmax(-1) == answers).sum())
        loss += F.cross_entropy(logits, answers, reduction="sum").item()
    return Score(right / len(asked.ids), loss / len(asked.ids))


@torch.no_grad()
def loss_by_position(
    model: nn.Module, rows: Int64[Tensor, "B T"], bins: int, batch: int = 4
) -> list[float]:
    """Mean loss in nats of the text in each of ``bins`` equal parts of the rows."""
    total: Float[Tensor, " S"] = torch.zeros(rows.shape[1] - 1)
    for part in rows.split(batch):
        logits = model(part).logits[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none")
        total += losses.view(len(part), -1).sum(0)
    return [piece.mean().item() for piece in (total / len(rows)).tensor_split(bins)]


def _facts(rows: int, generator: torch.Generator) -> tuple[Int64[Tensor, "B N"], Int64[Tensor, "B N"]]:
    """Different keys and different values for the needles of each row."""
    keys, values = (torch.rand(rows, n, generator=generator).argsort(1)[:, :NEEDLES] for n in (KEYS, VALUES))
    return keys, values


def _other_key(keys: Int64[Tensor, "B N"], generator: torch.Generator) -> Int64[Tensor, " B"]:
    """A key of each row that no needle has."""
    score = torch.rand(len(keys), KEYS, generator=generator).scatter(1, keys, -1.0)
    return score.argmax(1)
