"""A model's weights as NumPy arrays, for ``few_tokens``: the same memory, seen by the library that starts work quicker.

A slice of a torch tensor costs 0.7 µs, of an array 0.1 µs. And weights that no cache holds are read at the
memory's pace only from one end to the other: ``np.vecdot``, row after row, ran at 24 GB/s, where the
matrix-vector products, which take several rows at once, ran at 11 in NumPy's BLAS and at 8 in torch's
(measured on an AMD EPYC). ``choice`` makes the views anew when a weight is no longer where it was.

NumPy has no BF16, and a CPU's products in 16 bits are slow. Weights in 16 bits are copied to FP32 (``weight_copies``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from ..config import ModelConfig
from ..layers.block import Block
from ..layers.decoder import Decoder
from ..layers.experts import MLP, MixtureOfExperts
from ..layers.mtp import MTPModule
from ..linear import Linear
from .weight_copies import Array, WeightReader

ROW_BY_ROW = 4  # tokens: for more, one matrix product is quicker than dot products of each
BLOCK_BY_BLOCK = 16  # likewise, where the first token's dot products bring a block of weights into the cache
SMALL_WEIGHT = 2**15  # of a cache's size: one product of the tokens is quicker than dot products
NARROW, NARROW_WEIGHT = 64, 9216  # a row's width, and values: to begin each dot product would be most of it
BLOCK_WEIGHT = 2**17  # values at a time, which stay in a core's cache
# OpenBLAS multiplies so few results where the operands lie, with AVX-512 alone; otherwise it copies them first.
SMALL_RESULT = 1200
IN_PLACE = torch.backends.cpu.get_cpu_capability() == "AVX512"
ASLEEP = 2**24  # multiplications, up to which other threads are not woken
ONE_THREAD = 2**18  # multiplications, up to which NumPy's BLAS (OpenBLAS) makes a matrix product in one thread


def matmul(a: Array, b: Array, out: Array) -> Array:
    """a b, by NumPy where that is small, else by torch.

    OpenBLAS wakes threads of its own for a larger product, and waits for each of them: with other programs on the
    machine, which hold such a thread up, a prompt of 16 tokens was seen to take three seconds. torch's threads are
    those that ``torch.set_num_threads`` allows, and they sleep as they wait (``openmp``): to wake them costs more than
    they save of a product that is not large, so such a one is torch's too, but in one thread.

    Args:
        a: [..., N, I].
        b: [..., I, O].
        out: where to, [..., N, O].
    """
    if a.shape[-2] * a.shape[-1] * b.shape[-1] <= ONE_THREAD:
        return np.matmul(a, b, out)
    with asleep(out.size * a.shape[-1]):
        torch.matmul(torch.from_numpy(a), torch.from_numpy(b), out=torch.from_numpy(out))
    return out


@contextmanager
def asleep(multiplications: int) -> Iterator[None]:
    """Let torch's other threads sleep while it does little.

    Args:
        multiplications: of each operation, at most.
    """
    threads = torch.get_num_threads()
    alone = threads > 1 and multiplications <= ASLEEP
    if alone:
        torch.set_num_threads(1)  # of the calling thread; takes a tenth of a microsecond
    try:
        yield
    finally:
        if alone:
            torch.set_num_threads(threads)


def product(weight: Array, x: Array, out: Array | None = None) -> Array:
    """x Wᵀ, the weights read once.

    A small weight lies in a cache, and takes one product. A larger one comes from memory, at its full pace only in dot
    products row after row: for one or two tokens that is all; for more, the first token's bring a block into the cache,
    where the others meet it in one product.

    Args:
        weight: W, [O, I].
        x: tokens, [T, I].
        out: where to, [T, O]; by default a new array.
    """
    n_new = len(x)
    if out is None:
        out = np.empty((n_new, len(weight)), x.dtype)
    if n_new == 1:
        row_product(weight, x[0], out[0])
        return out
    if weight.size <= SMALL_WEIGHT and n_new * weight.size <= ONE_THREAD and n_new <= BLOCK_BY_BLOCK:
        return np.dot(x, weight.T, out)
    if 2 < n_new <= BLOCK_BY_BLOCK and IN_PLACE:
        return _by_block(weight, x, out)
    if n_new > ROW_BY_ROW:
        return matmul(x, weight.T, out)
    np.vecdot(weight[:, None], x, out.T)
    return out


def row_product(weight: Array, x: Array, out: Array) -> Array:
    """W x of a single token.

    Args:
        weight: W, [O, I].
        x: the token, [I].
        out: where to, [O].
    """
    if weight.shape[1] <= NARROW and weight.size <= NARROW_WEIGHT:
        return np.dot(weight, x, out)
    return np.vecdot(weight, x, out)  # a matrix-vector product would wake threads


def _by_block(weight: Array, x: Array, out: Array) -> Array:
    """As ``product``, several rows of the weight after the other; the tokens behind the first meet them in a cache."""
    first, further = x[0], x[1:]
    each = min(BLOCK_WEIGHT, ONE_THREAD // len(further)) // weight.shape[1]
    each = max(1, min(each, SMALL_RESULT // len(further)))
    for start in range(0, len(weight), each):
        rows = slice(start, start + each)
        block = weight[rows]
        np.vecdot(block, first, out[0, rows])
        np.matmul(further, block.T, out[1:, rows])
    return out


@dataclass(slots=True)
class LinearWeights:
    """A linear layer: W [O, I] and its bias [O], or ``None``."""

    weight: Array
    bias: Array | None

    def __call__(self, x: Array) -> Array:
        """x Wᵀ + b of tokens [T, I]."""
        y = product(self.weight, x)
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

    layer: int  # of its latents in the cache
    norm_1: Array
    q_a: LinearWeights | None
    q_norm: Array | None
    q: Array  # [H (K + R), rank or D]
    kv_a: LinearWeights
    kv_norm: Array
    w_uk: Array  # [H, K, C]
    w_uv: Array  # [H, V, C]
    o: LinearWeights
    norm_2: Array
    ffn: MLPWeights | MixtureWeights


@dataclass(slots=True)
class ModelWeights:
    """All weights that tokens meet behind their embedding."""

    blocks: list[BlockWeights]
    norm: Array
    head: Array

    @classmethod
    def of(cls, config: ModelConfig, decoder: Decoder, head: Linear, read: WeightReader) -> ModelWeights:
        """Of modules that nobody touched.

        Args:
            config: sizes.
            decoder: the model's.
            head: its ``lm_head``.
            read: gives a weight as an array.
        """
        blocks = [_block(config, block, read) for block in decoder.layers[: config.num_hidden_layers]]
        return cls(blocks, read(decoder.norm.weight), read(head.weight))


@dataclass(slots=True)
class ChainWeights:
    """An MTP module's: both norms and M [D, 2D] before its block, and the norm behind it."""

    enorm: Array
    hnorm: Array
    eh: Array
    block: BlockWeights
    norm: Array

    @classmethod
    def of(cls, config: ModelConfig, module: MTPModule, read: WeightReader) -> ChainWeights:
        """Of a module that nobody touched; the arguments as for ``ModelWeights.of``."""
        before = (read(m.weight) for m in (module.enorm, module.hnorm, module.eh_proj))
        return cls(*before, _block(config, module, read), read(module.shared_head.norm.weight))


