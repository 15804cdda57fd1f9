"""Recipes: how a linear layer's three products are made from FP8 operands.

The paper's (``tile``, §3.3): all three products multiply E4M3 by E4M3, inputs and gradients scaled per 1 x 128 tile,
weights per 128 x 128 block. Gradients and weights are quantised both ways from high precision. What the backward pass
needs of the *input* is kept in FP8: with power-of-two scales, so that going back and quantising anew along the tokens
changes no value except one that falls under E4M3's range. After attention it is kept in E5M6, because attention's own
backward reads it too. SwiGLU's output is not kept, its two inputs are, and it is made again.

What is *not* FP8: embedding, head, gates, norms, attention's scores; master weights and their gradients (FP32); the
MTP module's joining projection, as in the released files. Two further recipes are wrong on purpose: one scale for a
whole tensor (``tensor``), and gradients in blocks (``tile+block_gradients``), with which DeepSeek saw a 16B model
diverge.
"""

from __future__ import annotations

import dataclasses
import weakref
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError, KernelError
from ..kernels.quantize.tiles_and_blocks import quantize_tiles
from ..kernels.toolchain.targets import has_fp8
from ..linear import PLAIN, PlainRecipe
from . import products
from .formats import pack_e5m6, unpack_e5m6
from .operands import (
    TILE,
    Groups,
    Operand,
    Scaling,
    along_columns,
    along_rows,
    restored,
    transposed,
    weight_blocks,
)

NAMES = ("none", "tensor", "tile", "tile+block_gradients")
HIGH_PRECISION = ("lm_head", ".gate", ".eh_proj")  # names of modules that stay as they are


class Gradient(NamedTuple):
    """∂L/∂y, quantised once for both products of the backward pass.

    Args:
        rows: [N, O], for the input's gradient. columns: [O, P], tokens filled up, for the weight's.
        groups: the experts' rows, or ``None``. dtype: of ∂L/∂y.
    """

    rows: Operand
    columns: Operand
    groups: Groups | None
    dtype: torch.dtype


