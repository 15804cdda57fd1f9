"""A model's weights as NumPy arrays, for ``one_token``: the same memory, seen by the library that starts work quicker.

A slice of a torch tensor costs 0.7 µs, of an array 0.1 µs. And weights that no cache holds are read at the
memory's pace only from one end to the other: ``np.vecdot``, row after row, ran at 24 GB/s, where the
matrix-vector products, which take several rows at once, ran at 11 in NumPy's BLAS and at 8 in torch's
(measured on an AMD EPYC). Views are made once and used as long as every weight is where it was.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from ..config import ModelConfig
from .experts import MixtureOfExperts

Array = np.ndarray


@dataclass(slots=True)
class Linear:
    """A linear layer: W [O, I] and its bias [O], or ``None``."""

    weight: Array
    bias: Array | None

    def __call__(self, x: Array) -> Array:
        """W x + b."""
        y = np.vecdot(self.weight, x)
        return y if self.bias is None else y + self.bias


@dataclass(slots=True)
class MLPWeights:
    """SwiGLU's three matrices: gate and up [F, D], down [D, F]."""

    gate: Array
    up: Array
    down: Array


@dataclass(slots=True)
class MixtureWeights:
    """The gate's centroids [E, D] and bias [E], the shared expert, each routed expert's two matrices."""

    gate: Array
    bias: Array
    shared: MLPWeights
    gate_up: list[Array]  # [2F, D] each
    down: list[Array]  # [D, F] each


@dataclass(slots=True)
class BlockWeights:
    """One block; ``q_a`` and ``q_norm`` are ``None`` in a model whose queries have no latent."""

    norm_1: Array
    q_a: Linear | None
    q_norm: Array | None
    q: Array  # [H (K + R), rank or D]
    kv_a: Linear
    kv_norm: Array
    w_uk: Array  # [H, K, C]
    w_uv: Array  # [H, V, C]
    o: Linear
    norm_2: Array
    ffn: MLPWeights | MixtureWeights


class TokenWeights:
    """All weights that a token meets behind its embedding.

    Args:
        config: sizes. decoder: the model's ``Decoder``. head: its ``lm_head``.
    """

    def __init__(self, config: ModelConfig, decoder: nn.Module, head: nn.Module) -> None:
        self.roots = (decoder, head)
        self._children: list[tuple[dict, str]] = []  # where each layer was found, and which it was
        self._layers: list[nn.Module] = []
        self._tensors: list[tuple[dict, str]] = []  # where each weight was found, and its address
        self._addresses: list[int] = []
        self._config = config
        layers = self._child(decoder, "layers")
        self.blocks = [self._block(self._child(layers, str(i))) for i in range(config.num_hidden_layers)]
        self.norm = self._array(self._child(decoder, "norm"))
        self.head = self._array(head)

    def stand(self, decoder: nn.Module, head: nn.Module) -> bool:
        """Whether every weight is still where it was: none moved, cast or replaced, and no layer either."""
        return (
            self.roots == (decoder, head)
            and [children.get(name) for children, name in self._children] == self._layers
            and [tensors[name].data_ptr() for tensors, name in self._tensors] == self._addresses
        )

    def _child(self, module: nn.Module, name: str) -> nn.Module:
        child = module._modules[name]
        self._children.append((module._modules, name))
        self._layers.append(child)
        return child

    def _array(self, module: nn.Module, name: str = "weight") -> Array:
        tensors = module._buffers if name in module._buffers else module._parameters
        self._tensors.append((tensors, name))
        self._addresses.append(tensors[name].data_ptr())
        return tensors[name].detach().numpy()

    def _linear(self, module: nn.Module) -> Linear:
        return Linear(self._array(module), None if module.bias is None else self._array(module, "bias"))

    def _block(self, block: nn.Module) -> BlockWeights:
        cfg, attention = self._config, self._child(block, "self_attn")
        kv_b = self._array(self._child(attention, "kv_b_proj"))
        kv_b = kv_b.reshape(cfg.num_attention_heads, -1, cfg.kv_lora_rank)
        direct = cfg.q_lora_rank is None
        return BlockWeights(
            norm_1=self._array(self._child(block, "input_layernorm")),
            q_a=None if direct else self._linear(self._child(attention, "q_a_proj")),
            q_norm=None if direct else self._array(self._child(attention, "q_a_layernorm")),
            q=self._array(self._child(attention, "q_proj" if direct else "q_b_proj")),
            kv_a=self._linear(self._child(attention, "kv_a_proj_with_mqa")),
            kv_norm=self._array(self._child(attention, "kv_a_layernorm")),
            w_uk=kv_b[:, : cfg.qk_nope_head_dim],
            w_uv=kv_b[:, cfg.qk_nope_head_dim :],
            o=self._linear(self._child(attention, "o_proj")),
            norm_2=self._array(self._child(block, "post_attention_layernorm")),
            ffn=self._ffn(self._child(block, "mlp")),
        )

    def _ffn(self, ffn: nn.Module) -> MLPWeights | MixtureWeights:
        if not isinstance(ffn, MixtureOfExperts):
            return self._mlp(ffn)
        gate, experts = self._child(ffn, "gate"), self._child(ffn, "experts")
        return MixtureWeights(
            gate=self._array(gate),
            bias=self._array(gate, "e_score_correction_bias"),
            shared=self._mlp(self._child(ffn, "shared_experts")),
            gate_up=list(self._array(experts, "gate_up_proj")),
            down=list(self._array(experts, "down_proj")),
        )

    def _mlp(self, mlp: nn.Module) -> MLPWeights:
        return MLPWeights(*(self._array(self._child(mlp, f"{n}_proj")) for n in ("gate", "up", "down")))
