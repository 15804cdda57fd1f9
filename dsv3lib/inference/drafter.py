"""Drafting with the MTP chain: each module guesses one token further (paper §2.2 and §5.4.3).

Module k reads, at position i, what module k − 1 knew there and the token i + k. Where that token is itself a
draft, the module's latents are provisional: when the truth is known they are forgotten and made again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..layers.cache import LatentCache
from .sampling import Sampler

if TYPE_CHECKING:
    from ..model import DeepSeekV3


class Drafter:
    """The chain with a cache of its own. Rows stand at different positions; lengths are Int64 on the CPU.

    Args:
        model: its MTP modules draft. sampler: drafts are picked as the model's own tokens are.
        hidden: [B, T, D], the model's hidden states of the prompts, right-padded.
        draft_tokens: the most drafts a round. capacity: tokens that the cache reserves.

    Attributes:
        cache: latents of the positions whose inputs are confirmed tokens at every depth.
        hidden: the model's hidden states from there on, up to the last that it has read.
    """

    def __init__(
        self,
        model: DeepSeekV3,
        sampler: Sampler,
        hidden: Float[Tensor, "B T D"],
        draft_tokens: int,
        capacity: int,
    ) -> None:
        self.model, self.sampler, self.hidden = model, sampler, hidden
        # With fewer drafts than modules, the last modules are not needed at all.
        self.modules = list(model.model.layers[model.config.num_hidden_layers :])[:draft_tokens]
        self.cache = LatentCache(model.config, mtp=True, capacity=capacity)
        self.cache.plan(hidden.shape[0], 0)  # the rows are there, and empty
        self._first = self.cache.lengths  # position of hidden[:, 0]

    def draft(
        self, text: Int[Tensor, "B capacity"], n: Int[Tensor, " B"], sizes: Int[Tensor, " B"]
    ) -> tuple[Int[Tensor, "B m"], Float[Tensor, "B m vocab"] | None]:
        """Guess the tokens behind each row's newest: once through the chain, then the last module again.

        Args:
            text: confirmed tokens, on the CPU. n: how many each row has; the model has read all but the newest.
            sizes: drafts wanted of each row, at least one somewhere; a row that wants none will never again.

        Returns:
            Drafts, m the largest of ``sizes``, and the distributions that they were drawn from (``None`` where
            greedy). Past a row's own size they mean nothing.
        """
        device, rows = self.hidden.device, torch.arange(len(n))
        new = (n - 1 - self._first).masked_fill(sizes == 0, 0)
        width, last = int(new.max()), (new - 1).clamp(min=0)
        tokens = take(text, self._first + 1, width).to(device)  # of each position the one after it
        hidden = self.hidden[:, :width]
        lengths = unless_full(new, width)
        step = self.model.begin(tokens, self.cache, lengths)
        drafts: list[Tensor] = []
        q: list[Tensor] = []
        for module in self.modules:  # all of them, even for fewer drafts: their latents are wanted later
            hidden, _ = module.advance(hidden, self.model.model.embed_tokens(tokens), step)
            newest = hidden[rows, last]
            self._pick(newest, drafts, q)
            tokens = tokens.roll(-1, 1)
            tokens[rows, last] = drafts[-1]
        self.cache.advance(width, lengths)
        for k in range(len(drafts), int(sizes.max())):
            # Both what a module puts out and what it takes in stand for "all up to here": it goes on from
            # its own output, one position further each time.
            tokens, lengths = drafts[-1][:, None], unless_full((sizes > k).long(), 1)
            step = self.model.begin(tokens, self.cache, lengths)
            hidden, _ = module.advance(newest[:, None], self.model.model.embed_tokens(tokens), step)
            newest = hidden[:, 0]
            self._pick(newest, drafts, q)
            self.cache.advance(1, lengths)
        m = int(sizes.max())
        return torch.stack(drafts[:m], 1), torch.stack(q[:m], 1) if q else None

    def _pick(self, hidden: Float[Tensor, "B D"], drafts: list[Tensor], q: list[Tensor]) -> None:
        logits = self.model.lm_head(hidden)
        if self.sampler.greedy:
            drafts.append(logits.argmax(-1))
        else:
            q.append(self.sampler.probabilities(logits))
            drafts.append(self.sampler.draw(q[-1]))

    def confirm(
        self, before: Int[Tensor, " B"], n: Int[Tensor, " B"], hidden: Float[Tensor, "B Tk D"]
    ) -> None:
        """Forget what rests on drafts, and take in what the model made of the tokens that stand.

        Args:
            before: confirmed tokens of each row when it was drafted. n: as many now.
            hidden: the model's states from position ``before`` − 1 on.
        """
        # At position i the deepest module has read token i + depth. Sure are the drafts that stand, and not
        # the newest token, which the model put in the place of a draft that fell.
        sure = (n - 1 - len(self.modules)).clamp(min=0).minimum(before - 1)
        first = self.cache.lengths.minimum(sure)
        self.cache.crop(first)
        width = int((n - 1 - first).max())
        places = first[:, None] + torch.arange(width)
        held = self.hidden.shape[1]
        of_old, of_new = places - self._first[:, None], places - before[:, None] + 1
        index = torch.where(of_new < 0, of_old, held + of_new).clamp(0, held + hidden.shape[1] - 1)
        joined = torch.cat([self.hidden, hidden], 1)
        self.hidden = joined[torch.arange(len(n))[:, None], index]
        self._first = first


def take(values: Int[Tensor, "B T"], start: Int[Tensor, " B"], width: int) -> Int[Tensor, "B width"]:
    """``width`` values of each row from its ``start`` on; past the end, the last one again."""
    places = (start[:, None] + torch.arange(width)).clamp(max=values.shape[1] - 1)
    return values.gather(1, places)


def unless_full(lengths: Int[Tensor, " B"], width: int) -> Int[Tensor, " B"] | None:
    """Lengths as the model takes them: ``None`` where every row is full, which is faster."""
    return None if bool((lengths == width).all()) else lengths
