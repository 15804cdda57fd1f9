"""A backend that was chosen for one call: which modules its fast forms may stand for, and which are called."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..kernels.attention.latent_format import dequantize_latent, quantize_latent
from ..layers.cache import LatentCodec
from ..layers.operations import Operations

NOTHING: frozenset[nn.Module] = frozenset()


class Chosen(Operations):
    """Operations of one backend over one model as it was found.

    Args:
        touched: modules that somebody replaced, wrapped, patched or hooked: they are called.
        aside: these, and those with a recipe or a child for which a fast form would pass them by.

    Attributes:
        dtypes: what its fast forms take.
        replaces: the classes that it has a fast form for, and which.
        attention: who computes attention over keys and values, and how.
        decoding: the same in the latent space.
    """

    latent_codec = LatentCodec(quantize_latent, dequantize_latent)
    dtypes: ClassVar[tuple[torch.dtype, ...]] = ()
    replaces: ClassVar[Mapping[type[nn.Module], str]] = MappingProxyType({})
    attention: ClassVar[tuple[str, str]] = ("plain", "torch's scaled_dot_product_attention")
    decoding: ClassVar[tuple[str, str]] = ("plain", "two matrix products with the cached latents")

    def __init__(
        self, touched: Collection[nn.Module] = NOTHING, aside: Collection[nn.Module] = NOTHING
    ) -> None:
        self.touched, self.aside = frozenset(touched), frozenset(aside)

    def intact(self, module: nn.Module, kind: type[nn.Module]) -> bool:
        """Whether a module is exactly of its class, as it was found when the call began."""
        return type(module) is kind and module not in self.touched

    def stands_for(self, module: nn.Module, x: Tensor) -> bool:
        """Whether a fast form may take a module's place for this input."""
        return module not in self.aside and x.dtype in self.dtypes

    def takes(self, kind: type[nn.Module], x: Tensor) -> bool:
        """Whether the fast form of a class takes inputs of this dtype."""
        return x.dtype in self.dtypes
