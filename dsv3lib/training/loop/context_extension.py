"""Context extension: how RoPE is stretched, and V3's two phases of training at longer lengths (paper §4.3).

V3 was trained at 4K, then for 1,000 steps at 32K with 1,920 sequences and for 1,000 at 128K with 480: the same tokens
a step, YaRN with one setting all through, and the learning rate that pre-training had ended with. ``phases`` gives
that schedule for any lengths. Beside YaRN stand what it is measured against: position interpolation, NTK-aware
scaling (a larger base θ' = θ·s^(R/(R−2)), so that the slowest pair is slowed s times and the fastest not at all), and
no change of the frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ...checks import is_number, require, require_integer
from ...config import ModelConfig
from ...errors import ConfigError
from ...rope_settings import LinearScaling, YarnScaling

METHODS: Mapping[str, str] = MappingProxyType(
    {
        "yarn": "YaRN by parts, with its temperature (V3's)",
        "interpolation": "position interpolation: every pair slowed alike",
        "ntk": "NTK-aware: a larger base",
        "none": "the frequencies as they are",
    }
)
PHASES = 2


@dataclass(frozen=True)
class Phase:
    """One phase: ``steps`` steps of ``batch_size`` sequences of ``length`` tokens."""

    length: int
    steps: int
    batch_size: int


def phases(trained: int, target: int, steps: int, tokens_a_step: int) -> tuple[Phase, ...]:
    """V3's two phases for other lengths: about half of the doublings, then all, at equal tokens a step.

    4,096 to 131,072 gives 32,768 and 131,072, as the paper has it. A single doubling is one phase.

    Args:
        trained: the length trained before, in tokens. target: the length wanted. steps: of each phase.
        tokens_a_step: how many tokens a step reads, about; at least one sequence.

    Raises:
        ConfigError: the target is not longer than what was trained, or a number is below 1.
    """
    for name, value in (("trained length", trained), ("steps", steps), ("tokens a step", tokens_a_step)):
        require_integer(name, value, 1)
    require(
        isinstance(target, int) and target > trained, "extend", target,
        f"more than the trained length ({trained} tokens): that is what is extended",
    )  # fmt: skip
    half = trained * 2 ** math.ceil(math.log2(target / trained) / 2)
    lengths = [half, target] if half < target else [target]
    return tuple(Phase(length, steps, max(1, tokens_a_step // length)) for length in lengths)


def extended_config(
    config: ModelConfig, method: str, trained: int, target: int, factor: float | int
) -> ModelConfig:
    """The configuration of a model that reads ``target`` tokens; transformers loads each of them alike.

    Args:
        config: of the model as it was trained. method: one of ``METHODS``. trained: its context, in tokens.
        target: the new ``max_position_embeddings``. factor: s, how many times the frequencies are stretched at most.

    Raises:
        ConfigError: an unknown method; a factor below 1, or too small for the target; a model that is stretched
            already; fewer rotary pairs than the method needs.
    """
    if method not in METHODS:
        raise ConfigError(f"method: {method!r}, expected one of {', '.join(METHODS)}")
    require(is_number(factor) and factor >= 1, "yarn factor", factor, "a number >= 1")
    require(
        config.rope_scaling is None, "rope_scaling", config.rope_scaling,
        "null: this model's frequencies are stretched already; extend the model that it came from",
    )  # fmt: skip
    if method == "none":
        return config.replace(max_position_embeddings=target)
    reach = math.floor(factor * trained)
    require(
        target <= reach, "extend", target,
        f"at most factor x trained length ({factor:g} x {trained} = {reach}); raise the factor",
    )  # fmt: skip
    changes: dict[str, Any] = {"max_position_embeddings": target}
    if method == "yarn":
        changes["rope_scaling"] = YarnScaling(float(factor), trained, mscale=1.0, mscale_all_dim=1.0)
    elif method == "interpolation":
        changes["rope_scaling"] = LinearScaling(float(factor))
    else:
        dims = config.qk_rope_head_dim
        require(dims > 2, "qk_rope_head_dim", dims, "more than 2: NTK-aware scaling needs a fast and a slow pair")
        changes["rope_theta"] = config.rope_theta * factor ** (dims / (dims - 2))
    return config.replace(**changes)
