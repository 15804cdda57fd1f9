"""Where each visit goes: its row when all visits of one expert lie side by side.

A visit is 8 bytes; the 262,144 of a batch of V3 are 2 MiB, nothing beside the rows that they move. What costs is the
number of passes and of launches, and above all to wait for the host, so nothing here leaves the device.

The row is counted, not sorted for: visit i to expert e goes to the number of visits to lower experts plus the number
of earlier visits to e. Blocks of 1024 visits count theirs (one launch), then each block adds up the counts of the
blocks before it, and ranks its own visits by comparing them pairwise, 128 at a time (a second launch; a decode step's
few visits need only this one). A radix sort of 64-bit numbers would pass over them eight times to learn what a
histogram of 256 bins knows at once. Nothing depends on the order in which threads arrive.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ...errors import KernelError
from ...layers.experts import sort_by_expert
from ..toolchain import tuning
from ..toolchain.language import jit, row_offset, tl, triton
from ..toolchain.targets import on_device, on_triton


def place_visits(
    indices: Int[Tensor, "T K"], n_experts: int, settings: dict[str, Any] | None = None
) -> tuple[Int[Tensor, "T K"], Int[Tensor, " E"]]:
    """Each visit's row when visits are sorted by expert, ties in order, and how many each expert gets (its load).

    Returns:
        positions and counts, as in ``permute``.

    Raises:
        KernelError: on the CPU, an index outside [0, n_experts).
    """
    if not on_triton(indices):
        check_experts(indices, n_experts)
        return place_visits_ref(indices, n_experts)[1:]
    flat = indices.contiguous()
    visits = flat.numel()
    counts = flat.new_zeros(n_experts, dtype=torch.int64)
    positions = torch.empty_like(flat, dtype=torch.int64)
    if visits:
        row = settings or tuning.pick("place_visits", flat.device, visits=visits, E=n_experts)
        chunks = triton.cdiv(visits, row["CHUNK"])
        bins = triton.next_power_of_2(n_experts)
        block_counts = torch.empty(chunks, n_experts, dtype=torch.int32, device=flat.device)
        with on_device(flat):
            if chunks > 1:
                count_visits_kernel[(chunks,)](
                    flat, block_counts, visits, n_experts,
                    CHUNK=row["CHUNK"], E_PAD=bins, num_warps=row["num_warps"],
                )  # fmt: skip
            place_visits_kernel[(chunks,)](
                flat, block_counts, positions, counts, visits, n_experts, chunks,
                E_PAD=bins, ALONE=chunks == 1, **row,
            )  # fmt: skip
    return positions, counts


def place_visits_ref(
    indices: Int[Tensor, "T K"], n_experts: int
) -> tuple[Int[Tensor, " TK"], Int[Tensor, "T K"], Int[Tensor, " E"]]:
    """The plain form: ``layers.experts.sort_by_expert``.

    Returns:
        order: of each sorted visit, its place in the flattened [T, K]; then positions and counts.
    """
    visits = sort_by_expert(indices, n_experts)
    return visits.order, visits.inverse, visits.counts


def check_experts(indices: Tensor, n_experts: int) -> None:
    """Refuses experts that there are not; on the CPU alone: elsewhere asking would wait for all that is under way."""
    if indices.device.type == "cpu" and indices.numel():
        low, high = (int(v) for v in indices.aminmax())
        if low < 0 or high >= n_experts:
            raise KernelError(f"permute: indices hold {low} to {high}, expected experts in [0, {n_experts})")


@jit
def count_visits_kernel(
    indices_ptr, block_counts_ptr, n_visits, n_experts, CHUNK: tl.constexpr, E_PAD: tl.constexpr
):
    """How many of a block's visits go to each expert."""
    visit = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    e = tl.load(indices_ptr + visit, mask=visit < n_visits, other=-1)  # [CHUNK]
    sound = (e >= 0) & (e < n_experts)
    counts = tl.histogram(tl.where(sound, e, 0).to(tl.int32), E_PAD, mask=sound)
    expert = tl.arange(0, E_PAD)
    out = block_counts_ptr + row_offset(tl.program_id(0), n_experts) + expert
    tl.store(out, counts, mask=expert < n_experts)  # [E_PAD]


@jit
def place_visits_kernel(
    indices_ptr, block_counts_ptr, positions_ptr, counts_ptr, n_visits, n_experts, n_blocks,
    CHUNK: tl.constexpr, E_PAD: tl.constexpr, ALONE: tl.constexpr, TILE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The row of each visit of a block: its expert's first row, plus that expert's visits before it."""
    block = tl.program_id(0)
    expert = tl.arange(0, E_PAD)
    lane = tl.arange(0, TILE)
    own = tl.minimum(CHUNK, n_visits - block * CHUNK)  # a decode step's few visits are one round
    before = tl.zeros([E_PAD], dtype=tl.int32)
    total = tl.zeros([E_PAD], dtype=tl.int32)
    if ALONE:  # the only block: it counts for itself
        for start in range(0, own, TILE):
            e = tl.load(indices_ptr + start + lane, mask=start + lane < n_visits, other=-1)  # [TILE]
            sound = (e >= 0) & (e < n_experts)
            total += tl.histogram(tl.where(sound, e, 0).to(tl.int32), E_PAD, mask=sound)
    else:
        for start in range(0, n_blocks, BLOCKS):
            other = start + tl.arange(0, BLOCKS)
            at = row_offset(other, n_experts)[:, None] + expert[None, :]
            there = (other < n_blocks)[:, None] & (expert < n_experts)[None, :]
            tile = tl.load(block_counts_ptr + at, mask=there, other=0)  # [BLOCKS, E_PAD]
            total += tl.sum(tile, axis=0)
            before += tl.sum(tl.where((other < block)[:, None], tile, 0), axis=0)
    if block == 0:
        tl.store(counts_ptr + expert, total.to(tl.int64), mask=expert < n_experts)  # [E_PAD]
    taken = tl.cumsum(total, axis=0) - total + before  # of each expert the next free row
    for start in range(0, own, TILE):
        visit = block * CHUNK + start + lane
        e = tl.load(indices_ptr + visit, mask=visit < n_visits, other=-1)  # [TILE]
        sound = (e >= 0) & (e < n_experts)
        e = tl.where(sound, e, 0).to(tl.int32)
        same = (e[:, None] == e[None, :]) & (lane[None, :] < lane[:, None])
        # A visit that goes nowhere counts for none: it must not move those behind it.
        rank = tl.sum((same & sound[None, :]).to(tl.int32), axis=1)
        row = tl.where(sound, tl.gather(taken, e, 0) + rank, -1)
        tl.store(positions_ptr + visit, row.to(tl.int64), mask=visit < n_visits)  # [TILE]
        taken += tl.histogram(e, E_PAD, mask=sound)
