"""The latent cache: what MLA keeps of the past, one latent and one shared rotary key a token and layer.

For V3 that is 512 + 64 values, 70,272 bytes a token over 61 layers in BF16, where full keys and values of
128 heads would take 71 times as much (paper §2.1.1: only the boxed vectors of Eqs. 1 and 3 are cached).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from ..config import ModelConfig
from ..errors import CacheError, ContextLengthError
from .wide_copy import WideCopy

FORMATS = ("model", "fp8")


class LatentCodec(NamedTuple):
    """The FP8 form of cached latents, written and read by a backend.

    Args:
        encode: (latents [..., C + R], C) -> bytes [..., width]. decode: (bytes, C, dtype) -> latents.
    """

    encode: Callable[[Tensor, int], Tensor]
    decode: Callable[[Tensor, int, torch.dtype], Tensor]


class LatentCache:
    """One buffer [B, capacity, C + R] per layer, doubled when full, so that a token is copied O(1) times.

    Rows may hold different numbers of tokens: row b holds positions 0 to ``lengths[b]`` - 1, and what lies
    beyond is never read. The first call decides batch size, dtype and device. No gradient flows through it.

    Args:
        config: the model's configuration.
        mtp: also room for the MTP modules' blocks (used by speculative decoding).
        capacity: tokens to reserve at the start; grows by itself.
        format: "model" keeps the dtype that the latents come in; "fp8" keeps E4M3 with an FP32 scale per 128 values
            and the rotary key in BF16, 656 bytes a token and layer at V3's sizes, of BF16's 1152.

    Attributes:
        config: the ModelConfig. lengths: Int64 [B] on the CPU, tokens held per row.

    Raises:
        CacheError: there is no such format.
    """

    def __init__(
        self, config: ModelConfig, mtp: bool = False, capacity: int = 64, format: str = "model"
    ) -> None:
        if format not in FORMATS:
            raise CacheError(f"format is {format!r}, expected one of {', '.join(map(repr, FORMATS))}")
        self.config, self.format = config, format
        self._codec: LatentCodec | None = None
        self._dtype: torch.dtype | None = None  # of the latents that an FP8 cache was given
        self.n_layers = config.num_hidden_layers + (config.num_nextn_predict_layers if mtp else 0)
        self.lengths: Int[Tensor, " B"] = torch.zeros(0, dtype=torch.int64)
        self._first_capacity = capacity
        self._buffers: list[Tensor | None] = [None] * self.n_layers
        self._wide: dict[int, WideCopy] = {}
        self._length = 0  # the longest row
        self._ragged = False
        self._page = 1
        self._table: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy, in memory or on disk, makes its FP32 copies anew."""
        return vars(self) | {"_wide": {}}

    def __len__(self) -> int:
        """Tokens in the longest row."""
        return self._length

    @property
    def ragged(self) -> bool:
        """Whether rows hold different numbers of tokens."""
        return self._ragged

    @property
    def nbytes(self) -> int:
        """Bytes that the tokens held take, over all rows and layers (not the reserve)."""
        tokens = int(self.lengths.sum())
        return sum(tokens * b.shape[-1] * b.element_size() for b in self._buffers if b is not None)

    @property
    def allocated_nbytes(self) -> int:
        """Bytes of the buffers, reserve and FP32 copies included."""
        return sum(b.nbytes for b in self._buffers if b is not None) + self.copies_nbytes

    @property
    def copies_nbytes(self) -> int:
        """Bytes of the FP32 copies of latents in 16 bits, which only ``append_rows`` makes."""
        return sum(wide.nbytes for wide in self._wide.values())

    def plan(
        self,
        batch: int,
        new: int,
        lengths: Int[Tensor, " B"] | None = None,
        page: int = 1,
        codec: LatentCodec | None = None,
    ) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"]]:
        """Check that ``new`` tokens a row fit; returns each row's length before and after this call.

        Args:
            batch: rows.
            new: tokens of this call.
            lengths: valid ones of each row; ``None`` means all.
            page: buffers made from now on have room for a whole number of so many tokens.
            codec: the backend's, for a cache in FP8.

        Raises:
            CacheError: another batch size than the cache was begun with; a backend that has no FP8 form.
            ContextLengthError: past ``max_position_embeddings``; nothing has been written.
        """
        if self.format == "fp8" and codec is None:
            raise CacheError(
                "the backend of this model has no FP8 latents; begin a LatentCache with format='model'"
            )
        self._codec = codec
        before = self.lengths if self.lengths.numel() else torch.zeros(batch, dtype=torch.int64)
        if before.numel() != batch:
            raise CacheError(
                f"the cache holds {before.numel()} sequences, got a batch of {batch}; "
                "pass the same batch or begin a new LatentCache"
            )
        after = before + (new if lengths is None else lengths.cpu())
        longest = self._length + new if lengths is None else int(after.max())
        if longest > self.config.max_position_embeddings:
            raise ContextLengthError(
                f"the sequence would reach {longest} tokens, max_position_embeddings is "
                f"{self.config.max_position_embeddings}; shorten the input or crop the cache"
            )
        self.lengths, self._page = before, max(page, self._page)
        return before, after

    def append(
        self, layer: int, latent: Float[Tensor, "B T latent"], lengths: Int[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B S latent"]:
        """Store a layer's new tokens behind those held and return all of them; ``advance`` ends the step.

        Args:
            layer: index of the block; MTP modules count on from the last layer.
            latent: normalised latent beside the rotated shared key, [c_kv; k_rope].
            lengths: valid tokens per row of ``latent``; ``None`` means all.

        Returns:
            A view of the buffer, old tokens and new, or of an FP8 one its decoded copy; past a row's own end it holds
            zeros or padding.
        """
        stored = self.store(layer, latent)
        if self.format == "model":
            return stored
        return self._codec.decode(stored, self.config.kv_lora_rank, latent.dtype)

    def store(self, layer: int, latent: Float[Tensor, "B T latent"]) -> Shaped[Tensor, "B S width"]:
        """Store them without decoding what an FP8 cache holds: for a kernel that reads ``pages``.

        Args:
            layer: index of the block.
            latent: of the new tokens.

        Raises:
            CacheError: another dtype or device than the cache was begun with.
        """
        latent = latent.detach()
        if self.format == "fp8":
            if self._dtype not in (None, latent.dtype):
                raise CacheError(f"the cache was begun with {self._dtype}, got {latent.dtype}")
            self._dtype = latent.dtype
            latent = self._codec.encode(latent, self.config.kv_lora_rank)
        return self._append(layer, latent)

    def _append(self, layer: int, latent: Tensor) -> Tensor:
        batch, new = latent.shape[:2]
        start = self._length
        end = start + new
        buffer = self._buffers[layer]
        if buffer is None or buffer.shape[1] < end or buffer.shape[1] % self._page:
            buffer = self._grow(layer, latent, end)
        if not self._ragged:
            buffer[:, start:end] = latent
            return buffer[:, :end]
        rows = torch.arange(batch, device=latent.device)[:, None]
        starts = self.lengths.to(latent.device, non_blocking=True)
        columns = starts[:, None] + torch.arange(new, device=latent.device)
        buffer[rows, columns] = latent
        # Masked positions get a weight of 0, but 0 x NaN would still be NaN.
        first = int(self.lengths.min()) + new
        stale = torch.arange(first, end, device=latent.device) >= columns[:, -1:] + 1
        buffer[:, first:end].masked_fill_(stale[..., None], 0)
        return buffer[:, :end]

    def append_rows(
        self, layer: int, latents: Float[np.ndarray, "T latent"], dtype: torch.dtype
    ) -> Float[np.ndarray, "S latent"]:
        """``append`` for a single sequence whose latents are an array.

        Args:
            layer: index of the block.
            latents: of the new tokens, in FP32 or FP64.
            dtype: to keep.

        Returns:
            All of the sequence's latents, in the dtype of ``latents``: the buffer itself, or of 16 bits a ``WideCopy``.
        """
        rows, start, end = torch.from_numpy(latents), self._length, self._length + len(latents)
        buffer = self._buffers[layer]
        if buffer is None or buffer.shape[1] < end or buffer.dtype != dtype:
            buffer = self._grow(layer, rows[None].to(dtype), end)
        if rows.dtype != dtype:
            wide = self._wide.get(layer)
            if wide is None or not wide.holds(buffer, start):
                wide = self._wide[layer] = WideCopy(buffer, start, rows.dtype)
            return wide.append(rows, start, end)
        past = buffer.numpy()[0, :end]
        past[start:] = latents
        return past

    def pages(self, layer: int) -> tuple[Float[Tensor, "pages page latent"], Int[Tensor, "B per_row"]]:
        """A layer's buffer as a paged kernel reads it: pages (see ``plan``), and which are whose, without a copy.

        Args:
            layer: index of the block.
        """
        buffer, page = self._buffers[layer], self._page
        batch, capacity, width = buffer.shape
        if self._table is None or self._table.numel() * page != batch * capacity:
            # All layers' buffers are alike: row b owns the pages b·S/page to (b + 1)·S/page − 1.
            owned = torch.arange(batch * capacity // page, dtype=torch.int32, device=buffer.device)
            self._table = owned.view(batch, -1)
        return buffer.view(-1, page, width), self._table

    def advance(self, new: int, lengths: Int[Tensor, " B"] | None = None) -> None:
        """Count the tokens of this step as held, after every layer has appended them."""
        if lengths is None:
            self.lengths = self.lengths + new
            self._length += new
        else:
            self._set_lengths(self.lengths + lengths.cpu())

    def crop(self, length: int | Int[Tensor, " B"]) -> None:
        """Forget all tokens from position ``length`` on; an Int64 [B] gives each row its own.

        Raises:
            CacheError: a length is negative or more than the row holds.
        """
        if isinstance(length, int) and not self._ragged and 0 <= length <= self._length:
            self.lengths, self._length = torch.full_like(self.lengths, length), length
            return
        held = self.lengths.numpy()
        wanted = np.broadcast_to(torch.as_tensor(length, dtype=torch.int64).cpu().numpy(), held.shape)
        if (wanted < 0).any() or (wanted > held).any():
            raise CacheError(f"cannot crop to {length}: rows hold {self.lengths.tolist()} tokens")
        self._set_lengths(torch.from_numpy(wanted.copy()))

    def _set_lengths(self, lengths: Int[Tensor, " B"]) -> None:
        self.lengths = lengths
        numbers = lengths.numpy()  # as quick for few rows as one of torch's operations alone
        self._length = int(numbers.max()) if numbers.size else 0
        self._ragged = bool((numbers != self._length).any())

    def _grow(self, layer: int, like: Tensor, needed: int) -> Tensor:
        old = self._buffers[layer]
        if old is not None and (old.dtype != like.dtype or old.device != like.device):
            raise CacheError(
                f"the cache holds {old.dtype} on {old.device}, got {like.dtype} on {like.device}"
            )
        capacity = max(needed, self._first_capacity, 0 if old is None else 2 * old.shape[1])
        capacity = max(needed, min(capacity, self.config.max_position_embeddings))
        capacity = -(-capacity // self._page) * self._page
        with torch.inference_mode(False):  # begun in inference mode, it may go on outside
            buffer = torch.empty(like.shape[0], capacity, like.shape[2], dtype=like.dtype, device=like.device)
        if old is not None:
            buffer[:, : old.shape[1]] = old
        self._buffers[layer] = buffer
        return buffer
