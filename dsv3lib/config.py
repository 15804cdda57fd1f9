"""The configuration: every size of DeepSeek-V3 under the field name of Hugging Face's ``config.json``.

One frozen dataclass describes a model of any size. Three presets ship as JSON beside this file's folder
``configs/``: ``nano`` (tests), ``tiny`` (trains on a laptop) and ``v3-671b`` (the released model). Every
inconsistency is refused here, with the field's name, before any weight is allocated.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from .checks import is_integer, is_number, require, require_integer
from .config_json import FIXED, read_fields
from .errors import ConfigError
from .rope_settings import Scaling, as_floats, scaling_fields, yarn_temperature

PRESETS = ("nano", "tiny", "tiny-v3", "v3-671b")

_POSITIVE = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
    "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group",
    "max_position_embeddings", "num_key_value_heads",
)  # fmt: skip
_MOST_ELEMENTS = 2**60  # of one tensor: eight bytes each are just within torch's 64 bits


@dataclass(frozen=True)
class ModelConfig:
    """All that defines a DeepSeek-V3 model (paper §4.2; symbols of the paper on the right).

    Args:
        vocab_size: number of token ids.
        hidden_size: d, width of the residual stream.
        intermediate_size: width of the dense layers' feed-forward network.
        moe_intermediate_size: width of one expert.
        num_hidden_layers: L, without the MTP modules.
        num_attention_heads: n_h.
        kv_lora_rank: d_c, width of the joint key-value latent.
        q_lora_rank: d_c', width of the query latent; ``None`` projects queries directly.
        qk_nope_head_dim: d_h, content dimensions of a head's key.
        qk_rope_head_dim: d_h^R, decoupled rotary dimensions (even).
        v_head_dim: width of a head's value.
        n_routed_experts: N_r. n_shared_experts: N_s, may be 0. num_experts_per_tok: K_r.
        n_group: number of expert groups (nodes). topk_group: M, groups that one token may use.
        first_k_dense_replace: how many layers, from the first, are dense instead of mixtures.
        num_nextn_predict_layers: D, number of MTP modules.
        max_position_embeddings: longest context, in tokens.
        num_key_value_heads: equals ``num_attention_heads`` in V3 (the latent replaces shared heads).
        routed_scaling_factor: what the gate values sum to. norm_topk_prob: whether they are normalised.
        rope_theta: base of RoPE's frequencies. rope_scaling: YaRN's settings (or position
            interpolation's), or ``None``.
        rope_interleave: how a *checkpoint* orders rotary dims: neighbours are pairs (V3) or two halves.
        rms_norm_eps: epsilon of every RMSNorm. initializer_range: standard deviation at initialisation
            (the paper says 0.006, the released configuration 0.02).
        attention_bias: biases on the down-projections and the output projection (V3: none).
        tie_word_embeddings: one matrix for embedding and head (V3: two).
        aux_loss_alpha: α of the sequence-wise balance loss (Eq. 17); the released file omits it, the
            paper says 1e-4. mtp_loss_weight: λ of the MTP loss (Eq. 25).
        bos_token_id, eos_token_id, pad_token_id: special tokens; ``None`` where there is none. Several tokens
            may end a text: ``eos_token_id`` is then a tuple.

    Raises:
        ConfigError: a value is missing, out of range or contradicts another; it names the field.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    num_experts_per_tok: int
    q_lora_rank: int | None = None
    n_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    first_k_dense_replace: int = 0
    num_nextn_predict_layers: int = 1
    max_position_embeddings: int = 4096
    num_key_value_heads: int | None = None
    routed_scaling_factor: float = 2.5
    norm_topk_prob: bool = True
    rope_theta: float = 10000.0
    rope_scaling: Scaling | None = None
    rope_interleave: bool = True
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    aux_loss_alpha: float = 1e-4
    mtp_loss_weight: float = 0.3
    bos_token_id: int | None = 0
    eos_token_id: int | tuple | None = 1  # a tuple of integers
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        for name in _POSITIVE:
            require_integer(name, getattr(self, name), 1)
        for name in ("first_k_dense_replace", "num_nextn_predict_layers", "n_shared_experts"):
            require_integer(name, getattr(self, name), 0)
        if self.q_lora_rank is not None:
            require_integer("q_lora_rank", self.q_lora_rank, 1)
        scale, theta = self.routed_scaling_factor, self.rope_theta
        require(is_number(scale) and scale > 0, "routed_scaling_factor", scale, "a finite number > 0")
        grows = is_number(theta) and theta > 1
        require(grows, "rope_theta", theta, "a finite number > 1: later pairs of dimensions turn more slowly")
        for name in ("rms_norm_eps", "initializer_range", "aux_loss_alpha", "mtp_loss_weight"):
            value = getattr(self, name)
            require(is_number(value) and value >= 0, name, value, "a finite number >= 0")
        for name in ("norm_topk_prob", "rope_interleave", "attention_bias", "tie_word_embeddings"):
            require(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")
        self._check_relations()
        self._check_sizes()

    def _check_relations(self) -> None:
        heads, layers = self.num_attention_heads, self.num_hidden_layers
        experts, groups, kept = self.n_routed_experts, self.n_group, self.topk_group
        require(
            self.num_key_value_heads == heads, "num_key_value_heads", self.num_key_value_heads,
            f"num_attention_heads ({heads}): the latent replaces shared key-value heads",
        )  # fmt: skip
        require(
            self.qk_rope_head_dim % 2 == 0,
            "qk_rope_head_dim",
            self.qk_rope_head_dim,
            "an even number (pairs)",
        )
        require(
            self.first_k_dense_replace <= layers, "first_k_dense_replace", self.first_k_dense_replace,
            f"at most num_hidden_layers ({layers})",
        )  # fmt: skip
        require(experts % groups == 0, "n_group", groups, f"a divisor of n_routed_experts ({experts})")
        per_group = experts // groups
        require(
            groups == 1 or per_group >= 2, "n_group", groups,
            f"at most n_routed_experts / 2 ({experts // 2}): a group is scored by its two best experts",
        )  # fmt: skip
        require(kept <= groups, "topk_group", kept, f"at most n_group ({groups})")
        require(
            self.num_experts_per_tok <= kept * per_group, "num_experts_per_tok", self.num_experts_per_tok,
            f"at most the {kept * per_group} experts that the {kept} kept groups of {per_group} hold",
        )  # fmt: skip
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            several = name == "eos_token_id" and isinstance(value, tuple) and len(value) > 0
            ids = value if several else () if value is None else (value,)
            inside = all(is_integer(i) and 0 <= i < self.vocab_size for i in ids)
            require(inside, name, value, f"null or an integer in [0, {self.vocab_size})")
        is_yarn = self.rope_scaling is None or isinstance(self.rope_scaling, Scaling)
        require(is_yarn, "rope_scaling", self.rope_scaling, "null or a YarnScaling (from_dict takes JSON)")

    def _check_sizes(self) -> None:
        """Every matrix must be one that torch can address; on the meta device nothing else would stop it."""
        d, heads = self.hidden_size, self.num_attention_heads
        for name, elements in (
            ("hidden_size", 2 * d * d),
            ("vocab_size", self.vocab_size * d),
            ("q_lora_rank", (self.q_lora_rank or 0) * d),
            ("intermediate_size", self.intermediate_size * d),
            ("moe_intermediate_size", self.moe_intermediate_size * d * 2 * self.n_routed_experts),
            ("n_shared_experts", self.moe_intermediate_size * d * self.n_shared_experts),
            ("kv_lora_rank", self.latent_dim * d),
            ("v_head_dim", heads * (self.qk_nope_head_dim + self.v_head_dim) * self.kv_lora_rank),
            (
                "num_attention_heads",
                heads * (self.qk_head_dim + self.v_head_dim) * max(d, self.q_lora_rank or 0),
            ),
        ):
            require(
                elements <= _MOST_ELEMENTS, name, getattr(self, name),
                f"a size whose matrix has at most 2^60 elements, not {elements:.1e}",
            )  # fmt: skip

    # ---- sizes that follow from the fields -------------------------------------------------------------

    @property
    def qk_head_dim(self) -> int:
        """Width of a head's query and key: content plus decoupled rotary dimensions (V3: 192)."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Values cached per token and layer: the latent and the one shared rotary key (V3: 576)."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """1/√(d_h + d_h^R), times YaRN's squared temperature where YaRN is on (V3: 0.135234)."""
        scale = self.qk_head_dim**-0.5
        if self.rope_scaling is not None and self.rope_scaling.mscale_all_dim:
            scale *= yarn_temperature(self.rope_scaling.factor, self.rope_scaling.mscale_all_dim) ** 2
        return scale

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a text, be it none, one or several."""
        value = self.eos_token_id
        return value if isinstance(value, tuple) else () if value is None else (value,)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that are mixtures, MTP modules (counted on from the last layer) included."""
        return tuple(
            range(self.first_k_dense_replace, self.num_hidden_layers + self.num_nextn_predict_layers)
        )

    # ---- in and out ------------------------------------------------------------------------------------

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """One of the shipped configurations: ``nano``, ``tiny``, ``tiny-v3`` or ``v3-671b``.

        Raises:
            ConfigError: there is no preset of that name.
        """
        if name not in PRESETS:
            raise ConfigError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
        text = resources.files("dsv3lib").joinpath("configs", f"{name}.json").read_text(encoding="utf-8")
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_json(cls, path: str | Path) -> ModelConfig:
        """Read a Hugging Face ``config.json`` (or the folder that holds one).

        Raises:
            ConfigError: no such file, not JSON, or as ``from_dict``.
        """
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}); expected a config.json") from error
        except ValueError as error:
            raise ConfigError(f"{path}: is not valid JSON ({error}); the file may be truncated") from error
        if not isinstance(fields, dict):
            raise ConfigError(f"{path}: holds a {type(fields).__name__}, expected a JSON object")
        try:
            config, oddities = cls._read(fields)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        for oddity in oddities:
            warnings.warn(f"{path}: {oddity}", stacklevel=2)
        return config

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ModelConfig:
        """Build from the fields of a ``config.json``, in any dialect that transformers reads (``config_json``).

        What is odd about them and changes no number is told as a warning.

        Raises:
            ConfigError: a field is missing, out of range, of another architecture, or contradicts another.
        """
        config, oddities = cls._read(fields)
        for oddity in oddities:
            warnings.warn(oddity, stacklevel=2)
        return config

    @classmethod
    def _read(cls, fields: Mapping[str, Any]) -> tuple[ModelConfig, list[str]]:
        known = {f.name: f.default is not dataclasses.MISSING for f in dataclasses.fields(cls)}
        read, oddities = read_fields(fields, known)
        return cls(**as_floats(cls, read)), oddities

    def to_dict(self) -> dict[str, Any]:
        """The fields as they stand in a released ``config.json``, so that transformers reads them too."""
        fields: dict[str, Any] = {
            "architectures": ["DeepseekV3ForCausalLM"],
            **FIXED,
            **dataclasses.asdict(self),
        }
        if self.rope_scaling is not None:
            fields["rope_scaling"] = scaling_fields(self.rope_scaling)
        if isinstance(self.eos_token_id, tuple):
            fields["eos_token_id"] = list(self.eos_token_id)
        return fields

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed, checked again as a whole.

        Raises:
            ConfigError: a field is unknown or the result contradicts itself.
        """
        unknown = sorted(set(changes) - {f.name for f in dataclasses.fields(self)})
        if unknown:
            raise ConfigError(f"unknown field {unknown[0]!r}; see ModelConfig for the fields there are")
        if "num_attention_heads" in changes:
            changes.setdefault("num_key_value_heads", changes["num_attention_heads"])
        return dataclasses.replace(self, **changes)
