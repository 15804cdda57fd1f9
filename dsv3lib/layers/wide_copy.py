"""An FP32 copy of a layer's cached latents in BF16 or FP16, for a CPU, whose arithmetic in 16 bits is slow.

Without it every token would widen all latents before it once more: at 8,192 tokens that took a fifth of the token's
time. The copy grows with the cache, by the rows that are appended. It holds what the 16 bits hold, not what was rounded
to them; and it is made anew where somebody else wrote to them, which torch counts (``_version``).
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


class WideCopy:
    """The copy of one layer, of a single sequence.

    Args:
        buffer: the cache's, [1, capacity, latent].
        held: rows that it holds.
        dtype: of the copy.

    Attributes:
        nbytes: of the copy, its reserve included.
    """

    def __init__(self, buffer: Float[Tensor, "1 S latent"], held: int, dtype: torch.dtype) -> None:
        self._buffer, self._narrow = buffer, buffer[0]
        with torch.inference_mode(False):  # begun in inference mode, it may go on outside
            self._wide = torch.empty(self._narrow.shape, dtype=dtype)
        self._array = self._wide.numpy()
        self.nbytes = self._wide.nbytes
        self._widen(0, held)

    def _widen(self, start: int, end: int) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # to wake another thread takes longer than to widen a context of thousands
        try:
            self._wide[start:end].copy_(self._narrow[start:end])
        finally:
            torch.set_num_threads(threads)
        self._version, self._held = self._buffer._version, end

    def holds(self, buffer: Float[Tensor, "1 S latent"], start: int) -> bool:
        """Whether the copy is of this buffer as it is now, at least up to a row.

        Args:
            buffer: the cache's.
            start: the row, not included.
        """
        return buffer is self._buffer and buffer._version == self._version and start <= self._held

    def append(self, rows: Float[Tensor, "T latent"], start: int, end: int) -> Float[np.ndarray, "S latent"]:
        """Write new rows, rounded to 16 bits, into the buffer and the copy; returns all up to their end.

        Args:
            rows: in the dtype of the copy.
            start: the first one's place.
            end: of the last one, not included.
        """
        self._narrow[start:end].copy_(rows)
        self._widen(start, end)
        return self._array[:end]
