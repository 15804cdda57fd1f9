"""Where weights lie: one block of memory in huge pages, so that a token reads them at the memory's speed.

A single token reads every weight once and computes next to nothing. In ordinary memory the weights are spread
over thousands of 4 KiB pages, more than a processor's table of addresses holds, and each new page is a look-up
that costs more than reading it. In 2 MiB pages a small model needs a dozen.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor, nn

HUGE_PAGE = 2 * 1024 * 1024  # bytes, on x86-64 and most others
ALIGNMENT = 64  # bytes: a line of the processor's cache, which no two tensors share


def allocate(model: nn.Module, dtype: torch.dtype) -> None:
    """Give a model on the meta device real, empty parameters on the CPU, side by side in one block.

    Pages become resident as they are written, so nothing is taken before weights are loaded. Parameters that
    are one stay one. Where the system has no huge pages to give, the block is ordinary memory.

    Args:
        model: its parameters are replaced. Buffers get memory of their own and keep their dtype.
        dtype: of the parameters.
    """
    parameters = list(dict.fromkeys(model.parameters()))  # each once, in order
    rows = [-(-p.numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT for p in parameters]
    room = block(sum(rows))
    made: dict[nn.Parameter, nn.Parameter] = {}
    start = 0
    for old, size in zip(parameters, rows, strict=True):
        values = room[start : start + old.numel() * dtype.itemsize].view(dtype).view(old.shape)
        made[old] = nn.Parameter(values, requires_grad=old.requires_grad)
        start += size
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = made[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")


def block(size: int) -> Tensor:
    """Bytes in one piece, in huge pages where there are any.

    Args:
        size: of it, more than 0.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    rounded = -(-size // HUGE_PAGE) * HUGE_PAGE
    memory = mmap.mmap(-1, rounded, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel built without them: the block serves all the same
        pass
    return torch.frombuffer(memory, dtype=torch.uint8)
