"""``generation_config.json``: how a checkpoint's authors want it to generate, above all which tokens end a text.

Chat models end an answer with another token than a document, so the file often names several. Where it says
something about a special token, that holds; else what ``config.json`` says.

Differs from transformers: a file that names no end token leaves those of ``config.json`` in force, where
transformers would never stop. Temperature, nucleus and the like are kept and saved again but not used:
``generate`` says its defaults itself, and sampling by surprise is none of them.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checks import is_integer
from ..config import ModelConfig

FILE_NAME = "generation_config.json"


def read_generation_config(folder: str | Path) -> dict[str, Any] | None:
    """The fields of the file, all of them; ``None`` where there is none or it is damaged, which is told.

    Args:
        folder: the checkpoint's.
    """
    path = Path(folder) / FILE_NAME
    if not path.exists():
        return None
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise ValueError(f"holds a {type(fields).__name__}")
    except (OSError, ValueError) as error:
        warnings.warn(f"{path}: is passed over, as it is no JSON object ({error})", stacklevel=2)
        return None
    return fields


def stop_tokens(config: ModelConfig, generation: Mapping[str, Any] | None) -> tuple[int, ...]:
    """The tokens that end a row, in the order of the file that names them.

    Args:
        config: the model's. generation: fields of ``generation_config.json``, or ``None``.
    """
    own = (generation or {}).get("eos_token_id")
    if own is None:
        return config.eos_token_ids
    return tuple(t for t in (own if isinstance(own, list | tuple) else [own]) if _in_vocabulary(t, config))


def padding_token(config: ModelConfig, generation: Mapping[str, Any] | None) -> int:
    """What fills up a row behind its end: the padding token, else the first end token, else 0.

    Args:
        config: the model's. generation: fields of ``generation_config.json``, or ``None``.
    """
    own = (generation or {}).get("pad_token_id")
    if _in_vocabulary(own, config):
        return own
    return next((t for t in (config.pad_token_id, *stop_tokens(config, generation)) if t is not None), 0)


def _in_vocabulary(token: Any, config: ModelConfig) -> bool:
    """Some files name tokens that the model has not; they never come."""
    return is_integer(token) and 0 <= token < config.vocab_size
