"""What the three kernels of prefill share: operands in two parts, loading and storing of tiles, bounds of a loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..toolchain import tuning
from ..toolchain.language import INTERPRETED, TensorDescriptor, jit, row_offset, tl, triton

COPY_BYTES = 16  # the copy engine wants rows that start on such a border
LEAST_BLOCK = 16  # the least that a matrix product takes


@dataclass(frozen=True)
class Operands:
    """q and k in two parts by their columns, [T, H, ·] each; the second is ``None`` where there is none.

    With a shared rotary key the parts are content and rotary; else the greatest power of two, and what is left.
    """

    q1: Tensor
    q2: Tensor | None
    k1: Tensor
    k2: Tensor | None
    v: Tensor
    grad: Tensor | None = None

    @staticmethod
    def of(q: Tensor, k: Tensor, v: Tensor, k_rope: Tensor | None, grad: Tensor | None = None) -> Operands:
        """Cut q and k at the same column; a shared key is seen as one of every head, without a copy."""
        width = q.shape[-1]
        cut = 1 << (width.bit_length() - 1) if k_rope is None else k.shape[-1]
        q1, q2 = q[..., :cut], q[..., cut:] if cut < width else None
        if k_rope is None:
            return Operands(q1, q2, k[..., :cut], k[..., cut:] if cut < width else None, v, grad)
        return Operands(q1, q2, k, k_rope[:, None].expand(-1, k.shape[1], -1), v, grad)

    def tensors(self, names: tuple[str, ...]) -> tuple[Any, ...]:
        """The operands that a loop walks over, as pointers; their descriptors come from ``launch``."""
        return tuple(getattr(self, name) for name in names)

    def strides(self, names: tuple[str, ...]) -> tuple[int, ...]:
        """From token to token and from head to head of each."""
        found: list[int] = []
        for name in names:
            tensor = getattr(self, name)
            found += (0, 0) if tensor is None else tensor.stride()[:2]
        return tuple(found)

    def launch(self, names: tuple[str, ...], row: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        """Widths, blocks, descriptors and settings: everything that a launch takes by name."""
        d1, d2, dv = self.q1.shape[-1], 0 if self.q2 is None else self.q2.shape[-1], self.v.shape[-1]
        blocks = {"BLOCK_1": block(d1), "BLOCK_2": block(d2), "BLOCK_V": block(dv)}
        widths = {"D1": d1, "D2": d2, "DV": dv}
        walked = [t for t in self.tensors(names) if t is not None]
        exact = all(
            block(t.shape[-1]) == t.shape[-1] for t in walked
        )  # a wider block would reach into the next head
        copied = bool(row["TMA"]) and exact and all(map(_copyable, walked))
        descriptors = {f"{n}_desc": _descriptor(getattr(self, n), tokens) if copied else None for n in names}
        return {**row, **widths, **blocks, **descriptors, "TMA": copied}


def block(size: int) -> int:
    """The power of two that covers a width, at least 16."""
    return max(LEAST_BLOCK, triton.next_power_of_2(max(size, 1)))


def _copyable(tensor: Tensor) -> bool:
    size = tensor.element_size()
    steps = (tensor.stride(0) * size, tensor.stride(1) * size, tensor.data_ptr())
    return tensor.numel() > 0 and not any(step % COPY_BYTES for step in steps) and tensor.stride(0) > 0


def _descriptor(tensor: Tensor | None, tokens: int) -> Any:
    """Tokens as rows and heads side by side as columns, whatever lies between two heads."""
    if tensor is None:
        return None
    n, heads, width = tensor.shape
    columns = (heads - 1) * tensor.stride(1) + width
    flat = tensor.as_strided((n, columns), (tensor.stride(0), 1))
    return TensorDescriptor(flat, [n, columns], [tensor.stride(0), 1], [tokens, width])


@jit
def unknown(x):
    """The same number, of which the compiler no longer knows where it came from."""
    if INTERPRETED:
        return x
    else:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1
        )


@jit
def load_rows(ptr, rows, n_rows, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of one head, zeros past the last and past the width."""
    column = tl.arange(0, BLOCK_D)[None, :]
    keep = (rows < n_rows)[:, None] & (column < D)
    return tl.load(ptr + row_offset(rows, stride)[:, None] + column, mask=keep, other=0.0)  # [rows, BLOCK_D]


