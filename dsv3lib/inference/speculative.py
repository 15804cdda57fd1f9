"""Speculative decoding: a drafter guesses, the model verifies, and the text is what it would have been.

A pass over m + 1 tokens takes hardly longer than one over a single token, as both read all weights. So each
round the MTP chain (or another of ``drafters``) drafts m tokens behind the newest one, the model scores all of them
in one pass, and those are kept that it could have said itself, and one token of its own after them (paper §5.4.3; the
rule is that of Leviathan et al., 2023). It is no search for the best of several: one draft is kept or cut short.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import takewhile
from operator import eq
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from ..layers.cache import LatentCache
from .acceptance import Round, SpeculationStatistics
from .draft_count import DraftCount, count_of
from .drafters import Drafter, drafter_of
from .drafters.windows import unless_full
from .request import Request, prefill
from .sampling import Sampler

if TYPE_CHECKING:
    from ..model import DeepSeekV3


class Verdict(NamedTuple):
    """How many drafts of each row stand, and the model's own token after them."""

    accepted: Int[Tensor, " B"]
    token: Int[Tensor, " B"]


def verify(
    drafts: Int[Tensor, "B m"],
    q: Float[Tensor, "B m vocab"] | None,
    logits: Float[Tensor, "B m1 vocab"],
    sizes: Int[Tensor, " B"],
    sampler: Sampler,
) -> Verdict:
    """Keep drafts as the model itself would have said them (Leviathan et al., Algorithm 1).

    A draft x stands with probability min(1, p(x) / q(x)), and all before it must stand. After the first that
    falls the token is drawn from (p − q)⁺, normalised; if none falls, from the model's next p. Together, x
    comes out with probability min(p, q) + (p − q)⁺ = p. Greedy is the same with all of p on the likeliest
    token: a draft stands where it is that token.

    Args:
        drafts: guesses; −1 is none, and ends its row's.
        q: the distributions that they were drawn from, ``None`` where greedy.
        logits: the model's, position k scores draft k; m + 1 of them. sizes: drafts each row has.
        sampler: gives p.
    """
    if drafts.shape[1] == 0:
        return Verdict(torch.zeros_like(sizes), sampler.choose(logits[:, 0]))
    if q is None:
        said, guesses = logits.argmax(-1).tolist(), drafts.tolist()
        accepted = [
            sum(takewhile(bool, map(eq, of_row[:size], said_of_row)))
            for of_row, said_of_row, size in zip(guesses, said, sizes.tolist(), strict=True)
        ]
        tokens = [of_row[a] for of_row, a in zip(said, accepted, strict=True)]
        return Verdict(*(torch.tensor(x, device=drafts.device) for x in (accepted, tokens)))
    rows, places, guesses = np.arange(len(drafts)), np.arange(drafts.shape[1]), drafts.cpu().numpy()
    sizes = leading((places < sizes.cpu().numpy()[:, None]) & (guesses >= 0))
    present = places < sizes[:, None]
    p = sampler.probabilities(logits)
    named = drafts.clamp(min=0)[..., None]
    p_draft, q_draft = (x.gather(-1, named)[..., 0].cpu().numpy() for x in (p[:, :-1], q))
    uniform = sampler.uniform(torch.from_numpy(sizes).to(drafts.device), drafts.shape[1]).cpu().numpy()
    accepted = leading(present & (uniform * q_draft < p_draft))
    fell = accepted < sizes
    stood = torch.from_numpy(accepted).to(drafts.device)
    p_next = rest = p[torch.from_numpy(rows), stood]
    if fell.any():
        q_next = q[torch.from_numpy(rows), stood.clamp(max=drafts.shape[1] - 1)]
        if not fell.all():  # none fell: nothing to make up for
            q_next = q_next.masked_fill(torch.from_numpy(~fell).to(drafts.device)[:, None], 0.0)
        rest = (p_next - q_next).clamp_(min=0.0)
        # Where p and q differ by rounding alone, a draft may fall with nothing left of p.
        rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p_next)
    return Verdict(stood, sampler.draw(rest))


def leading(true: Bool[np.ndarray, "B m"]) -> Int64[np.ndarray, " B"]:
    """How many of each row are true before the first that is not."""
    return np.logical_and.accumulate(true, 1).sum(1, dtype=np.int64)


Verifier = Callable[[Tensor, Tensor | None, Tensor, Tensor, Sampler], Verdict]


def speculate(
    model: DeepSeekV3,
    request: Request,
    draft_tokens: int | str | DraftCount | None = None,
    statistics: SpeculationStatistics | None = None,
    verifier: Verifier = verify,
    drafter: Drafter | DeepSeekV3 | str | None = None,
) -> Iterator[Round]:
    """Give each round as soon as it stands; the first is the prompts' own pass, without drafts.

    Args:
        model: verifies.
        request: prompts and settings. Rows go on independently of each other.
        draft_tokens: m; by default the drafter's own number (one per MTP module; beyond that the last module is
            used again). "auto" takes in each round what gave the most tokens a second, none where drafts do not pay,
            and remembers it with the model; what is sampled then hangs on the machine's clock, what is greedy does
            not. Or an object that says it.
        statistics: is filled along the way. verifier: ``verify``, or a wrong one to see what breaks.
        drafter: as for ``drafters.drafter_of``; by default the MTP chain.

    Returns:
        Rounds whose tokens, joined, are as plain generation gives them: equal where greedy (but for
        rounding: a pass over several tokens may settle a tie otherwise), equally distributed where sampled.

    Raises:
        InputError: the drafter cannot draft for this model, or ``draft_tokens`` is below 1.
    """
    return _rounds(Speculation(model, request, draft_tokens, verifier, drafter), statistics)


