"""Decoupled RoPE on the rotary part of every head's query and on the one shared key, in one launch.

The turn of a pair (a, b) by φ is (a cos φ - b sin φ, a sin φ + b cos φ); neighbours are pairs, as in the released
checkpoint. All of a query's heads and the token's key turn by the same angles (paper §2.1.1, Eqs. 3 and 8).

The two numbers, for 8192 tokens of V3 in BF16: of each head's 192 dimensions 64 are turned, 134 MB read and 134 MB
written for 128 heads, and six operations a pair. Memory is the limit. So in place only the rotary parts move;
where the input must stay as it is, the other 128 dimensions are copied by the same programs, which PyTorch's
split, turn and cat would move twice. The angles come as the model's table of cosines and sines, 256 bytes a token,
read from memory once and for the token's other heads from cache.

The gradient is the turn back: the same kernel with the sine's sign reversed.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ...autograd import once_differentiable
from ...errors import KernelError
from ..quantize.rounding import rounded_to
from ..toolchain import tuning
from ..toolchain.checks import require_dtype, require_rows, require_shape
from ..toolchain.language import jit, row_offset, tl, triton
from ..toolchain.targets import on_device, on_triton

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*KERNEL_DTYPES, torch.float64)
MOST_ROWS = 2**31 - 1  # heads of all tokens together: a program counts them in 32 bits

Settings = dict[str, int]


def rope(
    q: Float[Tensor, "*batch H QK"],
    k_rope: Float[Tensor, "*batch R"] | None,
    turns: Tensor,
    inplace: bool = False,
    settings: Settings | None = None,
) -> tuple[Float[Tensor, "*batch H QK"], Float[Tensor, "*batch R"] | None]:
    """Turn the last R of each query's QK dimensions, and the shared key (RoPE(·) in Eqs. 3 and 8).

    Differentiable in q and k_rope; FP16 and BF16 are turned in FP32; FP64 goes to the reference.

    Args:
        q: queries, neighbours are pairs.
        k_rope: the key of each token; ``None`` where it was turned elsewhere.
        turns: complex numbers e^{iφ} of the last batch dimensions, [T, R/2] or [B, T, R/2], or the same as
            [..., R/2, 2] of cosines and sines.
        inplace: write into q and k_rope and return them; only where no gradient is asked for.

    Returns:
        queries and keys, turned; ``None`` for keys that were not given.

    Raises:
        KernelError: dtypes or shapes that do not fit; in place where a gradient is recorded, or where no view
            lays the heads in rows.
    """
    table = _check(q, k_rope, turns)
    if inplace and torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k_rope)):
        raise KernelError("rope: in place, the gradient would be lost: use inplace=False, or torch.no_grad()")
    if q.is_meta or q.dtype == torch.float64 or not on_triton(q, k_rope, table):
        return _ref_in_place(q, k_rope, turns) if inplace else rope_ref(q, k_rope, turns)
    if inplace:
        require_rows("rope", "q", q)
        if k_rope is not None:
            require_rows("rope", "k_rope", k_rope)
        try:
            flat = q.view(-1, *q.shape[-2:]), None if k_rope is None else k_rope.view(-1, k_rope.shape[-1])
        except RuntimeError as error:
            strides = "" if k_rope is None else f" or k_rope with {k_rope.stride()}"
            raise KernelError(
                f"rope: q with strides {q.stride()}{strides} is no matrix of tokens, "
                "expected one for inplace=True: call .contiguous(), or use inplace=False"
            ) from error
        _launch(*flat, table, *flat, False, settings)
        return q, k_rope
    return _Rope.apply(q, k_rope, table, settings)


def rope_ref(
    q: Float[Tensor, "*batch H QK"], k_rope: Float[Tensor, "*batch R"] | None, turns: Tensor
) -> tuple[Float[Tensor, "*batch H QK"], Float[Tensor, "*batch R"] | None]:
    """The same in plain PyTorch: split, turn in FP32 (FP64 for FP64), join."""
    table = _real(turns)
    width = 2 * table.shape[-2]
    nope, rotary = q.split([q.shape[-1] - width, width], -1)
    turned = torch.cat([nope, turned_ref(rotary, table[..., None, :, :])], -1)
    return turned, None if k_rope is None else turned_ref(k_rope, table)


def turned_ref(
    x: Float[Tensor, "*batch R"], table: Float[Tensor, "*turns half 2"]
) -> Float[Tensor, "*batch R"]:
    """Each pair of x turned by its angle."""
    wide = x if x.dtype == torch.float64 else x.float()
    (a, b), (cos, sin) = wide.unflatten(-1, (-1, 2)).unbind(-1), table.unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


def _ref_in_place(q: Tensor, k_rope: Tensor | None, turns: Tensor) -> tuple[Tensor, Tensor | None]:
    turned_q, turned_k = rope_ref(q, k_rope, turns)
    return q.copy_(turned_q), None if k_rope is None else k_rope.copy_(turned_k)


def _real(turns: Tensor) -> Tensor:
    return torch.view_as_real(turns) if turns.is_complex() else turns


def checked_table(operation: str, turns: Tensor, batch: torch.Size, rotary: int) -> Tensor:
    """The turns as cosines and sines, side by side.

    Raises:
        KernelError: they do not fit the rotary width or the last of the batch dimensions, or are no FP32 or FP64.
    """
    table = _real(turns)
    require_dtype(operation, "turns", table, (torch.float32, torch.float64))
    if rotary % 2 or table.ndim < 2 or table.shape[-2:] != (rotary // 2, 2):
        raise KernelError(
            f"{operation}: turns have shape {list(turns.shape)}, expected [..., {rotary // 2}] complex numbers "
            f"or [..., {rotary // 2}, 2] cosines and sines for {rotary} rotary dimensions, an even number"
        )
    own = table.shape[:-2]
    if len(own) > len(batch) or own != batch[len(batch) - len(own) :]:
        raise KernelError(
            f"{operation}: turns are for tokens {list(own)}, expected the last dimensions of {list(batch)}"
        )
    return table


def _check(q: Tensor, k_rope: Tensor | None, turns: Tensor) -> Tensor:
    require_dtype("rope", "q", q, DTYPES)
    if k_rope is None:
        rotary = 2 * turns.shape[-1 if turns.is_complex() else -2] if turns.ndim > 1 else 0
    else:
        require_dtype("rope", "k_rope", k_rope, (q.dtype,))
        rotary = k_rope.shape[-1]
        require_shape("rope", "k_rope", k_rope, (*q.shape[:-2], None))
    if rotary > q.shape[-1]:
        raise KernelError(
            f"rope: q has {q.shape[-1]} dimensions a head, expected at least the {rotary} that are turned"
        )
    rows = q.shape[:-1].numel()
    if rows > MOST_ROWS:
        raise KernelError(
            f"rope: q has {rows} rows, expected at most {MOST_ROWS}: take fewer tokens at a time"
        )
    return checked_table("rope", turns, q.shape[:-2], rotary)


def _launch(
    q: Tensor, k: Tensor | None, table: Tensor, out_q: Tensor, out_k: Tensor | None, back: bool,
    settings: Settings | None,
) -> None:  # fmt: skip
    """Turn [N, H, QK] and [N, R]; where the results lie elsewhere, copy what is not turned."""
    tokens, heads, width = q.shape
    rotary = 2 * table.shape[-2]
    table = table.float().contiguous()
    if not tokens * rotary:
        return
    nope, copy = width - rotary, out_q.data_ptr() != q.data_ptr()
    row = settings or tuning.pick("rope", q.device, rows=tokens * heads)
    q_programs, k_programs = (triton.cdiv(n, row["ROWS"]) for n in (tokens * heads, tokens if k is not None else 0))
    if k is None:  # places that no program of the launch looks at
        k, out_k = q, out_q
    with on_device(q):
        rope_kernel[(q_programs + k_programs,)](
            q, k, table, out_q, out_k, tokens, table.shape[:-2].numel(), q_programs,
            q.stride(0), q.stride(1), k.stride(0), out_q.stride(0), out_q.stride(1), out_k.stride(0),
            HEADS=heads, ROTARY=rotary, PAIRS=triton.next_power_of_2(rotary // 2), NOPE=nope,
            COPIED=triton.next_power_of_2(nope) if copy and nope else 0, BACK=back, **row,
        )  # fmt: skip


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k_rope, table, settings):
        ctx.save_for_backward(table)
        ctx.settings = settings
        return _elsewhere(q, k_rope, table, False, settings)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_q, grad_k):
        return *_elsewhere(grad_q, grad_k, *ctx.saved_tensors, True, ctx.settings), None, None


def _elsewhere(
    q: Tensor, k: Tensor | None, table: Tensor, back: bool, settings: Settings | None
) -> tuple[Tensor, Tensor | None]:
    out_q, out_k = q.new_empty(q.shape), None if k is None else k.new_empty(k.shape)
    if q.numel() and table.numel():
        q = q if q.stride(-1) == 1 else q.contiguous()
        k = k if k is None or k.stride(-1) == 1 else k.contiguous()
        flat = [x.reshape(-1, *x.shape[-2:]) for x in (q, out_q)]
        keys = [None if x is None else x.reshape(-1, x.shape[-1]) for x in (k, out_k)]
        _launch(flat[0], keys[0], table, flat[1], keys[1], back, settings)
    elif q.numel():
        out_q.copy_(q)
    return out_q, out_k


@jit
def turn_pairs(x, cosines_sines, BACK: tl.constexpr):
    """[rows, 2 · pairs] turned by as wide a table, whose pairs are a cosine and a sine; FP32."""
    a, b = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    cos, sin = tl.split(tl.reshape(cosines_sines, (x.shape[0], x.shape[1] // 2, 2)))
    if BACK:
        sin = -sin
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), x.shape)


@jit
def rope_kernel(
    q, k, table, out_q, out_k, tokens, period, q_programs,
    stride_qn, stride_qh, stride_kn, stride_out_qn, stride_out_qh, stride_out_kn,
    HEADS: tl.constexpr, ROTARY: tl.constexpr, PAIRS: tl.constexpr, NOPE: tl.constexpr,
    COPIED: tl.constexpr, BACK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS heads of queries a program, as they lie, or ROWS keys. ``period``: after so many tokens turns recur."""
    column = tl.arange(0, 2 * PAIRS)[None, :]
    program = tl.program_id(0)
    if program < q_programs:
        row = program * ROWS + tl.arange(0, ROWS)
        token = row // HEADS
        head = row % HEADS
        within = token < tokens
        source = q + (row_offset(token, stride_qn) + row_offset(head, stride_qh))[:, None]
        target = out_q + (row_offset(token, stride_out_qn) + row_offset(head, stride_out_qh))[:, None]
        if COPIED:
            beside = tl.arange(0, COPIED)[None, :]
            copied = within[:, None] & (beside < NOPE)
            tl.store(target + beside, tl.load(source + beside, mask=copied), mask=copied)  # [ROWS, COPIED]
        source += NOPE
        target += NOPE
    else:
        token = (program - q_programs) * ROWS + tl.arange(0, ROWS)
        within = token < tokens
        source = k + row_offset(token, stride_kn)[:, None]
        target = out_k + row_offset(token, stride_out_kn)[:, None]
    inside = within[:, None] & (column < ROTARY)
    x = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)  # [ROWS, 2 PAIRS]
    # [ROWS, 2 PAIRS]
    turns = tl.load(table + row_offset(token % period, ROTARY)[:, None] + column, mask=inside, other=0.0)
    # [ROWS, 2 PAIRS]
    tl.store(target + column, rounded_to(turn_pairs(x, turns, BACK), out_q.dtype.element_ty), mask=inside)
