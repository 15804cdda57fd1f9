"""The model cut into pipeline stages: parameters, operations, activations and traffic of each, from its own counts.

Parameters are counted on the meta device, where tensors have shapes and no memory; operations come from
:mod:`dsv3lib.model.costs`; what a layer keeps for its backward pass is written down here, tensor by tensor.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import torch

from ..checks import require, require_integer
from ..config import ModelConfig
from ..model import DeepSeekV3
from ..model.costs import forward_flops
from ..numerics import TILE
from .cut import least_largest


@dataclass(frozen=True)
class Layer:
    """One block, or what stands at an end of the model.

    Args:
        name: for people. experts: parameters of its routed experts. others: all its other parameters.
        flops: forward operations for one token. kept, recomputed: bytes per token that its backward pass needs, with
            everything kept in BF16, and as the paper keeps them. mixture: whether it has routed experts.
    """

    name: str
    experts: int = 0
    others: int = 0
    flops: float = 0.0
    kept: float = 0.0
    recomputed: float = 0.0
    mixture: bool = False


def activation_bytes(config: ModelConfig, mixture: bool) -> tuple[float, float]:
    """Bytes per token that one block keeps for its backward pass.

    Everything kept (BF16): inputs of norms and of products, queries, keys, values, each network's three inner
    tensors, each routed copy and each expert's answer. As the paper keeps them (§3.2.3, §3.3.3): RMSNorm outputs,
    MLA's up-projections and SwiGLU's output are made again; inputs of products lie in FP8 (the one behind the attention
    in 12 bits). *Differs from the paper*: it does not say what becomes of the experts' answers; here the gate value
    multiplies before the down-projection, so that they need not be kept.

    Args:
        config: sizes. mixture: of experts, or dense.

    Returns:
        (everything kept, as the paper keeps it).
    """
    d, heads, k = config.hidden_size, config.num_attention_heads, config.num_experts_per_tok
    latents = config.latent_dim + (config.q_lora_rank or 0)
    attended = heads * config.v_head_dim
    queries_and_keys = 2 * heads * config.qk_head_dim
    inner = config.n_shared_experts * config.moe_intermediate_size if mixture else config.intermediate_size
    normed = d + (config.q_lora_rank or 0) + config.kv_lora_rank + d
    fp8 = 1 + 4 / TILE
    softmax = 4 * heads  # its logarithm of sums, FP32
    kept = 2 * (2 * d + latents + normed + queries_and_keys + 2 * attended + 3 * inner) + softmax
    small = 2 * (2 * d + latents) + 1.5 * attended + fp8 * 2 * inner + softmax
    if mixture:
        scores = 4 * config.n_routed_experts
        kept += 2 * k * (2 * d + 3 * config.moe_intermediate_size) + scores
        small += fp8 * k * (d + 2 * config.moe_intermediate_size) + scores
    return float(kept), float(small)


@functools.lru_cache
def layers_of(config: ModelConfig, sequence: int = 4096) -> tuple[Layer, ...]:
    """The model's blocks in order: embedding, blocks, head, MTP modules.

    Args:
        config: sizes. sequence: tokens of a training sequence; a token attends to half of them on average.
    """
    with torch.device("meta"):
        model = DeepSeekV3(config)
    n = config.num_hidden_layers
    experts, others = [0] * (n + config.num_nextn_predict_layers), [0] * (n + config.num_nextn_predict_layers)
    for name, tensor in model.named_parameters():
        if found := re.search(r"\blayers\.(\d+)\.", name):
            routed = ".mlp.experts." in name
            (experts if routed else others)[int(found[1])] += tensor.numel()
    by_part = forward_flops(config, max(sequence // 2, 1))
    attention = (by_part["attention"] + by_part["attention_core"]) / n
    mixtures = max(n - config.first_k_dense_replace, 1)
    routed = (by_part["shared_experts"] + by_part["routed_experts"] + by_part["router"]) / mixtures
    dense = by_part["dense"] / max(config.first_k_dense_replace, 1)
    vocabulary, head = config.vocab_size * config.hidden_size, float(by_part["head"])
    found = [Layer("embedding", others=vocabulary)]
    for i, (of_experts, rest) in enumerate(zip(experts, others, strict=True)):
        mixture = i >= config.first_k_dense_replace
        if i == n:
            found.append(Layer("head", others=vocabulary, flops=head))
        flops = attention + (routed if mixture else dense)
        if i >= n:  # an MTP module: its projection of two vectors to one, and the shared head once more
            flops += 4 * config.hidden_size**2 + head
        name = f"MTP {i - n + 1}" if i >= n else f"block {i}"
        found.append(Layer(name, of_experts, rest, flops, *activation_bytes(config, mixture), mixture))
    if len(others) == n:
        found.append(Layer("head", others=vocabulary, flops=head))
    return tuple(found)


def partition(layers: tuple[Layer, ...], stages: int) -> list[tuple[Layer, ...]]:
    """Cut the layers into consecutive stages so that the slowest has as few operations as can be.

    Args:
        layers: in order. stages: how many; none is empty.

    Raises:
        ConfigError: there are fewer layers with work than stages.
    """
    require_integer("stages", stages, 1)
    working = sum(layer.flops > 0 for layer in layers)
    require(stages <= working, "stages", stages, f"at most the {working} layers that compute")
    most = least_largest([layer.flops for layer in layers], stages)
    cut = _fill(layers, most)
    while len(cut) < stages:  # greedy filling may leave stages over: halve the longest
        longest = max(range(len(cut)), key=lambda i: sum(layer.flops > 0 for layer in cut[i]))
        half = len(cut[longest]) // 2 or 1
        cut[longest : longest + 1] = [cut[longest][:half], cut[longest][half:]]
    return cut


def _fill(layers: tuple[Layer, ...], most: float) -> list[tuple[Layer, ...]]:
    """Consecutive stages, each as full as ``most`` operations allow."""
    cut: list[list[Layer]] = [[]]
    load = 0.0
    for layer in layers:
        if load + layer.flops > most * (1 + 1e-12) and cut[-1]:
            cut.append([])
            load = 0.0
        cut[-1].append(layer)
        load += layer.flops
    return [tuple(stage) for stage in cut]


def all_to_all_bytes(config: ModelConfig, ranks: int, node: int = 8) -> tuple[float, float]:
    """Bytes that one token sends through one mixture layer and back, one pass, at most: (between nodes, inside one).

    Dispatch in FP8 with a scale for 128 values, combine in BF16; over InfiniBand once to each node, from there over
    NVLink once to each GPU (§3.2.2). As the paper reckons, none of its experts is at home.

    Args:
        config: sizes. ranks: GPUs over which a layer's experts are spread (EP). node: GPUs in a node.
    """
    copy = config.hidden_size * (1 + 4 / TILE + 2)
    nodes = max(1, ranks // node)
    # A token uses at most topk_group of the n_group groups; a group lies on one node or on several.
    reached = min(config.num_experts_per_tok, nodes, config.topk_group * max(1, -(-nodes // config.n_group)))
    gpus = min(config.num_experts_per_tok, ranks) if ranks > 1 else 0
    return (copy * reached if nodes > 1 else 0.0), copy * gpus
