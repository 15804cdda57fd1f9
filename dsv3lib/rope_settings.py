"""RoPE's settings in a configuration: YaRN's numbers, and the two forms in which released files write them.

Beside V3's YaRN stands position interpolation (``linear``), which transformers reads too: it is what YaRN is measured
against. Neither changes how a checkpoint's weights are read.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from .checks import is_integer, is_number, require, require_integer
from .errors import ConfigError

_LIKE = 0.85  # from this similarity on, an unknown setting is taken for a slip of the pen


@dataclass(frozen=True)
class YarnScaling:
    """YaRN's settings (paper §4.3): how RoPE's frequencies are stretched past the trained length.

    Args:
        factor: how many times longer the context becomes (V3: 40).
        original_max_position_embeddings: the length trained before the extension, in tokens (V3: 4096).
        beta_fast: a dimension that turns more often than this over the original length is left alone.
        beta_slow: one that turns less often than this is slowed down by the whole ``factor``.
        mscale, mscale_all_dim: the two weights of the temperature 0.1·ln(factor) + 1; cos and sin are
            multiplied by the ratio of the two temperatures, the softmax scale by the second one squared.

    Differs from transformers: where ``mscale`` is given without ``mscale_all_dim`` (or one of them is 0) the
    released code uses it, and so do we; transformers passes it over.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        require(
            is_number(self.factor) and self.factor >= 1, "rope_scaling.factor", self.factor, "a number >= 1"
        )
        require_integer(
            "rope_scaling.original_max_position_embeddings", self.original_max_position_embeddings, 1
        )
        ordered = (
            is_number(self.beta_fast) and is_number(self.beta_slow) and self.beta_fast > self.beta_slow > 0
        )
        require(
            ordered,
            "rope_scaling.beta_fast",
            self.beta_fast,
            f"more than beta_slow ({self.beta_slow}), which is > 0",
        )
        for name in ("mscale", "mscale_all_dim"):
            value = getattr(self, name)
            require(is_number(value) and value >= 0, f"rope_scaling.{name}", value, "a number >= 0")

    @property
    def attention_factor(self) -> float:
        """What cos and sin are multiplied by: the ratio of the two temperatures (V3: 1)."""
        return yarn_temperature(self.factor, self.mscale) / yarn_temperature(self.factor, self.mscale_all_dim)


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (Chen et al. 2023): every frequency divided by ``factor``; no temperature.

    Args:
        factor: how many times longer the context becomes.
    """

    factor: float
    attention_factor: ClassVar[float] = 1.0
    mscale_all_dim: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        require(
            is_number(self.factor) and self.factor >= 1, "rope_scaling.factor", self.factor, "a number >= 1"
        )


Scaling = YarnScaling | LinearScaling


def scaling_fields(scaling: Scaling) -> dict[str, Any]:
    """The settings as they stand under ``rope_scaling`` in a ``config.json``."""
    kind = "yarn" if isinstance(scaling, YarnScaling) else "linear"
    return {"type": kind, **dataclasses.asdict(scaling)}


_KINDS: Mapping[str, type[Scaling] | None] = MappingProxyType(
    {"default": None, "yarn": YarnScaling, "linear": LinearScaling}
)


def yarn_temperature(factor: float, weight: float) -> float:
    """0.1·weight·ln(factor) + 1, the attention temperature of YaRN; 1 where nothing is stretched."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def read_rope(fields: dict[str, Any], oddities: list[str]) -> dict[str, Any]:
    """Take RoPE's settings out of ``fields``, in the released form, transformers' form, or both if they agree.

    Args:
        fields: of a ``config.json``; what is read is taken out. oddities: what changes no number is told here.

    Raises:
        ConfigError: they contradict each other, or mean another rotary embedding than V3's.
    """
    old, new = fields.pop("rope_scaling", None), fields.pop("rope_parameters", None)
    theta = fields.pop("rope_theta", None)
    _require_whole_rotation(fields.pop("partial_rotary_factor", None), "partial_rotary_factor")
    outer = {
        "original": fields.pop("original_max_position_embeddings", None),
        "longest": fields.get("max_position_embeddings"),
    }
    for name, value in (("rope_scaling", old), ("rope_parameters", new)):
        is_settings = value is None or isinstance(value, Mapping | Scaling)
        require(is_settings, name, value, "null or an object with YaRN's settings")
    found: dict[str, Any] = {}
    if old is not None:
        is_read = isinstance(old, Scaling)
        found["rope_scaling"] = old if is_read else _read_scaling(dict(old), "rope_scaling", outer, oddities)
    if new is not None:
        new = dict(new)
        inner = new.pop("rope_theta", None)
        if inner is not None:
            require(theta in (None, inner), "rope_theta", theta, f"rope_parameters.rope_theta ({inner})")
            theta = inner
        yarn = _read_scaling(new, "rope_parameters", outer, oddities)
        agrees = "rope_scaling" not in found or found["rope_scaling"] == yarn
        require(agrees, "rope_parameters", new, "what rope_scaling says, or only one of the two fields")
        found["rope_scaling"] = yarn
    if theta is not None:
        found["rope_theta"] = theta
    return found


