"""The dialects of ``config.json``: what other code bases write, as the fields of ``ModelConfig``.

One rule: what transformers loads, we load. A field that changes no number is passed over, with a warning where
somebody could have meant something by it. A field that would change the numbers, or whose ``null`` says nothing
about what they are, is an error.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from .checks import is_integer, require
from .errors import ConfigError
from .rope_settings import YarnScaling, read_rope

# Fields of released config.json files that describe the file or a framework's habits, not the model.
_NOT_OF_THE_MODEL = frozenset(
    "architectures auto_map torch_dtype dtype transformers_version use_cache pretraining_tp ep_size "
    "output_router_logits _name_or_path quantization_config attn_implementation _attn_implementation "
    "output_attentions output_hidden_states return_dict chunk_size_feed_forward is_encoder_decoder "
    "id2label label2id problem_type".split()
)
# Fields that other code bases let vary and DeepSeek-V3 does not: accepted at this value only.
FIXED = {
    "model_type": "deepseek_v3",
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "seq_aux": True,
    "attention_dropout": 0.0,
}
# Of these, the ones that scoring alone never meets.
_TRAINING_ONLY = {
    "seq_aux": "the balance loss is taken over each sequence unless aux_loss_over is set to 'batch'",
    "attention_dropout": "there is no dropout in DeepSeek-V3's attention, nor here in training",
}
_UNREAD_BY_OTHERS = ("scoring_func", "topk_method", "moe_layer_freq")  # null: nothing is said
_ALIASES = (("num_mtp_layers", "num_nextn_predict_layers"), ("num_local_experts", "n_routed_experts"))
# Where null is a value, or leaves a default that no number of an inference depends on.
_NULLABLE = frozenset(("q_lora_rank", "rope_scaling", "bos_token_id", "eos_token_id", "pad_token_id"))
_NULL_IS_DEFAULT = frozenset(
    "num_key_value_heads num_nextn_predict_layers max_position_embeddings initializer_range aux_loss_alpha "
    "mtp_loss_weight".split()
)
_NULL_IS_FALSE = frozenset(("norm_topk_prob", "rope_interleave"))  # as Python reads it, in transformers too
_LIKE = 0.85  # from this similarity on, an unknown field is taken for a slip of the pen


def read_fields(fields: Mapping[str, Any], known: Mapping[str, bool]) -> tuple[dict[str, Any], list[str]]:
    """The fields of ``ModelConfig`` that a ``config.json`` gives.

    Args:
        fields: as in the file. known: by the name of each field of ``ModelConfig``, whether it has a default.

    Returns:
        The fields, and what is odd about the file, in words.

    Raises:
        ConfigError: a field is missing, means another architecture, or is null where that says nothing.
    """
    oddities: list[str] = []
    fields = {k: v for k, v in fields.items() if k not in _NOT_OF_THE_MODEL}
    _take_fixed(fields, oddities)
    _take_aliases(fields, oddities)
    fields.update(read_rope(fields, oddities))
    _take_sizes_that_follow(fields, oddities)
    _read_nulls(fields, known)
    for name in [n for n in fields if n not in known]:
        meant = difflib.get_close_matches(name, [n for n in known if n not in fields], 1, _LIKE)
        if meant:
            raise ConfigError(f"unknown field {name!r}; is {meant[0]!r} meant? Correct or remove it")
        oddities.append(f"unknown field {name!r} is passed over; see ModelConfig for the fields there are")
        del fields[name]
    missing = [n for n, has_default in known.items() if not has_default and n not in fields]
    if missing:
        others = f" (and {', '.join(missing[1:])})" if missing[1:] else ""
        raise ConfigError(f"missing field {missing[0]!r}{others}")
    _read_special_tokens(fields, oddities)
    _read_relations(fields, oddities)
    return fields, oddities


def _take_fixed(fields: dict[str, Any], oddities: list[str]) -> None:
    for name, only in FIXED.items():
        value = fields.pop(name, only)
        if value == only or value is None and (name in _UNREAD_BY_OTHERS or name in _TRAINING_ONLY):
            continue
        require(name in _TRAINING_ONLY, name, value, f"{only!r}, the only value that DeepSeek-V3 uses")
        oddities.append(f"{name}: {value!r} is passed over; {_TRAINING_ONLY[name]}")


def _take_aliases(fields: dict[str, Any], oddities: list[str]) -> None:
    """transformers' own names for two of the sizes."""
    for alias, name in _ALIASES:
        value = fields.pop(alias, None)
        if value is None or fields.setdefault(name, value) == value:
            continue
        # How many MTP modules there are, the files say; the main model is the same with any number of them.
        require(name == "num_nextn_predict_layers", alias, value, f"{name} ({fields[name]})")
        oddities.append(f"{alias}: {value!r} is passed over; {name} is {fields[name]!r}")


