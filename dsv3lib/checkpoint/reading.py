"""Loading: a folder into a model, tensor by tensor, so that memory peaks at the model plus one tensor.

Names and shapes are checked before any data is read. What is odd and does not change the model is a warning;
what would change it in silence is an error.
"""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import CheckpointError
from ..kernels import quantize_blocks
from ..memory import allocate
from .block_scales import E4M3, FP8_BLOCK, SCALE_SUFFIX, block_size, read_fp8, read_weight
from .generation_config import read_generation_config
from .names import Entry, copies, entries, mtp_layers, reorder_rope, scale_of, split_layer
from .shards import Stored, open_stored

if TYPE_CHECKING:
    from ..model import DeepSeekV3

_WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3")
_EXAMPLES = 3  # tensors named in a warning


def read_config(folder: str | Path) -> ModelConfig:
    """The configuration of a checkpoint, with as many MTP modules as it promises and the files hold.

    transformers drops the MTP modules when it saves a model and leaves ``num_nextn_predict_layers`` as it was.

    Args:
        folder: holds ``config.json`` and safetensors.

    Raises:
        ConfigError: the configuration cannot be used. CheckpointError: a file is missing or damaged.
    """
    folder = Path(folder)
    config = ModelConfig.from_json(folder)
    promised, first = config.num_nextn_predict_layers, config.num_hidden_layers
    with ExitStack() as stack:
        held = mtp_layers(list(open_stored(folder, stack).places), config) if promised else []
    usable = next((k for k in range(promised) if first + k not in held), promised)
    if usable == promised:
        return config
    rest = "the main model alone" if usable == 0 else f"the main model and {usable} of them"
    warnings.warn(
        f"{folder}: config.json promises {promised} MTP module(s), the files hold "
        f"{'none' if usable == 0 else usable}; loading {rest}",
        stacklevel=3,
    )
    return config.replace(num_nextn_predict_layers=usable)


def load(
    model: DeepSeekV3, folder: str | Path, dtype: torch.dtype | None = None, device: str = "cpu",
    check_finite: bool = True,
) -> None:  # fmt: skip
    """Fill a model (on the meta device or not) from a folder.

    Args:
        model: built from the folder's configuration.
        folder: holds safetensors, one file or sharded.
        dtype: of the parameters; by default that of the files (BF16 where they are FP8). The routing bias
            stays FP32, and so do weights that the model keeps in FP8 (``fp8.stored``) with their scales.
        device: where to.
        check_finite: refuse NaN and infinity.

    Raises:
        CheckpointError: a file is missing, truncated or not safetensors; a tensor is missing, unknown, of the
            wrong shape, holds NaN, lacks its scales, or an MTP copy differs from what it copies.
    """
    folder = Path(folder)
    with ExitStack() as stack:
        stored = open_stored(folder, stack)
        wanted = {e.name: e for e in entries(model)}
        extra = {e.name: e for e in copies(model.config)}
        _check_names(model.config, stored, wanted, extra)
        _check_shapes(model, stored, wanted)
        stored.warn(stacklevel=3)
        block = block_size(folder)
        dtype = _dtype_of(stored) if dtype is None else dtype
        _make_real(model, dtype, device)
        state = model.state_dict()
        for entry in wanted.values():
            place = state[entry.target][entry.at]
            if place.dtype == E4M3 and model.config.rope_interleave and block == FP8_BLOCK:
                found = read_fp8(stored, entry.name, check_finite)
                if found is not None:
                    place.copy_(found[0])
                    scale_of(entry, state).copy_(found[1])
                    continue
            tensor = _read_finite(stored, entry.name, block, check_finite)
            if not model.config.rope_interleave:
                tensor = reorder_rope(model.config, entry.name, tensor, to_halves=False)
            with torch.no_grad():
                if place.dtype == E4M3:
                    tensor, scales = quantize_blocks(tensor.float())
                    scale_of(entry, state).copy_(scales)
                place.copy_(tensor)
        for entry in extra.values():
            if entry.name in stored and not torch.equal(
                state[entry.target].cpu(), _read_finite(stored, entry.name, block, check_finite).to(dtype)
            ):
                raise CheckpointError(
                    f"{folder}: {entry.name} differs from {entry.target}; DeepSeek-V3's MTP modules share it with the "
                    "main model, so this checkpoint is of another architecture or damaged"
                )
    model.generation_config = read_generation_config(folder)