def _read_scaling(
    settings: dict[str, Any], where: str, outer: Mapping[str, Any], oddities: list[str]
) -> Scaling | None:
    """YaRN's or position interpolation's settings from a JSON object; ``None`` for plain RoPE.

    Args:
        settings: the object. where: its field's name. outer: the lengths that stand beside the object.
        oddities: what changes no number is told here.
    """
    names = {settings.pop("type", None), settings.pop("rope_type", None)} - {None}
    require(len(names) <= 1, f"{where}.type", names, "one type")
    kind = names.pop() if names else "default"
    require(kind in _KINDS, f"{where}.type", kind, "'yarn', 'linear' or 'default'")
    if settings.pop("truncate", True) not in (True, None):
        raise ConfigError(
            f"{where}.truncate: False, expected true (V3 rounds the ramp's ends to whole dimensions)"
        )
    settings.pop("rope_theta", None)
    _require_whole_rotation(settings.pop("partial_rotary_factor", None), f"{where}.partial_rotary_factor")
    attention_factor = settings.pop("attention_factor", None)
    known = {f.name for f in dataclasses.fields(_KINDS[kind])} if _KINDS[kind] else set()
    for name in [name for name in settings if name not in known]:
        meant = difflib.get_close_matches(name, [n for n in known if n not in settings], 1, _LIKE)
        if meant:
            raise ConfigError(f"unknown field '{where}.{name}'; is {meant[0]!r} meant? Correct or remove it")
        oddities.append(f"{where}.{name} is passed over; rope of the type {kind!r} does not use it")
        del settings[name]
    if kind == "default":
        return None
    settings = {k: v for k, v in settings.items() if v is not None}
    if kind == "linear":
        require("factor" in settings, f"{where}.factor", None, "how many times longer the context becomes")
        require(attention_factor in (None, 1), f"{where}.attention_factor", attention_factor, "null or 1")
        return LinearScaling(**as_floats(LinearScaling, settings))
    if outer["original"] is not None:
        settings.setdefault("original_max_position_embeddings", outer["original"])
    original = settings.get("original_max_position_embeddings")
    if original is None:
        raise ConfigError(f"missing field '{where}.original_max_position_embeddings'")
    if "factor" not in settings:  # as transformers: the context's length against the trained one
        if not (is_integer(outer["longest"]) and is_integer(original) and original > 0):
            raise ConfigError(f"missing field '{where}.factor'")
        settings["factor"] = outer["longest"] / original
    yarn = YarnScaling(**as_floats(YarnScaling, settings))
    if attention_factor is not None:
        follows = yarn.attention_factor
        agrees = is_number(attention_factor) and math.isclose(attention_factor, follows, rel_tol=1e-6)
        require(agrees, f"{where}.attention_factor", attention_factor, f"null or what follows, {follows:g}")
    elif not (settings.get("mscale") and yarn.mscale_all_dim):
        theirs = yarn_temperature(yarn.factor, 1.0)
        if not math.isclose(theirs, yarn.attention_factor):
            oddities.append(
                f"{where}: without both mscale and mscale_all_dim, cos and sin are multiplied by "
                f"{yarn.attention_factor:g} as in DeepSeek's code, where transformers multiplies by {theirs:g}"
            )
    return yarn


def _require_whole_rotation(factor: Any, name: str) -> None:
    require(factor in (None, 1), name, factor, "1.0: all of the decoupled dimensions are rotated")


def as_floats(cls: type, fields: dict[str, Any]) -> dict[str, Any]:
    """JSON writes 10000 where 10000.0 is meant."""
    floats = {f.name for f in dataclasses.fields(cls) if f.type == "float"}
    return {k: float(v) if k in floats and is_integer(v) and is_number(v) else v for k, v in fields.items()}
