"""What is to be generated, refused before any work is done if it cannot be; and the first pass over it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..checkpoint.generation_config import padding_token
from ..checkpoint.generation_config import stop_tokens as checkpoint_stop_tokens
from ..errors import ContextLengthError, InputError
from ..layers.cache import LatentCache
from .sampling import Sampler

if TYPE_CHECKING:
    from ..model import DeepSeekV3


@dataclass(frozen=True)
class Request:
    """Prompts and how to continue them.

    Args:
        input_ids: prompts, right-padded. lengths: tokens of each, Int64 on the CPU.
        ragged: whether the prompts' lengths were given, and so must be told to the model.
        max_new_tokens: at most so many are added to a row.
        sampler: how a token is picked. stops: tokens that end a row. fill: what is written after its end.
    """

    input_ids: Int[Tensor, "B T"]
    lengths: Int[Tensor, " B"]
    ragged: bool
    max_new_tokens: int
    sampler: Sampler
    stops: frozenset[int]
    fill: int

    @classmethod
    def of(
        cls,
        model: DeepSeekV3,
        input_ids: Int[Tensor, "*prompts"],
        max_new_tokens: int = 64,
        temperature: float | Sequence[float] = 0.0,
        top_p: float = 1.0,
        stop_tokens: Collection[int] | None = None,
        lengths: Int[Tensor, "*rows"] | None = None,
        generator: torch.Generator | None = None,
        top_k: int | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Request:
        """Check the arguments of ``generate`` and put in what was left out.

        Raises:
            InputError: a setting is out of range; it is named. ContextLengthError: prompt and new tokens
                together pass ``max_position_embeddings``.
        """
        config = model.config
        device, by_row = model.lm_head.weight.device, isinstance(temperature, Sequence)
        if seeds is not None and generator is not None:
            raise InputError("seeds: given beside generator; pass one of them")
        generators = None if seeds is None else tuple(torch.Generator(device).manual_seed(s) for s in seeds)
        sampler = Sampler(tuple(temperature) if by_row else temperature, top_p, generator, top_k, generators)
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens: {max_new_tokens}, expected at least 1")
        if input_ids.ndim != 2 or input_ids.numel() == 0:
            raise InputError(
                f"input_ids: shape {tuple(input_ids.shape)}, expected [batch, tokens], neither of them 0"
            )
        for name, values in (("temperature", temperature if by_row else None), ("seeds", seeds)):
            if values is not None and len(values) != len(input_ids):
                raise InputError(f"{name}: {len(values)} given, expected one for each of the {len(input_ids)} prompts")
        width = input_ids.shape[1]
        ragged = lengths is not None
        if lengths is None:
            lengths = torch.full(input_ids.shape[:1], width, dtype=torch.int64, device="cpu")
        lengths = lengths.to(device="cpu", dtype=torch.int64)
        if lengths.shape != input_ids.shape[:1] or not bool(((lengths >= 1) & (lengths <= width)).all()):
            raise InputError(
                f"lengths: {lengths.tolist()}, expected a number in [1, {width}] for each of the "
                f"{input_ids.shape[0]} prompts"
            )
        # The last token is given out and never read, so it needs no position.
        longest, limit = int(lengths.max()), config.max_position_embeddings
        if max(width, longest + max_new_tokens - 1) > limit:
            raise ContextLengthError(
                f"max_new_tokens: a prompt of {longest} (width {width}) and {max_new_tokens} new tokens pass "
                f"max_position_embeddings ({limit}); shorten either"
            )
        if stop_tokens is None:
            stop_tokens = checkpoint_stop_tokens(config, model.generation_config)
        for token in stop_tokens:
            if not 0 <= token < config.vocab_size:
                raise InputError(f"stop_tokens: holds {token}, expected ids in [0, {config.vocab_size})")
        for name, where in (
            ("input_ids", input_ids.device), ("generator", device if generator is None else generator.device),
        ):  # fmt: skip
            if where.type != device.type:
                raise InputError(f"{name}: on {where}, expected {device}, where the model is")
        fill = padding_token(config, model.generation_config)
        return cls(
            input_ids.to(torch.int64), lengths, ragged, max_new_tokens, sampler, frozenset(stop_tokens), fill
        )

    @property
    def reserve(self) -> int:
        """Tokens for which a cache reserves room at the start; a long request's cache grows as it goes."""
        return min(self.input_ids.shape[1] + self.max_new_tokens, 1024)

    def rows(self) -> list[list[int]]:
        """The prompts as lists, without padding."""
        return [row[:n] for row, n in zip(self.input_ids.tolist(), self.lengths.tolist(), strict=True)]

    def pad(self, rows: list[list[int]]) -> Int[Tensor, "B T_out"]:
        """Rows side by side, filled up to the longest."""
        longest = max(map(len, rows))
        padded = [row + [self.fill] * (longest - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int64, device=self.input_ids.device)


def prefill(
    model: DeepSeekV3, request: Request, cache: LatentCache
) -> tuple[Float[Tensor, "B vocab"], Float[Tensor, "B T D"]]:
    """Run the prompts through the model into an empty cache.

    Returns:
        The logits behind each row's last token, and the hidden states of all (where the MTP chain starts).

    Raises:
        InputError: an id is out of range; or logits are not finite, which is seen here and not at every token.
    """
    out = model(request.input_ids, cache=cache, lengths=request.lengths if request.ragged else None)
    rows = torch.arange(len(out.logits), device=out.logits.device)
    logits = out.logits[rows, request.lengths.to(out.logits.device) - 1]
    if not bool(torch.isfinite(logits).all()):
        raise InputError(
            "model: its logits for these prompts are not finite numbers; the weights hold NaN or infinity, or "
            "overflow in this dtype"
        )
    return logits, out.hidden
