"""Prompt lookup decoding: what followed the last time that these tokens stood here (n-gram drafts, no model at all).

Code repeats its names, tables their rows, answers their questions. The newest n tokens are looked for further back in
the same text; where they stand, what came behind them is the draft. That costs no arithmetic, so it is the plain twin
of every drafter that computes: where this one is as good, the text was copied and not foreseen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import InputError
from . import Drafts

if TYPE_CHECKING:
    from ...model import DeepSeekV3
    from ..request import Request

_DRAFTS = 4


@dataclass(frozen=True)
class PromptLookup:
    """Drafts from n-grams of a row's own text, prompt and continuation.

    Args:
        longest: n that is tried first. shortest: n that is tried last; where no n-gram is found again, nothing is
            drafted.

    Raises:
        InputError: ``shortest`` below 1, or above ``longest``.
    """

    longest: int = 4
    shortest: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.longest:
            raise InputError(
                f"shortest, longest: {self.shortest}, {self.longest}, expected 1 <= shortest <= longest tokens"
            )

    def drafts_a_round(self, model: DeepSeekV3) -> int:
        """Four: a find that goes on is worth more than the pass that is a little wider."""
        return _DRAFTS

    def begin(
        self, model: DeepSeekV3, request: Request, hidden: Float[Tensor, "B T D"], most: int
    ) -> LookupDrafting:
        """Needs neither hidden states nor weights; arguments as for ``Drafter.begin``."""
        vocab = None if request.sampler.greedy else model.config.vocab_size
        return LookupDrafting(self, vocab, hidden.device)


class LookupDrafting:
    """One run; the text itself is all its state.

    Args:
        settings: which n-grams. vocab: the distribution's width, ``None`` where the request is greedy.
        device: the model's.
    """

    def __init__(self, settings: PromptLookup, vocab: int | None, device: torch.device) -> None:
        self._settings, self._vocab, self._device = settings, vocab, device

    def draft(self, text: Int[Tensor, "B capacity"], n: Int[Tensor, " B"], sizes: Int[Tensor, " B"]) -> Drafts:
        """As ``Drafting.draft``; a draft that is looked up has all of q on itself."""
        rows = text.numpy()
        found = [
            lookup(row[:length], most, self._settings.longest, self._settings.shortest) if most else []
            for row, length, most in zip(rows, n.tolist(), sizes.tolist(), strict=True)
        ]
        width = max(map(len, found))
        padded = [guess + [0] * (width - len(guess)) for guess in found]
        tokens = torch.tensor(padded, dtype=torch.int64, device=self._device).view(len(found), width)
        q = None
        if self._vocab is not None:
            q = torch.zeros(*tokens.shape, self._vocab, device=self._device).scatter_(-1, tokens[..., None], 1.0)
        return Drafts(tokens, q, torch.tensor([len(guess) for guess in found]))

    def confirm(
        self, before: Int[Tensor, " B"], n: Int[Tensor, " B"], hidden: Float[Tensor, "B T D"]
    ) -> None:
        """Nothing is to be kept."""


def lookup(text: np.ndarray, most: int, longest: int = 4, shortest: int = 2) -> list[int]:
    """What followed the latest earlier place where the text's last n tokens stand, n from ``longest`` down.

    Args:
        text: token ids. most: of so many the guess consists at most; it ends with the text.
        longest, shortest: n.

    Returns:
        The guess; empty where not even ``shortest`` tokens are found again.
    """
    for n in range(min(longest, len(text) - 1), shortest - 1, -1):
        # Ends of earlier n-grams: compared token by token, from the last one back.
        ends = np.flatnonzero(text[n - 1 : -1] == text[-1]) + n - 1
        for back in range(1, n):
            ends = ends[text[ends - back] == text[-1 - back]]
        if len(ends):
            after = int(ends[-1]) + 1
            return text[after : after + most].tolist()
    return []