def _rounds(speculation: Speculation, statistics: SpeculationStatistics | None) -> Iterator[Round]:
    yield speculation.begin()
    while not speculation.ended.numpy().all():
        round_ = speculation.step()
        if statistics is not None:
            statistics.add(round_)
        yield round_


class Speculation:
    """What stands between two rounds. The bookkeeping is by row and on the CPU, in NumPy's views of the tensors: of a
    small model's round a hundred operations of torch on single numbers would be a tenth.

    Args:
        model, request, draft_tokens, verifier, drafter: as for ``speculate``.

    Attributes:
        text: Int64 [B, capacity], prompts and confirmed tokens. n: Int64 [B], how many a row has.
        ended: bool [B]. cache: the model's latents of each row's first n − 1 tokens, neither more nor fewer.
        count: says how many drafts a round has.
    """

    def __init__(
        self,
        model: DeepSeekV3,
        request: Request,
        draft_tokens: int | str | DraftCount | None = None,
        verifier: Verifier = verify,
        drafter: Drafter | DeepSeekV3 | str | None = None,
    ) -> None:
        self.model, self.request, self.verifier = model, request, verifier
        self._drafter = drafter_of(drafter)
        usual = self._drafter.drafts_a_round(model)
        known = draft_tokens is None or isinstance(draft_tokens, int | str)
        longest = int(request.lengths.max()).bit_length()  # costs and acceptance hang on the context
        run = (type(self._drafter), len(request.lengths), request.sampler.greedy, longest)
        self.count = count_of(draft_tokens, usual, model, run) if known else draft_tokens
        self.cache = LatentCache(model.config, capacity=request.reserve)
        ids = request.input_ids.cpu()
        self.text = torch.cat([ids, ids.new_zeros(ids.shape[0], request.max_new_tokens)], 1)
        self.n = request.lengths.clone()
        self.ended = torch.zeros(ids.shape[0], dtype=torch.bool)
        self._text, self._n, self._ended = self.text.numpy(), self.n.numpy(), self.ended.numpy()
        self._start = request.lengths.numpy()
        self._rows = np.arange(len(ids))

    @torch.inference_mode()
    def begin(self) -> Round:
        """The prompts' pass, and each row's first token."""
        request = self.request
        logits, hidden = prefill(self.model, request, self.cache)
        self.drafting = self._drafter.begin(self.model, request, hidden, self.count.most)
        return self._gain([[] for _ in self.n], [0] * len(self.n), request.sampler.choose(logits).tolist())

    @torch.inference_mode()
    def step(self) -> Round:
        """Draft, verify, keep what stands."""
        left = self._start + self.request.max_new_tokens - self._n
        wanted = np.minimum(left - 1, self.count.next()) * ~self._ended  # one is the model's own
        if not wanted.any():
            return self._step_alone()
        with self.model.choice.settled(self.model):
            return self._step(wanted)

    def _step_alone(self) -> Round:
        """A round without drafts: as little as plain decoding does."""
        reads = torch.from_numpy(self._text[self._rows, self._n - 1][:, None]).to(self.request.input_ids.device)
        lengths = torch.from_numpy((~self._ended).astype(np.int64)) if self._ended.any() else None
        out = self.model(reads, cache=self.cache, lengths=lengths)
        tokens = self.request.sampler.choose(out.logits[:, 0]).tolist()
        before = self.n.clone()
        round_ = self._gain([[] for _ in tokens], [0] * len(tokens), tokens)
        self.drafting.confirm(before, self.n, out.hidden)
        self.count.saw(round_)
        return round_

    def _step(self, wanted: np.ndarray) -> Round:
        device, n = self.request.input_ids.device, self._n
        drafts = self.drafting.draft(self.text, self.n, torch.from_numpy(wanted))
        reads = torch.from_numpy(self._text[self._rows, n - 1][:, None]).to(device)
        if drafts.tokens.shape[1]:
            reads = torch.cat([reads, drafts.tokens], 1)
        valid = (drafts.sizes.numpy() + 1) * ~self._ended
        out = self.model(reads, cache=self.cache, lengths=unless_full(valid, reads.shape[1]))
        accepted, token = self.verifier(
            drafts.tokens, drafts.q, out.logits, drafts.sizes.to(device), self.request.sampler
        )
        judged = [row[:size] for row, size in zip(drafts.tokens.tolist(), drafts.sizes.tolist(), strict=True)]
        before = self.n.clone()
        round_ = self._gain(judged, accepted.tolist(), token.tolist())
        if len(n) == 1:
            self.cache.crop(int(n[0]) - 1)
        elif not np.array_equal(self.cache.lengths.numpy(), n - 1):
            self.cache.crop(self.n - 1)
        self.drafting.confirm(before, self.n, out.hidden)
        self.count.saw(round_)
        return round_

    def _gain(self, drafts: list[list[int]], accepted: list[int], tokens: list[int]) -> Round:
        """Write down what each row gained, up to its stop token."""
        gained: list[list[int]] = [[] for _ in drafts]
        for b, ended in enumerate(self.ended.tolist()):
            if ended:
                drafts[b], accepted[b] = [], 0
                continue
            new = drafts[b][: accepted[b]] + [tokens[b]]
            stop = next((i for i, token in enumerate(new) if token in self.request.stops), None)
            if stop is not None:
                new = new[: stop + 1]
                if stop < accepted[b]:  # drafts behind the end were never in question
                    drafts[b], accepted[b] = drafts[b][: stop + 1], stop + 1
            n = int(self._n[b])
            self._text[b, n : n + len(new)] = new
            self._n[b] += len(new)
            full = n + len(new) - int(self._start[b]) == self.request.max_new_tokens
            self._ended[b] = full or stop is not None
            gained[b] = new
        return Round(drafts, accepted, gained)
