"""Drafting with the MTP chain: each module guesses one token further (paper §2.2 and §5.4.3).

Module k reads, at position i, what module k − 1 knew there and the token i + k. Where that token is itself a
draft, the module's latents are provisional: when the truth is known they are forgotten and made again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from ...backends.engine import MOST_TOKENS
from ...backends.weight_copies import as_array
from ...errors import InputError
from ...layers.cache import LatentCache
from ...layers.step import Step
from ..sampling import Sampler
from . import Drafts
from .windows import take, unless_full

if TYPE_CHECKING:
    from ...backends.few_tokens import FewChain
    from ...model import DeepSeekV3
    from ..request import Request


@dataclass(frozen=True)
class MTPChain:
    """Drafts from the model's own MTP modules.

    A draft ends in the whole output head. On tiny-v3 (2,048 tokens, a CPU) two heads take 0.3 of a round's 8.5 ms:
    drafting over a quarter of the tokens could save a fortieth of a round, so it is not done.
    ``benchmarks/speculation.py`` measures the share.

    Args:
        remembers: after rounds without drafts the modules catch up on so many positions at most, of the prompt too, and
            forget what was before: reading all of a long stretch would cost more than drafts are worth.
    """

    remembers: int = 64

    def drafts_a_round(self, model: DeepSeekV3) -> int:
        """One per module.

        Raises:
            InputError: the model has none.
        """
        depth = model.config.num_nextn_predict_layers
        if depth == 0:
            raise InputError(
                "speculative: the model has no MTP module to draft with (num_nextn_predict_layers is 0); pass "
                'drafter="lookup", or a smaller model as drafter, or generate without speculation'
            )
        return depth

    def begin(
        self, model: DeepSeekV3, request: Request, hidden: Float[Tensor, "B T D"], most: int
    ) -> ChainDrafting:
        """Arguments as for ``Drafter.begin``; beyond one draft a module the last module is used again."""
        return ChainDrafting(model, request.sampler, hidden, most, request.reserve, self.remembers)


class ChainDrafting:
    """The chain with a cache of its own. Rows stand at different positions; lengths are Int64 on the CPU.

    Args:
        model: its MTP modules draft. sampler: drafts are picked as the model's own tokens are.
        hidden: [B, T, D], the model's hidden states of the prompts, right-padded.
        draft_tokens: the most drafts a round. capacity: tokens that the cache reserves.
        remembers: as for ``MTPChain``.

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
        remembers: int = 64,
    ) -> None:
        self.model, self.sampler, self.hidden = model, sampler, hidden
        # With fewer drafts than modules, the last modules are not needed at all.
        self.modules = list(model.model.layers[model.config.num_hidden_layers :])[:draft_tokens]
        self.cache = LatentCache(model.config, mtp=True, capacity=capacity)
        self.cache.plan(hidden.shape[0], 0)  # the rows are there, and empty
        self._first = np.zeros(len(hidden), np.int64)  # position of hidden[:, 0]
        self._offset = np.zeros(len(hidden), np.int64)  # position of the cache's first latent
        self._drafted = False
        # Hidden states of passes without drafts, not yet joined to ``hidden``; and each row's n before them.
        self._skipped: deque[Tensor] = deque(maxlen=remembers)
        self._remembers = remembers
        self._since: np.ndarray | None = None

    def draft(self, text: Int[Tensor, "B capacity"], n: Int[Tensor, " B"], sizes: Int[Tensor, " B"]) -> Drafts:
        """As ``Drafting.draft``: once through the chain, then the last module again."""
        counts, wanted = n.numpy(), sizes.numpy()
        self._catch_up(counts)
        new = np.where(wanted == 0, 0, counts - 1 - self._first)
        width, m = int(new.max()), int(wanted.max())
        self._drafted = True
        drafts: list[Tensor] = []
        q: list[Tensor] = []
        few = len(n) == 1 and width <= MOST_TOKENS  # behind a long prompt the layers read it
        chain = self.model.choice.few_chain(self.model, self.modules) if few else None
        if chain is not None:
            self._draft_row(chain, text, width, m, sizes, drafts, q)
        else:
            self._draft_rows(text, new, width, m, sizes, drafts, q)
        return Drafts(torch.stack(drafts[:m], 1), torch.stack(q[:m], 1) if q else None, sizes)

    def _draft_row(
        self, chain: FewChain, text: Tensor, width: int, m: int, sizes: Tensor, drafts: list[Tensor], q: list[Tensor]
    ) -> None:
        """What ``_draft_rows`` does, of one row and in arrays."""
        first, held = int(self._first[0]) + 1, len(self.cache)
        self.cache.plan(1, max(width, width + m - len(self.modules)))
        like = self.hidden.detach()
        rotations = self.model.rope.table(held + width + max(m - len(self.modules), 0), like).numpy()
        tokens, rows = text[0, first : first + width].numpy(), as_array(like[0, :width])
        for k in range(len(self.modules)):  # all of them, even for fewer drafts: their latents are wanted later
            rows, logits = chain.advance(k, rows, tokens, self.cache, rotations[held : held + width])
            self._pick(torch.from_numpy(logits)[None], sizes, drafts, q)
            tokens = np.append(tokens[1:], drafts[-1].numpy())
        self.cache.advance(width)
        for at in range(held + width, held + width + m - len(drafts)):
            # What a module puts out stands for "all up to here", as what it takes in does: it goes on from there.
            rows, logits = chain.advance(k, rows[-1:], tokens[-1:], self.cache, rotations[at : at + 1])
            self._pick(torch.from_numpy(logits)[None], sizes, drafts, q)
            tokens = drafts[-1].numpy()
            self.cache.advance(1)

    def _draft_rows(
        self,
        text: Tensor,
        new: Int64[np.ndarray, " B"],
        width: int,
        m: int,
        sizes: Tensor,
        drafts: list[Tensor],
        q: list[Tensor],
    ) -> None:
        tokens = take(text, self._first + 1, width).to(self.hidden.device)  # of each position the one after it
        hidden, lengths = self.hidden[:, :width], unless_full(new, width)
        last = torch.from_numpy(np.maximum(new - 1, 0))
        step = self.model.begin(tokens, self.cache, lengths)
        for module in self.modules:
            hidden, _ = module.advance(hidden, self.model.model.embed_tokens(tokens), step)
            newest = hidden[:, -1] if lengths is None else hidden[torch.arange(len(new)), last]
            self._pick(self._logits(newest, step), sizes, drafts, q)
            tokens = _further(tokens, drafts[-1], None if lengths is None else last)
        self.cache.advance(width, lengths)
        for k in range(len(drafts), m):
            tokens, lengths = drafts[-1][:, None], unless_full((sizes.numpy() > k).astype(np.int64), 1)
            step = self.model.begin(tokens, self.cache, lengths)
            hidden, _ = module.advance(newest[:, None], self.model.model.embed_tokens(tokens), step)
            newest = hidden[:, 0]
            self._pick(self._logits(newest, step), sizes, drafts, q)
            self.cache.advance(1, lengths)

    def _logits(self, hidden: Float[Tensor, "B D"], step: Step) -> Float[Tensor, "B vocab"]:
        engine = self.model.choice.few_tokens(hidden[:, None], step)
        return self.model.lm_head(hidden) if engine is None else engine.head(hidden[:, None])[:, 0]

    def _pick(
        self, logits: Float[Tensor, "B vocab"], sizes: Int[Tensor, " B"], drafts: list[Tensor], q: list[Tensor]
    ) -> None:
        if self.sampler.greedy:
            drafts.append(logits.argmax(-1))
        else:
            q.append(self.sampler.probabilities(logits))
            drafts.append(self.sampler.draw(q[-1], sizes >= len(q)))

    def confirm(
        self, before: Int[Tensor, " B"], n: Int[Tensor, " B"], hidden: Float[Tensor, "B Tk D"]
    ) -> None:
        """Forget what rests on drafts, and take in what the model made of the tokens that stand.

        Args:
            before: confirmed tokens of each row before the pass. n: as many now.
            hidden: the model's states from position ``before`` − 1 on.
        """
        if self._drafted:
            self._drafted = False
            self._take_in(before.numpy(), n.numpy(), hidden)
        else:
            self._since = before.numpy().copy() if self._since is None else self._since
            self._skipped.append(hidden)

    def _catch_up(self, n: Int64[np.ndarray, " B"]) -> None:
        """Join what the model read in passes without drafts; of very many only the last ones."""
        if self._since is None:
            return
        joined, since = torch.cat(tuple(self._skipped), 1), self._since
        self._since = None
        self._skipped.clear()
        if joined.shape[1] == int((n - since).max()):
            self._take_in(since, n, joined)
            if self.hidden.shape[1] > self._remembers:
                first = np.maximum(n - 1 - self._remembers, self._first)
                self._begin_anew(first, take(self.hidden, first - self._first, self._remembers))
        else:  # some were forgotten
            self._begin_anew(np.maximum(n - 1 - joined.shape[1], 0), joined)

    def _begin_anew(self, first: Int64[np.ndarray, " B"], hidden: Float[Tensor, "B T D"]) -> None:
        """Forget all before a position of each row: RoPE tells distances alone, so the latents may count from 0."""
        self.cache.crop(0)
        self.hidden, self._first, self._offset = hidden, first, first

    def _take_in(
        self, before: Int64[np.ndarray, " B"], n: Int64[np.ndarray, " B"], hidden: Float[Tensor, "B Tk D"]
    ) -> None:
        # At position i the deepest module has read token i + depth. Sure are the drafts that stand, and not
        # the newest token, which the model put in the place of a draft that fell.
        depth = len(self.modules)
        if len(n) == 1:  # the same as below in plain numbers, and without gathering
            (start,), (offset,), (was,), (now) = self._first.tolist(), self._offset.tolist(), before.tolist(), int(n[0])
            sure = min(max(now - 1 - depth, 0), was - 1)
            place = max(min(len(self.cache) + offset, sure), offset)
            self.cache.crop(place - offset)
            old = self.hidden[:, place - start : was - 1 - start]
            self.hidden = torch.cat([old, hidden], 1)[:, : now - 1 - place]
            self._first = np.array([place])
            return
        sure = np.minimum(np.maximum(n - 1 - depth, 0), before - 1)
        first = np.maximum(np.minimum(self.cache.lengths.numpy() + self._offset, sure), self._offset)
        self.cache.crop(torch.from_numpy(first - self._offset))
        width, held = int((n - 1 - first).max()), self.hidden.shape[1]
        places = first[:, None] + np.arange(width)
        of_old, of_new = places - self._first[:, None], places - before[:, None] + 1
        index = np.where(of_new < 0, of_old, held + of_new).clip(0, held + hidden.shape[1] - 1)
        joined = torch.cat([self.hidden, hidden], 1)
        self.hidden = joined[torch.arange(len(n))[:, None], torch.from_numpy(index)]
        self._first = first


def _further(
    tokens: Int[Tensor, "B T"], draft: Int[Tensor, " B"], last: Int[Tensor, " B"] | None
) -> Int[Tensor, "B T"]:
    """Each row's tokens one place ahead, its draft behind them.

    Args:
        last: each row's last place; ``None`` where all rows are full.
    """
    if last is None:
        return torch.cat([tokens[:, 1:], draft[:, None]], 1)
    tokens = tokens.roll(-1, 1)
    tokens[torch.arange(len(tokens)), last] = draft
    return tokens
