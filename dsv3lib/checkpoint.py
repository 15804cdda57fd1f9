"""Checkpoints: folders of safetensors with Hugging Face's names, in and out, FP8 files included.

The released layout is one tensor per expert, MTP modules as layers ``num_hidden_layers`` onwards with their
own stored copies of embedding and head, and for FP8 weights a ``weight_scale_inv`` per 128 x 128 block (which
one multiplies by, despite its name). All that differs from the model in memory is settled in this file.
Loading streams tensor by tensor into the model, so that memory peaks at the model plus one shard.
"""

from __future__ import annotations

import errno
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import ModelConfig
from .errors import CheckpointError, KernelError, SaveError
from .kernels import dequantize, quantize_blocks
from .memory import allocate

if TYPE_CHECKING:
    from .model import DeepSeekV3

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SCALE_SUFFIX = "_scale_inv"
FP8_BLOCK = 128
_WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3")


class Entry(NamedTuple):
    """Where a stored tensor lives in the model.

    Args:
        name: as stored. target: the parameter or buffer. at: which part of it (an expert, gate or up rows).
    """

    name: str
    target: str
    at: tuple[Any, ...] = ()


def entries(model: DeepSeekV3) -> Iterator[Entry]:
    """Every tensor of the checkpoint and its place in the model, in the model's order."""
    width = model.config.moe_intermediate_size
    for name in model.state_dict():
        if name.endswith("experts.gate_up_proj"):
            for j in range(model.config.n_routed_experts):
                stem = name.removesuffix("gate_up_proj") + str(j)
                yield Entry(f"{stem}.gate_proj.weight", name, (j, slice(0, width)))
                yield Entry(f"{stem}.up_proj.weight", name, (j, slice(width, 2 * width)))
        elif name.endswith("experts.down_proj"):
            for j in range(model.config.n_routed_experts):
                yield Entry(f"{name.removesuffix('down_proj')}{j}.down_proj.weight", name, (j,))
        elif not (name == "lm_head.weight" and model.config.tie_word_embeddings):
            yield Entry(name, name)


def copies(config: ModelConfig) -> Iterator[Entry]:
    """The MTP modules' stored copies of embedding and head; in the model they are the main ones."""
    for layer in range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers):
        yield Entry(f"model.layers.{layer}.embed_tokens.weight", "model.embed_tokens.weight")
        yield Entry(f"model.layers.{layer}.shared_head.head.weight", "lm_head.weight")


# ---- out ---------------------------------------------------------------------------------------------------


def save(model: DeepSeekV3, folder: str | Path, max_shard_bytes: int = 5 * 10**9, fp8: bool = False) -> None:
    """Write ``config.json`` and safetensors that transformers, vLLM and this library read.

    All files are written under temporary names first and renamed when all of them are whole.

    Args:
        model: the model. folder: made if need be; other files in it stay.
        max_shard_bytes: size of a file before the next is begun.
        fp8: store attention, dense and expert matrices in E4M3 with a scale per 128 x 128 block, as released.

    Raises:
        SaveError: the disk is full or the folder cannot be written; earlier files are intact.
    """
    folder = Path(folder)
    state = model.state_dict()
    names = [e for e in [*entries(model), *copies(model.config)] if e.target in state]
    temporary: list[tuple[Path, Path]] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        weight_map, total = {}, 0
        shards = list(_shards(model.config, state, names, max_shard_bytes, fp8, count_only=True))
        for number, tensors in enumerate(_shards(model.config, state, names, max_shard_bytes, fp8), start=1):
            name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            weight_map |= dict.fromkeys(tensors, name)
            total += sum(t.numel() * t.element_size() for t in tensors.values())
            temporary.append((folder / f"{name}.tmp", folder / name))
            save_file(tensors, temporary[-1][0], metadata={"format": "pt"})
        config = model.config.to_dict() | {"dtype": str(model.lm_head.weight.dtype).removeprefix("torch.")}
        if fp8:
            config["quantization_config"] = {
                "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
            }  # fmt: skip
        texts = {"config.json": config}
        if len(shards) > 1:
            texts[INDEX] = {"metadata": {"total_size": total}, "weight_map": weight_map}
        for name, content in texts.items():
            temporary.append((folder / f"{name}.tmp", folder / name))
            temporary[-1][0].write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for written, final in temporary:
            os.replace(written, final)
        kept = set(weight_map.values()) | set(texts)
        stale = [p for p in [*folder.glob("model*.safetensors"), folder / INDEX] if p.name not in kept]
        for path in stale:
            path.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        why = "the disk is full; free some space and save again" if full else str(error)
        raise SaveError(
            f"{folder}: the checkpoint was not saved, what was there before is intact: {why}"
        ) from error
    finally:  # an interrupt, too, leaves nothing half-written behind
        for written, _ in temporary:
            with suppress(OSError):
                written.unlink(missing_ok=True)