@dataclass(frozen=True)
class Recipe(PlainRecipe):
    """What is scaled how, and what is kept for the backward pass.

    Args:
        name: as :meth:`named` knows it.
        inputs, gradients: "tile" (1 x 128), "block" (128 x 128) or "tensor". weights: "block" or "tensor".
        kept: the format of what backward needs of the input, "e4m3" or "e5m6".
        mantissa_bits: of all operands; E4M3 has 3, and fewer is a control that a study of the loss must notice.
    """

    name: str = "tile"
    inputs: Scaling = "tile"
    gradients: Scaling = "tile"
    weights: Scaling = "block"
    kept: str = "e4m3"
    mantissa_bits: int = 3
    _last: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    plain = False
    absorbs = False
    keeps_gate = True

    def __post_init__(self) -> None:
        for name, allowed in (
            ("inputs", ("tile", "block", "tensor")), ("gradients", ("tile", "block", "tensor")),
            ("weights", ("block", "tensor")), ("kept", ("e4m3", "e5m6")), ("mantissa_bits", (0, 1, 2, 3)),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                listed = ", ".join(map(repr, allowed))
                raise ConfigError(f"recipe: {name} is {getattr(self, name)!r}, expected one of {listed}")

    @classmethod
    def named(cls, name: str) -> PlainRecipe:
        """One of the recipes by its name.

        Args:
            name: "none" (plain), "tensor" (one scale a tensor), "tile" (the paper's) or "tile+block_gradients".

        Raises:
            ConfigError: there is none of that name.
        """
        if name == "none":
            return PLAIN
        if name == "tile":
            return cls()
        if name == "tensor":
            return cls(name, inputs="tensor", gradients="tensor", weights="tensor")
        if name == "tile+block_gradients":
            return cls(name, gradients="block")
        raise ConfigError(f"recipe: there is none named {name!r}; there are {', '.join(NAMES)}")

    def coarser(self, mantissa_bits: int) -> Recipe:
        """The same recipe with fewer bits of mantissa."""
        name = f"{self.name}, {mantissa_bits} bits of mantissa"
        return dataclasses.replace(self, name=name, mantissa_bits=mantissa_bits, _last={})

    def at(self, name: str) -> PlainRecipe:
        """The recipe for one place: plain where the paper keeps high precision, E5M6 after attention."""
        if any(name == kept or (kept[0] == "." and name.endswith(kept)) for kept in HIGH_PRECISION):
            return PLAIN
        if name.endswith(".o_proj") and self.inputs == "tile":
            return dataclasses.replace(self, kept="e5m6", _last={})
        return self

    def refuse(self, device: torch.device) -> None:
        """Refuse a device whose units cannot run this recipe.

        Raises:
            KernelError: a GPU without E4M3.
        """
        if device.type == "cuda" and not has_fp8(device):
            raise KernelError(
                f"recipe {self.name!r}: {device} has no FP8 units (compute capability 8.9 or later has); "
                "use the recipe 'none', or a CPU, which computes the same in FP32"
            )

    # ---- the protocol of ``dsv3lib.linear`` ------------------------------------------------------------

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, counts: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Fprop. Kept: the input's FP8 values and scales."""
        operand, kept = self._quantised(x)
        y = self._fprop(operand, weight, counts, x.dtype)
        return (y if bias is None else y + bias), kept

    def forward_gated(
        self, gate: Tensor, up: Tensor, weight: Tensor, counts: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Fprop of silu(gate) ⊙ up. Kept: SwiGLU's two inputs in FP8, from which its output is made again."""
        operand = self._input(torch.nn.functional.silu(gate) * up)
        y = self._fprop(operand, weight, counts, gate.dtype)
        return y, (*self._input(gate), *self._input(up))

    def gradient(self, grad: Tensor, counts: Tensor | None = None) -> Gradient:
        """∂L/∂y quantised along both directions, each from high precision."""
        groups = None if counts is None else Groups.of(counts, len(grad))
        spread = grad if groups is None else groups.spread(grad)
        columns = along_columns(spread, self.gradients, self.mantissa_bits)
        if groups is None or self.gradients == "tile":
            rows = along_rows(grad, self.gradients, self.mantissa_bits)
        else:  # a block belongs to one expert
            filled = along_rows(spread, self.gradients, self.mantissa_bits)
            values = filled.values.view(torch.uint8)[groups.place].view(filled.values.dtype)
            rows = Operand(values, filled.scales[groups.place])
        return Gradient(rows, columns, groups, grad.dtype)

    def input_gradient(
        self, grad: Gradient, weight: Tensor, kept: tuple[Tensor, ...], counts: Tensor | None = None
    ) -> Tensor:
        """Dgrad; of a gated product, the gradient of SwiGLU's output."""
        weight_t = transposed(weight_blocks(weight, self.weights, self.mantissa_bits))
        if counts is None:
            return products.dgrad(grad.rows, weight_t, grad.dtype)
        return products.grouped_dgrad(grad.rows, weight_t, counts, grad.dtype)

    def gate_gradients(self, grad_hidden: Tensor, kept: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """SwiGLU's backward from its cached inputs: gradients of gate and up."""
        gate, up = (restored(x, grad_hidden.dtype) for x in _gate_and_up(kept))
        open_gate = torch.nn.functional.silu(gate)
        return torch.ops.aten.silu_backward(grad_hidden * up, gate), grad_hidden * open_gate

    def weight_gradient(
        self, grad: Gradient, kept: tuple[Tensor, ...], weight: Tensor, counts: Tensor | None = None
    ) -> Tensor:
        """Wgrad, from the cached input turned to tiles along the tokens."""
        x = self._made_again(kept)[:, : weight.shape[-1]]
        x = x if grad.groups is None else grad.groups.spread(x)
        columns = along_columns(x, self.inputs, self.mantissa_bits, power_of_two=self.inputs == "tile")
        if counts is None:
            return products.wgrad(grad.columns, columns, weight.dtype)
        return products.grouped_wgrad(grad.columns, columns, grad.groups, weight.dtype)

    # ---- parts ------------------------------------------------------------------------------------------

    def _fprop(self, x: Operand, weight: Tensor, counts: Tensor | None, dtype: torch.dtype) -> Tensor:
        blocks = weight_blocks(weight, self.weights, self.mantissa_bits)
        if counts is None:
            return products.fprop(x, blocks, dtype)
        return products.grouped_fprop(x, blocks, counts, dtype)

    def _input(self, x: Tensor) -> Operand:
        return along_rows(x, self.inputs, self.mantissa_bits, power_of_two=self.inputs == "tile")

    def _quantised(self, x: Tensor) -> tuple[Operand, tuple[Tensor, ...]]:
        """The forward's operand, and what is kept: the same, or E5M6. Two layers on one input share both."""
        of = x._base if x._is_view() else x
        key = (x.data_ptr(), x._version, x.shape, x.dtype) if not x.is_inference() else None
        if key is not None and self._last.get("key") == key and self._last["of"]() is of:
            return self._last["made"]
        operand = self._input(x)
        kept: tuple[Tensor, ...] = tuple(operand)
        if self.kept == "e5m6":
            wide = torch.nn.functional.pad(x, (0, -x.shape[1] % TILE))
            values, scales = quantize_tiles(wide, power_of_two=True, format="e5m6")
            width = x.shape[1] + x.shape[1] % 2
            kept = (pack_e5m6(values[:, :width].contiguous()), scales)
        if key is not None:
            self._last.update(key=key, of=weakref.ref(of), made=(operand, kept))
        return operand, kept

    def _made_again(self, kept: tuple[Tensor, ...]) -> Tensor:
        """The layer's input in FP32, from what was kept of it."""
        if len(kept) == 4:
            gate, up = (restored(x) for x in _gate_and_up(kept))
            return torch.nn.functional.silu(gate) * up
        values, scales = kept
        if values.dtype == torch.uint8:
            values = unpack_e5m6(values)
        return restored(Operand(values, scales))


def _gate_and_up(kept: tuple[Tensor, ...]) -> tuple[Operand, Operand]:
    return Operand(*kept[:2]), Operand(*kept[2:])
