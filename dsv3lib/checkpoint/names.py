"""Names of stored tensors, and where each lives in the model.

The released layout is one tensor per expert, and MTP modules as layers ``num_hidden_layers`` onwards with their
own stored copies of embedding and head. In memory a layer's routed experts are stacked in two tensors, and
neighbouring rotary dimensions are always pairs. All that differs is settled here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..config import ModelConfig
from .block_scales import SCALE_SUFFIX

if TYPE_CHECKING:
    from ..model import DeepSeekV3

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_OF_MTP_ALONE = ("eh_proj.", "enorm.", "hnorm.", "shared_head.")


class Entry(NamedTuple):
    """Where a stored tensor lives in the model.

    Args:
        name: as stored.
        target: the parameter or buffer.
        at: which part of it (an expert, gate or up rows).
    """

    name: str
    target: str
    at: tuple[Any, ...] = ()


def entries(model: DeepSeekV3) -> Iterator[Entry]:
    """Every tensor of the checkpoint and its place in the model, in the model's order.

    Args:
        model: on any device, ``meta`` too.
    """
    width, state = model.config.moe_intermediate_size, model.state_dict()

    def held(stack: str) -> Iterator[tuple[int, int]]:
        """Places in a stack of experts, and which of the layer's they are: a rank may hold its share alone."""
        first = getattr(model.get_submodule(stack.rpartition(".")[0]), "first", 0)
        return enumerate(range(first, first + len(state[stack])))

    for name in state:
        if name.endswith("experts.gate_up_proj"):
            for at, j in held(name):
                stem = name.removesuffix("gate_up_proj") + str(j)
                yield Entry(f"{stem}.gate_proj.weight", name, (at, slice(0, width)))
                yield Entry(f"{stem}.up_proj.weight", name, (at, slice(width, 2 * width)))
        elif name.endswith("experts.down_proj"):
            for at, j in held(name):
                yield Entry(f"{name.removesuffix('down_proj')}{j}.down_proj.weight", name, (at,))
        elif name.endswith(SCALE_SUFFIX):
            continue  # of a weight that is kept in FP8: it is read and written with its values
        elif not (name == "lm_head.weight" and model.config.tie_word_embeddings):
            yield Entry(name, name)


def scale_of(entry: Entry, state: dict[str, Tensor]) -> Tensor:
    """Where a model that keeps its weights in FP8 holds the scales of a stored tensor: a view.

    Args:
        entry: of a weight. state: the model's ``state_dict``.
    """
    scales = state[entry.target + SCALE_SUFFIX]
    if len(entry.at) < 2:
        return scales[entry.at]
    expert, rows = entry.at
    half = scales.shape[1] // 2  # gate's blocks, then up's
    return scales[expert, half:] if rows.start else scales[expert, :half]


def copies(config: ModelConfig) -> Iterator[Entry]:
    """The MTP modules' stored copies of embedding and head; in the model they are the main ones."""
    for layer in range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers):
        yield Entry(f"model.layers.{layer}.embed_tokens.weight", "model.embed_tokens.weight")
        yield Entry(f"model.layers.{layer}.shared_head.head.weight", "lm_head.weight")


def mtp_layers(names: list[str], config: ModelConfig) -> list[int]:
    """Layers behind the main ones that are MTP modules by their tensors, in order.

    Args:
        names: all that a checkpoint holds.
        config: ``num_hidden_layers`` is taken from it; how many modules it promises is not asked.
    """
    found = set()
    for name in names:
        layer, rest = split_layer(name)
        if layer is not None and layer >= config.num_hidden_layers and rest.startswith(_OF_MTP_ALONE):
            found.add(layer)
    return sorted(found)


def split_layer(name: str) -> tuple[int | None, str]:
    """(3, "mlp.gate.weight") of "model.layers.3.mlp.gate.weight"; no number for what is in no layer."""
    match = _LAYER.fullmatch(name)
    return (int(match[1]), match[2]) if match else (None, name)


def reorder_rope(
    config: ModelConfig, name: str, tensor: Float[Tensor, "*rows"], to_halves: bool
) -> Float[Tensor, "*rows"]:
    """Rotary output rows between neighbours-are-pairs (the model) and two halves (``rope_interleave`` false).

    Args:
        config: sizes.
        name: of the tensor; one without rotary rows is returned as it is.
        tensor: a weight or its bias, rows first.
        to_halves: the way: from pairs to halves, or back.
    """
    width, rope = config.qk_head_dim, config.qk_rope_head_dim
    if ".kv_a_proj_with_mqa." in name:
        width = config.latent_dim
    elif ".q_b_proj." not in name and ".q_proj." not in name:
        return tensor
    pairs = torch.arange(rope).view(-1, 2).t().flatten()  # halves <- pairs: 0, 2, 4, …, 1, 3, 5, …
    order = torch.arange(width)
    order[width - rope :] = width - rope + (pairs if to_halves else pairs.argsort())
    heads = tensor.unflatten(0, (-1, width))
    return heads[:, order.to(tensor.device)].flatten(0, 1)