def _shards(
    config: ModelConfig,
    state: dict[str, Tensor],
    names: list[Entry],
    limit: int,
    fp8: bool,
    count_only: bool = False,
) -> Iterator[dict[str, Tensor]]:
    """Group the stored tensors into files; ``count_only`` plans without copying any data."""
    shard: dict[str, Tensor] = {}
    size = 0
    for entry in names:
        tensor = state[entry.target][entry.at]
        if count_only:
            tensor = tensor.to("meta")
        stored = _stored(config, entry.name, tensor, fp8)
        bytes_ = sum(t.numel() * t.element_size() for t in stored.values())
        if shard and size + bytes_ > limit:
            yield shard
            shard, size = {}, 0
        shard |= stored
        size += bytes_
    yield shard


def _stored(config: ModelConfig, name: str, tensor: Tensor, fp8: bool) -> dict[str, Tensor]:
    """A tensor as the file holds it: alone, or quantised beside its scales."""
    if not config.rope_interleave:
        tensor = _reorder_rope(config, name, tensor, to_halves=True)
    if fp8 and _is_fp8_matrix(name):
        values, scales = quantize_blocks(tensor, FP8_BLOCK)
        return {name: values, name + SCALE_SUFFIX: scales}
    return {name: tensor.detach().cpu().clone().contiguous() if tensor.device.type != "meta" else tensor}


def _is_fp8_matrix(name: str) -> bool:
    """The released files quantise attention, dense and expert matrices; not norms, gates, embedding or heads."""
    return name.endswith("_proj.weight") and "eh_proj" not in name or name.endswith("_with_mqa.weight")


# ---- in ----------------------------------------------------------------------------------------------------


def read_config(folder: str | Path) -> ModelConfig:
    """The configuration of a checkpoint, with no MTP module where the files hold none.

    transformers drops the MTP modules when it saves a model and leaves ``num_nextn_predict_layers`` as it was.
    """
    folder = Path(folder)
    config = ModelConfig.from_json(folder)
    first = f"model.layers.{config.num_hidden_layers}."
    with ExitStack() as stack:
        if config.num_nextn_predict_layers and not any(n.startswith(first) for n in _open_all(folder, stack)):
            warnings.warn(
                f"{folder}: config.json promises {config.num_nextn_predict_layers} MTP module(s), the files hold "
                "none; loading the main model alone",
                stacklevel=3,
            )
            return config.replace(num_nextn_predict_layers=0)
    return config


def load(
    model: DeepSeekV3, folder: str | Path, dtype: torch.dtype | None = None, device: str = "cpu",
    check_finite: bool = True,
) -> None:  # fmt: skip
    """Fill a model (on the meta device or not) from a folder; names and shapes are checked before any data is read.

    Args:
        model: built from the folder's configuration. folder: holds safetensors, one file or sharded.
        dtype: of the parameters; by default that of the files (BF16 where they are FP8). The routing bias
            stays FP32.
        device: where to. check_finite: refuse NaN and infinity.

    Raises:
        CheckpointError: a file is missing, truncated or not safetensors; a tensor is missing, unknown, of the
            wrong shape, holds NaN, lacks its scales, or an MTP copy differs from what it copies.
    """
    folder = Path(folder)
    with ExitStack() as stack:
        places = _open_all(folder, stack)
        wanted = {e.name: e for e in entries(model)}
        extra = {e.name: e for e in copies(model.config)}
        _check_names(folder, model, places, wanted, extra)
        _check_shapes(folder, model, places, wanted)
        block = _fp8_block(folder)
        if dtype is None:
            stored = places["model.embed_tokens.weight"].get_slice("model.embed_tokens.weight").get_dtype()
            dtype = {"F32": torch.float32, "F64": torch.float64, "F16": torch.float16}.get(
                stored, torch.bfloat16
            )
        if _is_meta(model) and torch.device(device).type == "cpu":
            allocate(model, dtype)
        else:
            model.to_empty(device=device) if _is_meta(model) else model.to(device)
        if model.config.tie_word_embeddings:  # leaving the meta device makes one shared matrix two
            model.lm_head.weight = model.model.embed_tokens.weight
        model.to(dtype)
        state = model.state_dict()
        for entry in wanted.values():
            tensor = _read(folder, places, entry.name, block, check_finite)
            if not model.config.rope_interleave:
                tensor = _reorder_rope(model.config, entry.name, tensor, to_halves=False)
            with torch.no_grad():
                state[entry.target][entry.at].copy_(tensor)
        for entry in extra.values():
            if entry.name in places and not torch.equal(
                state[entry.target].cpu(), _read(folder, places, entry.name, block, check_finite).to(dtype)
            ):
                raise CheckpointError(
                    f"{folder}: {entry.name} differs from {entry.target}; DeepSeek-V3's MTP modules share it with the "
                    "main model, so this checkpoint is of another architecture or damaged"
                )


