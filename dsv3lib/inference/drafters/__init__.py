"""Drafters for speculative decoding: MTP chain, prompt lookup (n-grams), a smaller draft model, or one of your own.

Whoever guesses, verification keeps the text what it would have been (``speculative.verify``); a drafter decides only
how many of its guesses stand, and what a guess costs. All of them stand behind one interface, ``Drafter``: settings,
that are given to ``generate(…, speculative=True, drafter=…)``, and begin a ``Drafting``, the state of one run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from ...errors import InputError

if TYPE_CHECKING:
    from ...model import DeepSeekV3
    from ..request import Request


class Drafts(NamedTuple):
    """A round's guesses.

    Args:
        tokens: [B, m], Int64 on the model's device, row after row; past a row's size they are any valid ids.
        q: [B, m, vocab], the distributions that they were drawn from; ``None`` where the request is greedy.
        sizes: [B], Int64 on the CPU, how many a row has: at most what was asked for.
    """

    tokens: Int[Tensor, "B m"]
    q: Float[Tensor, "B m vocab"] | None
    sizes: Int[Tensor, " B"]


@runtime_checkable
class Drafting(Protocol):
    """A run's drafter between two rounds."""

    def draft(self, text: Int[Tensor, "B capacity"], n: Int[Tensor, " B"], sizes: Int[Tensor, " B"]) -> Drafts:
        """Guess the tokens behind each row's newest.

        Args:
            text: confirmed tokens, on the CPU. n: how many each row has; the model has read all but the newest.
            sizes: guesses wanted of each row, at least one somewhere; a row that wants none has ended, or is about to.
        """
        ...

    def confirm(
        self, before: Int[Tensor, " B"], n: Int[Tensor, " B"], hidden: Float[Tensor, "B T D"]
    ) -> None:
        """Hear what a pass made of the round, of one without drafts too.

        Args:
            before: confirmed tokens of each row before the pass. n: as many now.
            hidden: the model's hidden states from position ``before`` − 1 on.
        """
        ...


@runtime_checkable
class Drafter(Protocol):
    """What guesses: settings, which hold for any number of runs."""

    def drafts_a_round(self, model: DeepSeekV3) -> int:
        """How many guesses a round has where the caller names no number.

        Raises:
            InputError: this drafter cannot draft for ``model``; says what to do.
        """
        ...

    def begin(
        self, model: DeepSeekV3, request: Request, hidden: Float[Tensor, "B T D"], most: int
    ) -> Drafting:
        """Begin a run, behind the prompts' own pass.

        Args:
            hidden: the model's hidden states of the prompts, right-padded. most: guesses that a round may have.
        """
        ...


def drafter_of(drafter: Drafter | DeepSeekV3 | str | None) -> Drafter:
    """What ``generate``'s argument ``drafter`` stands for.

    Args:
        drafter: ``None`` or "mtp", the model's own MTP modules; "lookup", n-grams of the text itself; a model, which
            drafts for the larger one; or anything with the methods of ``Drafter``.

    Raises:
        InputError: it is none of these.
    """
    from ...model import DeepSeekV3
    from .draft_model import DraftModel
    from .lookup import PromptLookup
    from .mtp_chain import MTPChain

    if isinstance(drafter, DeepSeekV3):
        return DraftModel(drafter)
    if drafter is None or drafter == "mtp":
        return MTPChain()
    if drafter == "lookup":
        return PromptLookup()
    if isinstance(drafter, str) or not isinstance(drafter, Drafter):
        raise InputError(
            f'drafter: {drafter!r}, expected "mtp", "lookup", a DeepSeekV3, or an object with the methods '
            "drafts_a_round and begin"
        )
    return drafter
