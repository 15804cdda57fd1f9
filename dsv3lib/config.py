"""The configuration: every size of DeepSeek-V3 under the field name of Hugging Face's ``config.json``.

One frozen dataclass describes a model of any size. Three presets ship as JSON beside this file's folder
``configs/``: ``nano`` (tests), ``tiny`` (trains on a laptop) and ``v3-671b`` (the released model). Every
inconsistency is refused here, with the field's name, before any weight is allocated.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from .checks import is_integer, is_number, require, require_integer
from .errors import ConfigError
from .rope_settings import YarnScaling, as_floats, read_rope, yarn_temperature

PRESETS = ("nano", "tiny", "tiny-v3", "v3-671b")

# Fields of released config.json files that describe the file or a framework's habits, not the model.
_NOT_OF_THE_MODEL = frozenset(
    "architectures auto_map torch_dtype dtype transformers_version use_cache pretraining_tp ep_size "
    "output_router_logits _name_or_path quantization_config attn_implementation _attn_implementation "
    "output_attentions output_hidden_states return_dict chunk_size_feed_forward is_encoder_decoder "
    "id2label label2id problem_type".split()
)
# Fields that other code bases let vary and DeepSeek-V3 does not: accepted at this value only.
_FIXED = {
    "model_type": "deepseek_v3",
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "seq_aux": True,
    "attention_dropout": 0.0,
}


_POSITIVE = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
    "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group",
    "max_position_embeddings", "num_key_value_heads",
)  # fmt: skip


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
        n_routed_experts: N_r. n_shared_experts: N_s. num_experts_per_tok: K_r.
        n_group: number of expert groups (nodes). topk_group: M, groups that one token may use.
        first_k_dense_replace: how many layers, from the first, are dense instead of mixtures.
        num_nextn_predict_layers: D, number of MTP modules.
        max_position_embeddings: longest context, in tokens.
        num_key_value_heads: equals ``num_attention_heads`` in V3 (the latent replaces shared heads).
        routed_scaling_factor: what the gate values sum to. norm_topk_prob: whether they are normalised.
        rope_theta: base of RoPE's frequencies. rope_scaling: YaRN's settings, or ``None``.
        rope_interleave: how a *checkpoint* orders rotary dims: neighbours are pairs (V3) or two halves.
        rms_norm_eps: epsilon of every RMSNorm. initializer_range: standard deviation at initialisation
            (the paper says 0.006, the released configuration 0.02).
        attention_bias: biases on the down-projections and the output projection (V3: none).
        tie_word_embeddings: one matrix for embedding and head (V3: two).
        aux_loss_alpha: α of the sequence-wise balance loss (Eq. 17); the released file omits it, the
            paper says 1e-4. mtp_loss_weight: λ of the MTP loss (Eq. 25).
        bos_token_id, eos_token_id, pad_token_id: special tokens; ``None`` where there is none.

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
    rope_scaling: YarnScaling | None = None
    rope_interleave: bool = True
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    aux_loss_alpha: float = 1e-4
    mtp_loss_weight: float = 0.3
    bos_token_id: int | None = 0
    eos_token_id: int | None = 1
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        for name in _POSITIVE:
            require_integer(name, getattr(self, name), 1)
        for name in ("first_k_dense_replace", "num_nextn_predict_layers"):
            value = getattr(self, name)
            require(is_integer(value) and value >= 0, name, value, "an integer >= 0")
        if self.q_lora_rank is not None:
            require_integer("q_lora_rank", self.q_lora_rank, 1)
        for name in ("routed_scaling_factor", "rope_theta", "rms_norm_eps", "initializer_range"):
            value = getattr(self, name)
            require(is_number(value) and value > 0, name, value, "a finite number > 0")
        for name in ("aux_loss_alpha", "mtp_loss_weight"):
            value = getattr(self, name)
            require(is_number(value) and value >= 0, name, value, "a finite number >= 0")
        for name in ("norm_topk_prob", "rope_interleave", "attention_bias", "tie_word_embeddings"):
            require(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")
        self._check_relations()

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
            inside = value is None or (is_integer(value) and 0 <= value < self.vocab_size)
            require(inside, name, value, f"null or an integer in [0, {self.vocab_size})")
        if self.rope_scaling is not None:
            is_yarn = isinstance(self.rope_scaling, YarnScaling)
            require(
                is_yarn, "rope_scaling", self.rope_scaling, "null or a YarnScaling (from_dict takes JSON)"
            )
            reach = self.rope_scaling.factor * self.rope_scaling.original_max_position_embeddings
            require(
                self.max_position_embeddings <= math.ceil(reach), "max_position_embeddings",
                self.max_position_embeddings,
                f"at most rope_scaling.factor x original_max_position_embeddings ({reach:g})",
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
            ConfigError: no such file, not JSON, an unknown field, or a contradiction.
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
            return cls.from_dict(fields)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ModelConfig:
        """Build from the fields of a ``config.json``; both ``rope_scaling`` and ``rope_parameters`` are read.

        Raises:
            ConfigError: a field is unknown, missing, out of range or contradicts another.
        """
        fields = {k: v for k, v in fields.items() if k not in _NOT_OF_THE_MODEL}
        for name, only in _FIXED.items():
            value = fields.pop(name, only)
            require(value == only, name, value, f"{only!r}, the only value that DeepSeek-V3 uses")
        # transformers writes sizes that follow from others, and its own name for the MTP depth.
        head_dim = fields.pop("head_dim", None)
        qk_head_dim = fields.pop("qk_head_dim", None)
        for alias, name in (
            ("num_mtp_layers", "num_nextn_predict_layers"),
            ("num_local_experts", "n_routed_experts"),
        ):
            if alias in fields:
                value = fields.pop(alias)
                require(fields.setdefault(name, value) == value, alias, value, f"{name} ({fields[name]})")
        if isinstance(fields.get("eos_token_id"), list):
            fields["eos_token_id"] = fields["eos_token_id"][0] if fields["eos_token_id"] else None
        fields.update(read_rope(fields))
        # In config.json a null means «as the default», but for the three fields where null is a value.
        known = {f.name: f for f in dataclasses.fields(cls)}
        nullable = {"q_lora_rank", "rope_scaling", "bos_token_id", "eos_token_id", "pad_token_id"}
        fields = {k: v for k, v in fields.items() if v is not None or k in nullable or k not in known}
        for name in fields:
            if name not in known:
                raise ConfigError(
                    f"unknown field {name!r}; remove it, or see ModelConfig for the fields there are"
                )
        missing = [n for n, f in known.items() if f.default is dataclasses.MISSING and n not in fields]
        if missing:
            raise ConfigError(
                f"missing field {missing[0]!r}" + (f" (and {', '.join(missing[1:])})" if missing[1:] else "")
            )
        config = cls(**as_floats(cls, fields))
        if head_dim is not None:
            require(
                head_dim == config.qk_rope_head_dim,
                "head_dim",
                head_dim,
                f"qk_rope_head_dim ({config.qk_rope_head_dim})",
            )
        if qk_head_dim is not None:
            require(
                qk_head_dim == config.qk_head_dim,
                "qk_head_dim",
                qk_head_dim,
                f"nope + rope ({config.qk_head_dim})",
            )
        return config

    def to_dict(self) -> dict[str, Any]:
        """The fields as they stand in a released ``config.json``, so that transformers reads them too."""
        fields: dict[str, Any] = {
            "architectures": ["DeepseekV3ForCausalLM"],
            **_FIXED,
            **dataclasses.asdict(self),
        }
        if self.rope_scaling is not None:
            fields["rope_scaling"] = {"type": "yarn", **fields["rope_scaling"]}
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