def _is_meta(model: DeepSeekV3) -> bool:
    return model.lm_head.weight.device.type == "meta"


def _open_all(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Open every shard; which open file holds which tensor."""
    if (folder / INDEX).exists():
        try:
            weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            files = [Path(name).name for name in sorted(set(weight_map.values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{folder / INDEX}: is not a safetensors index; download or save it again"
            ) from error
    elif (folder / SINGLE).exists():
        weight_map, files = None, [SINGLE]
    else:
        found = ", ".join(sorted(p.name for p in folder.glob("*"))) if folder.is_dir() else "no such folder"
        pickles = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        hint = "; pickled weights are never read, convert them to safetensors" if pickles else ""
        raise CheckpointError(
            f"{folder}: neither {SINGLE} nor {INDEX} is there (found: {found or 'nothing'}){hint}"
        )
    places: dict[str, Any] = {}
    for name in files:
        path = folder / name
        if not path.exists():
            raise CheckpointError(
                f"{path}: this shard is missing; {INDEX} names {len(files)} of them, fetch it again"
            )
        try:
            shard = stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: truncated or not safetensors ({error}); fetch or save it again"
            ) from error
        places |= dict.fromkeys(shard.keys(), shard)
    absent = [n for n in weight_map or () if n not in places]
    if absent:
        raise CheckpointError(
            f"{folder}: {INDEX} promises {absent[0]}, which {weight_map[absent[0]]} does not hold"
        )
    return places


def _check_names(
    folder: Path, model: DeepSeekV3, places: dict[str, Any], wanted: dict[str, Entry], extra: dict[str, Entry]
) -> None:
    missing = [n for n in wanted if n not in places]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} tensors that the configuration asks for are missing, the first is {missing[0]}; "
            "is a shard incomplete, or config.json that of another model?"
        )
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    known = wanted.keys() | extra.keys() | {n + SCALE_SUFFIX for n in wanted} | tied
    # Some files carry RoPE's frequencies, which follow from the configuration.
    foreign = [n for n in places if n not in known and not n.endswith("rotary_emb.inv_freq")]
    if foreign:
        raise CheckpointError(
            f"{folder}: {len(foreign)} tensors do not belong to this configuration, the first is {foreign[0]}; "
            "is config.json that of this checkpoint?"
        )


def _check_shapes(folder: Path, model: DeepSeekV3, places: dict[str, Any], wanted: dict[str, Entry]) -> None:
    state = model.state_dict()
    for entry in wanted.values():
        piece = places[entry.name].get_slice(entry.name)
        stored = tuple(piece.get_shape())
        expected = tuple(state[entry.target].to("meta")[entry.at].shape)
        if stored != expected:
            raise CheckpointError(
                f"{folder}: {entry.name} has shape {stored}, the configuration says {expected}"
            )
        if piece.get_dtype() not in _WEIGHT_DTYPES:
            raise CheckpointError(
                f"{folder}: {entry.name} holds {piece.get_dtype()}, expected one of {', '.join(_WEIGHT_DTYPES)}"
            )


def _fp8_block(folder: Path) -> int:
    """Edge of the squares that share a scale, from ``config.json``."""
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        block = (fields.get("quantization_config") or {}).get("weight_block_size", [FP8_BLOCK] * 2)
    except (
        OSError,
        ValueError,
        AttributeError,
    ):  # a model of the caller's own, beside which no config need lie
        return FP8_BLOCK
    edge = block[0] if isinstance(block, list) and block else None
    if not isinstance(edge, int) or edge < 1 or block != [edge, edge]:
        raise CheckpointError(
            f"{folder}: weight_block_size is {block!r}, expected a square, [128, 128] as released"
        )
    return edge


def _read(folder: Path, places: dict[str, Any], name: str, block: int, check_finite: bool) -> Tensor:
    """One stored tensor, dequantised where it is FP8."""
    try:
        tensor = places[name].get_tensor(name)
        if tensor.dtype == torch.float8_e4m3fn:
            if name + SCALE_SUFFIX not in places:
                raise CheckpointError(f"{folder}: {name} is FP8 and its {name + SCALE_SUFFIX} is missing")
            tensor = dequantize(tensor, places[name + SCALE_SUFFIX].get_tensor(name + SCALE_SUFFIX), block)
    except (SafetensorError, KernelError) as error:
        raise CheckpointError(
            f"{folder}: {name} cannot be read ({error}); fetch or save the file again"
        ) from error
    if check_finite and not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(
            f"{folder}: {name} holds NaN or infinity; the training run or the file is damaged"
        )
    return tensor


def _reorder_rope(config: ModelConfig, name: str, tensor: Tensor, to_halves: bool) -> Tensor:
    """Rotary output rows between neighbours-are-pairs (the model) and two halves (``rope_interleave`` false)."""
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