@jit
def store_rows(ptr, values, rows, n_rows, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The same, written in the pointer's type."""
    column = tl.arange(0, BLOCK_D)[None, :]
    keep = (rows < n_rows)[:, None] & (column < D)
    # [rows, BLOCK_D]
    tl.store(ptr + row_offset(rows, stride)[:, None] + column, values.to(ptr.dtype.element_ty), mask=keep)


@jit
def load_tile(
    desc, ptr, first, n_rows, head, stride_t, stride_h,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """A tile of one head from row ``first`` on, by the copy engine or by ordinary loads."""
    if TMA:
        return desc.load([first, row_offset(head, stride_h).to(tl.int32)])  # [BLOCK_ROWS, BLOCK_D]
    else:
        rows = first + tl.arange(0, BLOCK_ROWS)
        return load_rows(ptr + row_offset(head, stride_h), rows, n_rows, stride_t, D, BLOCK_D)


@jit
def bounds(lo, hi, in_range, BLOCK: tl.constexpr):
    """Of rows that see [lo, hi): the first tile any of them sees, the whole tiles all of them see, the end.

    Returns:
        first <= whole_first <= whole_last <= last.
    """
    FAR: tl.constexpr = 2147483647
    some = in_range & (hi > lo)
    last = tl.cdiv(tl.max(tl.where(some, hi, 0), 0), BLOCK)
    first = tl.minimum(tl.min(tl.where(some, lo, FAR), 0) // BLOCK, last)
    whole_first = tl.minimum(tl.cdiv(tl.max(tl.where(in_range, lo, 0), 0), BLOCK), last)
    whole_first = tl.maximum(whole_first, first)
    whole_last = tl.minimum(tl.min(tl.where(in_range, hi, FAR), 0) // BLOCK, last)
    return first, whole_first, tl.maximum(whole_last, whole_first), last


@jit
def tile_number(i, first, whole_first, whole_last):
    """The i-th tile that needs a mask: those before the whole ones, then those behind."""
    tile = first + i
    return tl.where(tile >= whole_first, tile + whole_last - whole_first, tile)


def operand_types(names: tuple[str, ...], tokens: str, single: bool) -> dict[str, str]:
    """For a specimen: types of the operands that a loop walks over, and of their strides."""
    kind = "fp32" if single else "bf16"
    width = {
        "k1": "BLOCK_1",
        "k2": "BLOCK_2",
        "q1": "BLOCK_1",
        "q2": "BLOCK_2",
        "v": "BLOCK_V",
        "grad": "BLOCK_V",
    }
    found = {}
    for name in names:
        found |= {f"{name}_ptr": f"*{kind}", f"{name}_desc": f"tensordesc<{kind}[{tokens}, {width[name]}]>"}
        found |= {f"stride_{name}t": "i32", f"stride_{name}h": "i32"}
    return found


def operand_constants(names: tuple[str, ...], single: bool) -> Callable[[tuning.Row], Mapping[str, Any]]:
    """For a specimen: V3's widths, or the smallest model's, and no descriptors where the row copies by loads."""
    widths = (16, 8, 16) if single else (128, 64, 128)
    sizes = dict(zip(("D1", "D2", "DV"), widths, strict=True))
    sizes |= {name: block(d) for name, d in zip(("BLOCK_1", "BLOCK_2", "BLOCK_V"), widths, strict=True)}

    def constants(row: tuning.Row) -> Mapping[str, Any]:
        return sizes if row["TMA"] else {**sizes, **{f"{n}_desc": None for n in names}}

    return constants
