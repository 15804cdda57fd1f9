"""Save points of a run over several ranks: each writes what it holds, any other layout reads it.

    RUN/checkpoints/step-…/model-0000k-of-….safetensors  the model's tensors that rank k wrote, with official names
    RUN/checkpoints/step-…/model.safetensors.index.json  which file holds which: so it is a model folder like any other
    RUN/checkpoints/step-…/training/moments/shard-…      moments, masters and averaged weights, by the same names

Written and read by torch.distributed.checkpoint (DCP), which also settles who writes what several ranks hold. As every
tensor has a file's name of its own, an expert's too, a rank of another layout asks for its own names, and one process
for all of them. Safetensors and JSON alone: DCP's own format has a pickle, which can run code when it is read.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from ...checkpoint import INDEX, entries
from ...checkpoint.names import reorder_rope
from ...errors import CheckpointError, SaveError
from ...model import DeepSeekV3
from . import save_point

_SHARDS = "*.safetensors"


def model_tensors(model: DeepSeekV3) -> dict[str, Tensor]:
    """The parameters and buffers that a rank holds, under the names of the stored files; views where that can be.

    Args:
        model: whole, or what is left of it on a rank.
    """
    state = model.state_dict()
    tensors = {entry.name: state[entry.target][entry.at] for entry in entries(model)}
    if model.config.rope_interleave:
        return tensors
    return {name: reorder_rope(model.config, name, tensor, to_halves=True) for name, tensor in tensors.items()}


def split_by_name(model: DeepSeekV3, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Views of what belongs to parameters (moments, averages), each under its kind and the parameter's stored name.

    Args:
        model: whose parameters they are. tensors: by "kind.name", the name as the model has it.
    """
    found, wanted = {}, list(entries(model))
    kinds = sorted({name.partition(".")[0] for name in tensors})
    for kind in kinds:
        for entry in wanted:
            whole = tensors.get(f"{kind}.{entry.target}")
            if whole is not None:
                found[f"{kind}.{entry.name}"] = whole[entry.at]
    return found


def write_shards(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write what this rank holds; all ranks of the process group call it.

    Args:
        tensors: by name; one that several ranks hold is the same on each. folder: seen by all ranks.

    Raises:
        SaveError: a rank could not write.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        dcp.save(own, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except (CheckpointException, OSError, SafetensorError) as error:
        raise SaveError(
            f"{folder}: a rank could not write its part ({_cause(error)}); the save point before is intact. Free some "
            "space, or give all machines the same folder, then resume the run"
        ) from error


def read_shards(places: Mapping[str, Tensor], folder: Path, what: str) -> None:
    """Read named tensors into their places, whoever wrote them; each rank may call it by itself.

    Args:
        places: by name; written to. folder: of the shards. what: is read, for the error.

    Raises:
        CheckpointError: a tensor is missing or of another shape or dtype, or a file is damaged.
    """
    reader = dcp.HuggingFaceStorageReader(str(folder))
    fresh = {name: torch.empty_like(place, memory_format=torch.contiguous_format) for name, place in places.items()}
    try:
        stored = reader.read_metadata().state_dict_metadata
        for name, place in places.items():
            if name not in stored:
                raise CheckpointError(f"{folder}: {what}: tensor {name!r} is missing; remove this save point's folder")
            found, dtype = tuple(stored[name].size), stored[name].properties.dtype
            if (found, dtype) != (tuple(place.shape), place.dtype):
                raise CheckpointError(
                    f"{folder}: {what}: tensor {name!r} is {dtype} {found}, expected {place.dtype} "
                    f"{tuple(place.shape)}"
                )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # on purpose: each reads its own
            dcp.load(fresh, storage_reader=reader, no_dist=True)
    except (CheckpointException, OSError, SafetensorError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{folder}: {what} cannot be read ({_cause(error)}); remove this save point's folder, and the run goes on "
            "from the one before it"
        ) from error
    with torch.no_grad():
        for name, place in places.items():
            place.copy_(fresh[name])


def read_model(model: DeepSeekV3, folder: Path) -> None:
    """Fill a model, or what a rank has of it, from a save point.

    Args:
        model: written to. folder: the save point.

    Raises:
        CheckpointError: as ``read_shards``.
    """
    state = model.state_dict()
    if model.config.rope_interleave:
        read_shards(model_tensors(model), folder, "model")
        return
    stored = model_tensors(model)
    read_shards(stored, folder, "model")
    with torch.no_grad():
        for entry in entries(model):
            ours = reorder_rope(model.config, entry.name, stored[entry.name], to_halves=False)
            state[entry.target][entry.at].copy_(ours)


def write_index(folder: Path) -> None:
    """Give a model's shards the usual names, and say in the usual index which holds which tensor.

    Under the names that DCP gives them transformers would take the folder for a checkpoint of its own trainer.

    Args:
        folder: of the shards.
    """
    weight_map, total = {}, 0
    written = sorted(folder.glob(_SHARDS))
    for number, before in enumerate(written, start=1):
        path = before.rename(folder / f"model-{number:05d}-of-{len(written):05d}.safetensors")
        with safe_open(path, framework="pt") as file:
            weight_map |= dict.fromkeys(file.keys(), path.name)
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        total += path.stat().st_size - 8 - header
    save_point.save_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_config(model: DeepSeekV3, folder: Path) -> None:
    """Write the model's ``config.json`` beside its shards."""
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    content = json.dumps(model.config.to_dict() | {"dtype": dtype}, indent=2) + "\n"
    (folder / "config.json").write_text(content, encoding="utf-8")


def _cause(error: Exception) -> str:
    """DCP's own error holds that of each rank, with its traceback; its last line says what it was."""
    failures = getattr(error, "failures", None)
    if failures:
        rank, (cause, _) = next(iter(failures.items()))
        return f"rank {rank}: {cause}"
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
