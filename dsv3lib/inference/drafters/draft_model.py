"""Speculative decoding in its first form: a smaller model drafts for a larger one (Leviathan et al., 2023).

The draft model reads what is confirmed into a latent cache of its own, then writes its guesses, one pass each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import ContextLengthError, InputError
from ...layers.cache import LatentCache
from ..sampling import Sampler
from . import Drafts
from .windows import take, unless_full

if TYPE_CHECKING:
    from ...model import DeepSeekV3
    from ..request import Request

_DRAFTS = 4


@dataclass(frozen=True)
class DraftModel:
    """Drafts from another model of the same vocabulary.

    Args:
        model: the smaller one.
    """

    model: DeepSeekV3

    def drafts_a_round(self, model: DeepSeekV3) -> int:
        """Four.

        Raises:
            InputError: the two models' vocabularies differ.
        """
        ours, theirs = self.model.config.vocab_size, model.config.vocab_size
        if ours != theirs:
            raise InputError(
                f"drafter: its vocabulary has {ours} tokens, the model's {theirs}; "
                "a draft model must share the tokenizer"
            )
        return _DRAFTS

    def begin(
        self, model: DeepSeekV3, request: Request, hidden: Float[Tensor, "B T D"], most: int
    ) -> ModelDrafting:
        """Arguments as for ``Drafter.begin``.

        Raises:
            ContextLengthError: the text may become longer than the draft model can read.
        """
        limit = self.model.config.max_position_embeddings
        longest = int(request.lengths.max()) + request.max_new_tokens - 1
        if longest > limit:
            raise ContextLengthError(
                f"drafter: reads at most {limit} tokens (max_position_embeddings), the text may have {longest}; ask "
                "for fewer new tokens or take another drafter"
            )
        return ModelDrafting(self.model, request.sampler, len(request.lengths), request.reserve)


class ModelDrafting:
    """One run: the draft model's cache, which holds confirmed tokens alone between two rounds.

    Args:
        model: drafts. sampler: guesses are picked as the model's own tokens are.
        rows: B. capacity: tokens that the cache reserves.
    """

    def __init__(self, model: DeepSeekV3, sampler: Sampler, rows: int, capacity: int) -> None:
        self.model, self.sampler = model, sampler
        self.cache = LatentCache(model.config, capacity=capacity)
        self.cache.plan(rows, 0)  # the rows are there, and empty

    def draft(self, text: Int[Tensor, "B capacity"], n: Int[Tensor, " B"], sizes: Int[Tensor, " B"]) -> Drafts:
        """As ``Drafting.draft``: first reads what was confirmed since, then goes on alone."""
        device, m, rows = self.model.lm_head.weight.device, int(sizes.max()), torch.arange(len(n))
        read = self.cache.lengths.numpy()
        new = np.where(sizes.numpy() == 0, 0, n.numpy() - read)
        tokens = take(text, read, int(new.max())).to(device)
        logits = self._read(tokens, new)[rows, torch.from_numpy(new - 1).clamp(min=0)]
        drafts: list[Tensor] = []
        q: list[Tensor] = []
        for k in range(1, m + 1):
            if self.sampler.greedy:
                drafts.append(logits.argmax(-1))
            else:
                q.append(self.sampler.probabilities(logits))
                drafts.append(self.sampler.draw(q[-1], sizes >= k))
            if k < m:
                logits = self._read(drafts[-1][:, None], (sizes.numpy() > k).astype(np.int64))[:, 0]
        return Drafts(torch.stack(drafts, 1), torch.stack(q, 1) if q else None, sizes)

    def _read(
        self, tokens: Int[Tensor, "B T"], lengths: Int[np.ndarray, " B"]
    ) -> Float[Tensor, "B T vocab"]:
        return self.model(tokens, cache=self.cache, lengths=unless_full(lengths, tokens.shape[1])).logits

    def confirm(
        self, before: Int[Tensor, " B"], n: Int[Tensor, " B"], hidden: Float[Tensor, "B T D"]
    ) -> None:
        """Forget drafts that fell."""
        self.cache.crop(self.cache.lengths.minimum(n - 1))
