"""Which rows belong to a tile, when rows come in groups whose sizes only the device knows.

The router decides on the GPU how many rows each expert gets. Reading those counts on the host would stop it until
every kernel in flight has ended, so the grid is made for the worst case instead (every group ends with a tile that
is cut short) and one small kernel writes down for each tile its group and its rows. Tiles too many find -1.

Two layouts: *contiguous*, in which groups follow one another without gaps, and *masked*, in which each group has
the same capacity and fills its first rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..toolchain.language import jit, tl, triton

FIELDS = 3  # of a tile in the plan: its group, its first row, the row after the group's last


@jit
def rows_of_groups(counts, group, groups, rows, capacity, MASKED: tl.constexpr):
    """First row, and row after the last, of each group of a range that starts with 0.

    In the contiguous layout rows after the last group's form one more group, with the number ``groups``.
    """
    count = tl.maximum(tl.load(counts + group, mask=group < groups, other=0).to(tl.int32), 0)  # [GROUPS]
    if MASKED:
        first = group * capacity
        last = first + tl.minimum(count, capacity)
    else:
        last = tl.cumsum(count, 0)
        first = tl.minimum(last - count, rows)
        last = tl.where(group == groups, rows, tl.minimum(last, rows))
    return first, last


@jit
def plan_kernel(
    counts, plan, groups, rows, capacity, BLOCK_M: tl.constexpr, GROUPS: tl.constexpr, MASKED: tl.constexpr
):
    """One tile: finds the group in which it lies and writes (group, first row, end)."""
    tile = tl.program_id(0)
    group = tl.arange(0, GROUPS)
    first, last = rows_of_groups(counts, group, groups, rows, capacity, MASKED)
    tiles = (last - first + BLOCK_M - 1) // BLOCK_M
    before = tl.cumsum(tiles, 0) - tiles
    mine = (before <= tile) & (tile < before + tiles)
    found = tl.sum(mine.to(tl.int32), 0)
    tl.store(plan + tile * 3, tl.sum(tl.where(mine, group, 0), 0) + found - 1)  # scalar
    tl.store(plan + tile * 3 + 1, tl.sum(tl.where(mine, first + (tile - before) * BLOCK_M, 0), 0))  # scalar
    tl.store(plan + tile * 3 + 2, tl.sum(tl.where(mine, last, 0), 0))  # scalar


def make_plan(counts: Tensor, rows: int, capacity: int | None, block_m: int) -> Tensor:
    """Int32 [tiles, 3]: group, first row and end of each tile; -1 for the group where there is no such tile.

    Args:
        counts: rows per group, on the device.
        rows: of the operand, all groups together.
        capacity: rows that each group has room for, in the masked layout; None for the contiguous one.
        block_m: rows of a tile.
    """
    groups = counts.numel()
    tiles = (
        triton.cdiv(rows, block_m) + groups if capacity is None else groups * triton.cdiv(capacity, block_m)
    )
    plan = torch.empty(tiles, FIELDS, dtype=torch.int32, device=counts.device)
    plan_kernel[(tiles,)](
        counts, plan, groups, rows, capacity or 0, block_m, padded(groups), capacity is not None, num_warps=1
    )
    return plan


def padded(groups: int) -> int:
    """The next power of two that has room for the groups and the rows after the last."""
    return triton.next_power_of_2(groups + 1)
