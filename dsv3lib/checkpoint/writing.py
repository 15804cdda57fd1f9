"""Saving: a model into a folder of safetensors, in the released layout, whole or not at all.

All files are written into a folder of their own inside the target and renamed when every one is whole. Of what
stands there only files that this format itself writes are ever replaced or removed: ``model.safetensors``, its
shards and the index. An adapter or an average of weights that somebody put beside them stays.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..config import ModelConfig
from ..errors import SaveError
from ..kernels import quantize_blocks
from .block_scales import E4M3, FP8_BLOCK, SCALE_SUFFIX, is_fp8_matrix
from .generation_config import FILE_NAME as GENERATION
from .names import Entry, copies, entries, reorder_rope, scale_of
from .shards import INDEX, SINGLE

if TYPE_CHECKING:
    from ..model import DeepSeekV3

_OURS = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors|" + re.escape(INDEX))


def save(
    model: DeepSeekV3,
    folder: str | Path,
    max_shard_bytes: int = 5 * 10**9,
    fp8: bool = False,
    mtp_copies: bool = True,
) -> None:
    """Write ``config.json``, safetensors and, where the model came with one, ``generation_config.json``.

    transformers, vLLM and this library read them.

    Args:
        model: the model.
        folder: made if need be; files of others in it stay.
        max_shard_bytes: size of a file before the next is begun.
        fp8: store attention, dense and expert matrices in E4M3 with a scale per 128 x 128 block, as released; a
            model that keeps its weights in FP8 is always stored so, its values and scales as they are.
        mtp_copies: store the MTP modules' copies of embedding and head, as released. Without them the file is
            smaller; this library, and transformers, which drops the modules, read it as well.

    Raises:
        SaveError: the disk is full or the folder cannot be written; earlier files are intact.
    """
    folder = Path(folder)
    fp8 = fp8 or any(p.dtype == E4M3 for p in model.parameters())
    unfinished = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
        written = [*_write_tensors(model, unfinished, max_shard_bytes, fp8, mtp_copies), "config.json"]
        config = model.config.to_dict() | {"dtype": str(model.lm_head.weight.dtype).removeprefix("torch.")}
        if fp8:
            config["quantization_config"] = {
                "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
            }  # fmt: skip
        _write_json(unfinished / "config.json", config)
        if model.generation_config is not None:
            _write_json(unfinished / GENERATION, model.generation_config)
            written.append(GENERATION)
        for name in written:
            os.replace(unfinished / name, folder / name)
        for path in folder.iterdir():
            if _OURS.fullmatch(path.name) and path.name not in written:
                path.unlink()
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        why = "the disk is full; free some space and save again" if full else str(error)
        raise SaveError(
            f"{folder}: the checkpoint was not saved, what was there before is intact: {why}"
        ) from error
    finally:  # an interrupt, too, leaves nothing half-written behind
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)


def _write_tensors(
    model: DeepSeekV3, folder: Path, limit: int, fp8: bool, mtp_copies: bool
) -> list[str]:
    """Write all safetensors, and the index where they are several; the files' names, the index last."""
    state = model.state_dict()
    names = [e for e in [*entries(model), *(copies(model.config) if mtp_copies else ())] if e.target in state]
    count = sum(1 for _ in _shards(model.config, state, names, limit, fp8, count_only=True))
    weight_map: dict[str, str] = {}
    written, total = [], 0
    for number, tensors in enumerate(_shards(model.config, state, names, limit, fp8), start=1):
        written.append(SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors")
        weight_map |= dict.fromkeys(tensors, written[-1])
        total += sum(t.numel() * t.element_size() for t in tensors.values())
        save_file(tensors, folder / written[-1], metadata={"format": "pt"})
    if count > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        written.append(INDEX)
    return written


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


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
        if tensor.dtype == E4M3:  # kept in FP8: values and scales as they are, nothing is rounded again
            scales = scale_of(entry, state)
            stored[entry.name + SCALE_SUFFIX] = scales.to("meta") if count_only else scales.cpu().clone()
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
        tensor = reorder_rope(config, name, tensor, to_halves=True)
    if fp8 and is_fp8_matrix(name) and tensor.dtype != E4M3:
        values, scales = quantize_blocks(tensor, FP8_BLOCK)
        return {name: values, name + SCALE_SUFFIX: scales}
    return {name: tensor.detach().cpu().clone().contiguous() if tensor.device.type != "meta" else tensor}
