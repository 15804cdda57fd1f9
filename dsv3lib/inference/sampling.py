"""From logits to a token: the likeliest one, or a draw from the softmax, its temperature and its nucleus."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..errors import InputError


@dataclass(frozen=True)
class Sampler:
    """How a token is picked.

    Args:
        temperature: 0 takes the likeliest token, otherwise logits are divided by it and sampled; a tuple has one a row.
        top_p: sample among the likeliest tokens that together hold this probability.
        generator: source of the sampling, on the logits' device; torch's global one by default.
        top_k: sample among so many likeliest tokens; ``None`` keeps all. It cuts before ``top_p`` does.
        generators: one a row in place of ``generator``: what a row draws then hangs on no other row.

    Raises:
        InputError: a setting is out of range.
    """

    temperature: float | tuple[float, ...] = 0.0
    top_p: float = 1.0
    generator: torch.Generator | None = None
    top_k: int | None = None
    generators: tuple[torch.Generator, ...] | None = None

    def __post_init__(self) -> None:
        for temperature in self._temperatures:
            if not (temperature >= 0.0 and math.isfinite(temperature)):
                raise InputError(
                    f"temperature: {temperature}, expected a finite number >= 0 (0 takes the likeliest token)"
                )
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top_p: {self.top_p}, expected a number in (0, 1]; 1 keeps all tokens")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k: {self.top_k}, expected at least 1; None keeps all tokens")

    @property
    def _temperatures(self) -> tuple[float, ...]:
        return self.temperature if isinstance(self.temperature, tuple) else (self.temperature,)

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return not any(self._temperatures)

    def probabilities(self, logits: Float[Tensor, "*B vocab"]) -> Float[Tensor, "*B vocab"]:
        """The distribution that ``choose`` draws from; the first dimension is the rows'."""
        if not isinstance(self.temperature, tuple):
            return probabilities(logits, self.temperature, self.top_p, self.top_k)
        rows = zip(logits, self.temperature, strict=True)
        return torch.stack([probabilities(row, t, self.top_p, self.top_k) for row, t in rows])

    def choose(self, logits: Float[Tensor, "*B vocab"]) -> Int[Tensor, "*B"]:
        """Pick a token from each row of logits."""
        return logits.argmax(-1) if self.greedy else self.draw(self.probabilities(logits))

    def draw(
        self, p: Float[Tensor, "*B vocab"], wanted: Bool[Tensor, " rows"] | None = None
    ) -> Int[Tensor, "*B"]:
        """A token from each row's distribution, by inversion: the first whose cumulated share exceeds a uniform number.

        It takes one number a token, where ``torch.multinomial`` takes as many as the vocabulary has: on a CPU, and a
        small model, that was as long as a layer. Sums are FP64's, so that a long tail keeps its share.

        Args:
            p: the first dimension is the rows'. It need not sum to 1.
            wanted: on the CPU; a row that wants none uses up none of its own generator's numbers, and gets token 0.
        """
        if self.generators is None:
            return _invert(p, self.generator)
        tokens = torch.zeros(p.shape[:-1], dtype=torch.int64, device=p.device)
        for b in self._rows(wanted):
            tokens[b] = _invert(p[b], self.generators[b])
        return tokens

    def uniform(self, sizes: Int[Tensor, " B"], most: int) -> Float[Tensor, "B most"]:
        """Numbers from [0, 1), FP32, on the device of ``sizes``; so many of each row are used."""
        if self.generators is None:
            return torch.rand(len(sizes), most, generator=self.generator, device=sizes.device)
        numbers = torch.zeros(len(sizes), most, device=sizes.device)
        for b, size in enumerate(sizes.tolist()):
            numbers[b, :size] = torch.rand(size, generator=self.generators[b], device=sizes.device)
        return numbers

    def _rows(self, wanted: Tensor | None) -> list[int]:
        assert self.generators is not None
        return list(range(len(self.generators))) if wanted is None else wanted.nonzero()[:, 0].tolist()


def _invert(p: Float[Tensor, "*B vocab"], generator: torch.Generator | None) -> Int[Tensor, "*B"]:
    """Tokens drawn from p, by inversion of its cumulated sum."""
    total = p.cumsum(-1, dtype=torch.float64)
    # Below 1 by 2^-53 at least, so that in FP64 the product stays below the whole sum: the token has p > 0.
    at = torch.rand(*p.shape[:-1], 1, generator=generator, dtype=torch.float64, device=p.device) * total[..., -1:]
    tokens = torch.searchsorted(total, at, right=True)[..., 0]
    if bool((tokens == p.shape[-1]).any()):  # no sum exceeds it: it is NaN, or 0
        raise InputError("p: nothing can be drawn from it; the logits hold NaN or infinity, or overflow in this dtype")
    return tokens


def probabilities(
    logits: Float[Tensor, "*B vocab"], temperature: float, top_p: float = 1.0, top_k: int | None = None
) -> Float[Tensor, "*B vocab"]:
    """The distribution that is sampled from: softmax(logits / temperature), cut to its nucleus.

    The nucleus is the smallest set of likeliest tokens that holds at least ``top_p``; the rest gets 0 and the
    nucleus is normalised. It is found in FP64: a vocabulary's tail is a sum of a hundred thousand small numbers,
    and in FP32 it passes ``top_p`` early enough to lose tokens that belong. At temperature 0 all probability is
    on the likeliest token.

    Args:
        logits: of any dtype, and finite.
        temperature: logits are divided by it.
        top_p: in (0, 1]; 1 keeps all.
        top_k: at least 1; so many likeliest tokens are kept, and the nucleus is that of what is left. ``None``
            keeps all. Of tokens that tie at the edge those with the smaller ids stay.

    Returns:
        FP32, each row sums to 1.
    """
    if temperature == 0.0:
        one_hot = torch.zeros_like(logits, dtype=torch.float32)
        return one_hot.scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    if top_k is not None and top_k < logits.shape[-1]:
        kept = logits.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
        cut = torch.ones_like(logits, dtype=torch.bool).scatter_(-1, kept, False)
        logits = logits.masked_fill(cut, -torch.inf)
    if top_p < 1.0:
        # Sorted as logits, which no rounding has met yet: two tokens whose probabilities round alike keep their order.
        ranked, order = logits.sort(dim=-1, descending=True, stable=True)
        p = _softmax(ranked.double(), temperature)
        before = F.pad(p.cumsum(-1)[..., :-1], (1, 0))
        p = p.masked_fill(before >= top_p, 0.0)  # the token that crosses top_p is still inside
        p = (p / p.sum(-1, keepdim=True)).float()
        return torch.empty_like(p).scatter_(-1, order, p)
    return _softmax(logits.float(), temperature)


def _softmax(logits: Tensor, temperature: float) -> Tensor:
    # The maximum goes first: a very small temperature must not make infinities that cancel to NaN.
    below_best = logits - logits.amax(-1, keepdim=True)
    return (below_best / max(temperature, torch.finfo(torch.float32).tiny)).softmax(-1)