def _dtype_of(stored: Stored) -> torch.dtype:
    """The type of the embedding, which is quantised in no checkpoint."""
    kind = stored.dtype("model.embed_tokens.weight")
    return {"F32": torch.float32, "F64": torch.float64, "F16": torch.float16}.get(kind, torch.bfloat16)


def _make_real(model: DeepSeekV3, dtype: torch.dtype, device: str) -> None:
    """Memory for a model that may be on the meta device, and its parameters in ``dtype``."""
    on_meta = model.lm_head.weight.device.type == "meta"
    if (
        on_meta
        and torch.device(device).type == "cpu"
        and not any(p.dtype == E4M3 for p in model.parameters())
    ):
        allocate(model, dtype)
    elif on_meta:
        model.to_empty(device=device)
    else:
        model.to(device)
    if model.config.tie_word_embeddings:  # leaving the meta device makes one shared matrix two
        model.lm_head.weight = model.model.embed_tokens.weight
    model.to(dtype)


def _check_names(
    config: ModelConfig, stored: Stored, wanted: dict[str, Entry], extra: dict[str, Entry]
) -> None:
    missing = [n for n in wanted if n not in stored]
    if missing:
        raise CheckpointError(
            f"{stored.folder}: {len(missing)} tensors that the configuration asks for are missing, the first is "
            f"{missing[0]}; is a shard incomplete, or config.json that of another model?"
            + "".join(f" ({oddity})" for oddity in stored.oddities)
        )
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    known = wanted.keys() | extra.keys() | {n + SCALE_SUFFIX for n in wanted} | tied
    # Some files carry RoPE's frequencies, which follow from the configuration.
    foreign = [n for n in stored.places if n not in known and not n.endswith("rotary_emb.inv_freq")]
    left_out = set(mtp_layers(foreign, config))
    foreign = [n for n in foreign if split_layer(n)[0] not in left_out]
    if foreign:
        raise CheckpointError(
            f"{stored.folder}: {len(foreign)} tensors do not belong to this configuration, the first is {foreign[0]}; "
            "is config.json that of this checkpoint?"
        )
    if left_out:
        stored.oddities.append(
            f"the files hold MTP modules as layers {', '.join(map(str, sorted(left_out)))}, config.json has "
            f"num_nextn_predict_layers = {config.num_nextn_predict_layers}; they are left out"
        )


def _check_shapes(model: DeepSeekV3, stored: Stored, wanted: dict[str, Entry]) -> None:
    state = model.state_dict()
    unused = []
    for entry in wanted.values():
        shape = stored.shape(entry.name)
        expected = tuple(state[entry.target].to("meta")[entry.at].shape)
        if shape != expected:
            raise CheckpointError(
                f"{stored.folder}: {entry.name} has shape {shape}, the configuration says {expected}"
            )
        kind = stored.dtype(entry.name)
        if kind not in _WEIGHT_DTYPES:
            raise CheckpointError(
                f"{stored.folder}: {entry.name} holds {kind}, expected one of {', '.join(_WEIGHT_DTYPES)}"
            )
        if kind != "F8_E4M3" and entry.name + SCALE_SUFFIX in stored:
            unused.append(f"{entry.name} ({kind})")
    if unused:
        some = ", ".join(unused[:_EXAMPLES]) + (", …" if len(unused) > _EXAMPLES else "")
        stored.oddities.append(f"passed over the scales of {len(unused)} tensor(s) that are not FP8: {some}")


def _read_finite(stored: Stored, name: str, block: int, check_finite: bool) -> Tensor:
    tensor = read_weight(stored, name, block)
    if check_finite and not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(
            f"{stored.folder}: {name} holds NaN or infinity; the training run or the file is damaged"
        )
    return tensor
