"""Weights that stay in FP8: a model that runs from a released checkpoint's E4M3 values and scales as they lie.

A byte a weight instead of two, and nothing is dequantised but what cannot be multiplied in blocks: ``kv_b_proj`` is
held in high precision, because absorbed decoding takes it apart by heads, as the released inference code does. The
inputs are quantised per 1 x 128 tile on their way, so that every product is FP8 by FP8. For inference: no gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import InputError
from ..layers.experts import Experts
from ..linear import Linear
from . import products
from .operands import TILE, Operand, along_rows

E4M3 = torch.float8_e4m3fn
HELD_HIGH = (
    "kv_b_proj",
    "eh_proj",
    "lm_head",
    "gate",
)  # last part of the name of what stays in high precision


class StoredLinear(Linear):
    """A linear layer whose weight is E4M3 with a scale per 128 x 128 block.

    Attributes:
        weight: E4M3 [O, I]. weight_scale_inv: FP32 [ceil(O/128), ceil(I/128)]; multiplied by, despite its name.
    """

    def __init__(self, of: nn.Linear) -> None:
        super().__init__(of.in_features, of.out_features, bias=of.bias is not None, device="meta")
        self.bias = of.bias
        self.weight = _empty(of.weight)
        self.register_buffer("weight_scale_inv", _scales(of.weight))

    def forward(self, x: Float[Tensor, "*N I"]) -> Float[Tensor, "*N O"]:
        """x Wᵀ + b, with x quantised in tiles."""
        _refuse_gradient(x)
        rows = along_rows(x.reshape(-1, x.shape[-1]))
        y = products.fprop(rows, Operand(self.weight.detach(), self.weight_scale_inv), x.dtype)
        y = y if self.bias is None else y + self.bias
        return y.unflatten(0, x.shape[:-1])

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "O I"]:
        """The weight that the products see."""
        return _dequantized(self.weight.detach(), self.weight_scale_inv, dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        return _move(self, fn, ("weight",), ("weight_scale_inv",))


class StoredExperts(Experts):
    """Experts whose stacked weights are E4M3; gate and up projection have scales of their own.

    Attributes:
        gate_up_proj: E4M3 [E, 2F, D], down_proj: E4M3 [E, D, F].
        gate_up_proj_scale_inv: FP32 [E, 2 ceil(F/128), ceil(D/128)], gate's blocks first. down_proj_scale_inv: FP32.
    """

    def __init__(self, of: Experts) -> None:
        nn.Module.__init__(self)
        n, both, width = of.gate_up_proj.shape
        half = torch.empty(both // 2, width, device=of.gate_up_proj.device)
        self.gate_up_proj, self.down_proj = _empty(of.gate_up_proj), _empty(of.down_proj)
        scales = _scales(half)
        self.register_buffer(
            "gate_up_proj_scale_inv", scales.new_empty(n, 2 * scales.shape[0], scales.shape[1])
        )
        down = _scales(of.down_proj[0])
        self.register_buffer("down_proj_scale_inv", down.new_empty(n, *down.shape))

    def answer(self, rows: Float[Tensor, "NA D"], counts: Int[Tensor, " E"]) -> Float[Tensor, "NA D"]:
        """Each expert's network over its own rows, three FP8 products."""
        _refuse_gradient(rows)
        width, blocks = self.down_proj.shape[2], self.gate_up_proj_scale_inv.shape[1] // 2
        x, weight, scales = along_rows(rows), self.gate_up_proj.detach(), self.gate_up_proj_scale_inv
        if width % TILE == 0:
            both = products.grouped_fprop(x, Operand(weight, scales), counts, rows.dtype)
            gate, up = both.chunk(2, -1)
        else:  # gate's last block is cut short, and up's first does not begin on its border
            gate, up = (
                products.grouped_fprop(x, Operand(w.contiguous(), s), counts, rows.dtype)
                for w, s in (
                    (weight[:, :width], scales[:, :blocks]),
                    (weight[:, width:], scales[:, blocks:]),
                )
            )
        hidden = along_rows(torch.nn.functional.silu(gate) * up)
        down = Operand(self.down_proj.detach(), self.down_proj_scale_inv)
        return products.grouped_fprop(hidden, down, counts, rows.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        weights = ("gate_up_proj", "down_proj")
        return _move(self, fn, weights, tuple(f"{name}_scale_inv" for name in weights))


def keep_in_fp8(model: nn.Module) -> nn.Module:
    """Replace the linear layers and experts that released files hold in FP8 by ones that store it; values are empty.

    Args:
        model: changed in place; usually on the meta device, before a checkpoint is read into it.
    """
    for name, module in list(model.named_modules()):
        parent, _, last = name.rpartition(".")
        if isinstance(module, Experts):
            setattr(model.get_submodule(parent), last, StoredExperts(module))
        elif isinstance(module, Linear) and last.endswith(("_proj", "_with_mqa")) and last not in HELD_HIGH:
            setattr(model.get_submodule(parent), last, StoredLinear(module))
    return model


def is_stored(model: nn.Module) -> bool:
    """Whether some weights of a model are kept in FP8."""
    return any(isinstance(m, (StoredLinear, StoredExperts)) for m in model.modules())


def _empty(like: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.empty(like.shape, dtype=E4M3, device=like.device), requires_grad=False)


def _scales(of: Tensor) -> Tensor:
    return torch.empty(
        -(-of.shape[0] // TILE), -(-of.shape[1] // TILE), device=of.device, dtype=torch.float32
    )


def _dequantized(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    spread = scales.repeat_interleave(TILE, -2)[..., : values.shape[-2], :]
    spread = spread.repeat_interleave(TILE, -1)[..., : values.shape[-1]]
    return (values.float() * spread).to(dtype)


def _refuse_gradient(x: Tensor) -> None:
    if torch.is_grad_enabled() and x.requires_grad:
        raise InputError(
            "this model's weights are stored in FP8, for inference alone; call it under torch.no_grad(), or load the "
            "checkpoint with another dtype to train it"
        )


def _move(
    module: nn.Module, fn: Callable[[Tensor], Tensor], weights: tuple[str, ...], scales: tuple[str, ...]
) -> nn.Module:
    """Move a module; a cast (``model.bfloat16()``) leaves FP8 values and their FP32 scales as they are."""
    for name in (*weights, *scales):
        old = getattr(module, name)
        device = fn(torch.empty(0, device=old.device)).device
        moved = (
            torch.empty_like(old, device=device) if old.is_meta and device.type != "meta" else old.to(device)
        )
        if name in weights:
            setattr(module, name, nn.Parameter(moved.detach(), requires_grad=False))
        else:
            module.register_buffer(name, moved)
    if getattr(module, "bias", None) is not None:
        module.bias = nn.Parameter(fn(module.bias.detach()), requires_grad=module.bias.requires_grad)
    return module