def _take_sizes_that_follow(fields: dict[str, Any], oddities: list[str]) -> None:
    """Widths that transformers writes beside those from which they follow."""
    nope, rope = fields.get("qk_nope_head_dim"), fields.get("qk_rope_head_dim")
    head_dim, qk_head_dim = fields.pop("head_dim", None), fields.pop("qk_head_dim", None)
    require(head_dim in (None, rope), "head_dim", head_dim, f"qk_rope_head_dim ({rope})")
    if qk_head_dim is not None and is_integer(nope) and is_integer(rope) and qk_head_dim != nope + rope:
        oddities.append(f"qk_head_dim: {qk_head_dim!r} is passed over; nope + rope make {nope + rope}")


def _read_nulls(fields: dict[str, Any], known: Mapping[str, bool]) -> None:
    for name in [n for n, value in fields.items() if value is None and n in known and n not in _NULLABLE]:
        if name in _NULL_IS_FALSE:
            fields[name] = False
        elif name in _NULL_IS_DEFAULT or not known[name]:  # a required one is missing, which is told later
            del fields[name]
        else:
            raise ConfigError(f"{name}: None, expected a value: null does not say which; write it down")


def _read_special_tokens(fields: dict[str, Any], oddities: list[str]) -> None:
    """Tokens that the model has not never come: several hub files hold -1 for "none"."""
    vocab = fields["vocab_size"]
    if isinstance(fields.get("eos_token_id"), list | tuple):
        fields["eos_token_id"] = tuple(fields["eos_token_id"]) or None
    if not is_integer(vocab):
        return  # refused soon
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = fields.get(name)
        ids = value if isinstance(value, tuple) else (value,)
        if value is None or not all(is_integer(i) for i in ids):
            continue
        inside = tuple(i for i in ids if 0 <= i < vocab)
        if inside != ids:
            oddities.append(f"{name}: {value!r} is beyond the vocabulary of {vocab} and is passed over")
            fields[name] = (inside or None) if isinstance(value, tuple) else None


def _read_relations(fields: dict[str, Any], oddities: list[str]) -> None:
    """Contradictions between two fields that leave the numbers as they are."""
    layers, dense = fields["num_hidden_layers"], fields.get("first_k_dense_replace")
    if is_integer(layers) and is_integer(dense) and dense > layers >= 1:
        oddities.append(
            f"first_k_dense_replace: {dense} is more than the {layers} layers there are; all are dense"
        )
        fields["first_k_dense_replace"] = layers
    scaling, longest = fields.get("rope_scaling"), fields.get("max_position_embeddings")
    if isinstance(scaling, YarnScaling) and is_integer(longest):
        reach = scaling.factor * scaling.original_max_position_embeddings
        if longest > reach:
            oddities.append(
                f"max_position_embeddings: {longest} is beyond rope_scaling.factor x "
                f"original_max_position_embeddings ({reach:g}), the length that YaRN stretches to"
            )