def _block(config: ModelConfig, block: Block, read: WeightReader) -> BlockWeights:
    attention, direct = block.self_attn, config.q_lora_rank is None
    kv_b = read(attention.kv_b_proj.weight).reshape(config.num_attention_heads, -1, config.kv_lora_rank)
    return BlockWeights(
        layer=attention.layer,
        norm_1=read(block.input_layernorm.weight),
        q_a=None if direct else _linear(attention.q_a_proj, read),
        q_norm=None if direct else read(attention.q_a_layernorm.weight),
        q=read((attention.q_proj if direct else attention.q_b_proj).weight),
        kv_a=_linear(attention.kv_a_proj_with_mqa, read),
        kv_norm=read(attention.kv_a_layernorm.weight),
        w_uk=kv_b[:, : config.qk_nope_head_dim],
        w_uv=kv_b[:, config.qk_nope_head_dim :],
        o=_linear(attention.o_proj, read),
        norm_2=read(block.post_attention_layernorm.weight),
        ffn=_mlp(block.mlp, read) if isinstance(block.mlp, MLP) else _mixture(block.mlp, read),
    )


def _mixture(moe: MixtureOfExperts, read: WeightReader) -> MixtureWeights:
    return MixtureWeights(
        gate=read(moe.gate.weight),
        bias=read(moe.gate.e_score_correction_bias),
        shared=_mlp(moe.shared_experts, read),
        gate_up=list(read(moe.experts.gate_up_proj)),
        down=list(read(moe.experts.down_proj)),
    )


def _mlp(mlp: MLP, read: WeightReader) -> MLPWeights:
    return MLPWeights(*(read(m.weight) for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)))


def _linear(module: Linear, read: WeightReader) -> LinearWeights:
    return LinearWeights(read(module.weight), None if module.bias is None else read(module.bias))
