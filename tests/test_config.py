"""ModelConfig: what it reads, what it refuses, and what follows from it."""

import dataclasses
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import configs, small, unchecked

from dsv3lib import ModelConfig, YarnScaling
from dsv3lib.config import PRESETS
from dsv3lib.errors import ConfigError, Dsv3Error
from dsv3lib.rope_settings import yarn_temperature

YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}


def fields(**changes: Any) -> dict[str, Any]:
    """The fields of a valid config.json, with some changed; the value ``...`` takes a field out."""
    every = small(max_position_embeddings=2048).to_dict() | changes
    return {name: value for name, value in every.items() if value is not ...}


# ---- what stands in the released file --------------------------------------------------------------------


def test_v3_has_the_sizes_of_the_released_file() -> None:
    cfg = ModelConfig.preset("v3-671b")
    assert (cfg.vocab_size, cfg.hidden_size, cfg.intermediate_size) == (129280, 7168, 18432)
    assert (cfg.moe_intermediate_size, cfg.num_hidden_layers, cfg.first_k_dense_replace) == (2048, 61, 3)
    assert (cfg.num_attention_heads, cfg.q_lora_rank, cfg.kv_lora_rank) == (128, 1536, 512)
    assert (cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim) == (128, 64, 128)
    assert (cfg.n_routed_experts, cfg.n_shared_experts, cfg.num_experts_per_tok) == (256, 1, 8)
    assert (cfg.n_group, cfg.topk_group, cfg.routed_scaling_factor) == (8, 4, 2.5)
    assert (cfg.qk_head_dim, cfg.latent_dim) == (192, 576)
    assert cfg.norm_topk_prob and not cfg.tie_word_embeddings and cfg.rope_interleave
    assert cfg.max_position_embeddings == 163840 and cfg.num_nextn_predict_layers == 1


def test_the_balance_loss_is_on_where_the_released_file_is_silent() -> None:
    assert ModelConfig.preset("v3-671b").aux_loss_alpha == 1e-4


def test_v3_s_softmax_scale_has_yarn_s_squared_temperature() -> None:
    cfg = ModelConfig.preset("v3-671b")
    assert cfg.softmax_scale == pytest.approx(0.135234, abs=5e-7)
    assert cfg.softmax_scale * math.sqrt(192) == pytest.approx((0.1 * math.log(40) + 1) ** 2)
    assert cfg.softmax_scale * math.sqrt(192) == pytest.approx(1.87385, abs=5e-6)
    assert cfg.replace(rope_scaling=None).softmax_scale == pytest.approx(192**-0.5)


def test_mscale_all_dim_of_zero_leaves_the_softmax_scale() -> None:
    yarn = YarnScaling(factor=40.0, original_max_position_embeddings=4096, mscale_all_dim=0.0)
    assert small(rope_scaling=yarn).softmax_scale == pytest.approx(10**-0.5)


def test_temperature_is_one_where_nothing_is_stretched() -> None:
    assert yarn_temperature(1.0, 1.0) == 1.0
    assert yarn_temperature(math.e**10, 1.0) == pytest.approx(2.0)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_read_and_written_back(name: str) -> None:
    cfg = ModelConfig.preset(name)
    assert ModelConfig.from_dict(cfg.to_dict()) == cfg


def test_moe_layers_count_mtp_modules_on() -> None:
    cfg = small(num_hidden_layers=4, first_k_dense_replace=2, num_nextn_predict_layers=2)
    assert cfg.moe_layers == (2, 3, 4, 5)


@given(config=configs())
def test_every_configuration_survives_the_road_through_json(config: ModelConfig) -> None:
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_configuration_is_frozen_and_can_be_a_key() -> None:
    cfg = small()
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.hidden_size = 3
    assert len({cfg, small(), small(hidden_size=8)}) == 2


# ---- the dialects of config.json --------------------------------------------------------------------------


def test_both_names_of_rope_settings_say_the_same() -> None:
    old = ModelConfig.from_dict(fields(rope_scaling=YARN, rope_theta=500.0))
    new = {k: v for k, v in YARN.items() if k != "type"} | {"rope_type": "yarn", "rope_theta": 500.0}
    assert old.rope_theta == 500.0 and old.rope_scaling.factor == 40
    assert ModelConfig.from_dict(fields(rope_scaling=..., rope_theta=..., rope_parameters=new)) == old
    assert ModelConfig.from_dict(fields(rope_scaling=YARN, rope_theta=500.0, rope_parameters=new)) == old


@pytest.mark.parametrize("kind", ["type", "rope_type"])
def test_plain_rope_may_be_written_out(kind: str) -> None:
    plain = {kind: "default", "rope_theta": 77.0}
    cfg = ModelConfig.from_dict(fields(rope_scaling=..., rope_theta=..., rope_parameters=plain))
    assert cfg.rope_scaling is None and cfg.rope_theta == 77.0


def test_fields_that_are_not_the_model_s_are_passed_over() -> None:
    habits = {"torch_dtype": "bfloat16", "use_cache": True, "transformers_version": "5.23.0", "ep_size": 1}
    assert ModelConfig.from_dict(fields(**habits)) == ModelConfig.from_dict(fields())


@pytest.mark.parametrize(
    ("extra", "name", "value"),
    [
        ({"num_mtp_layers": 1}, "num_nextn_predict_layers", 1),
        ({"num_mtp_layers": 3, "num_nextn_predict_layers": ...}, "num_nextn_predict_layers", 3),
        ({"num_local_experts": 8}, "n_routed_experts", 8),
        ({"head_dim": 4, "qk_head_dim": 10}, "qk_head_dim", 10),
        ({"eos_token_id": [7, 8]}, "eos_token_id", (7, 8)),
        ({"eos_token_id": [7]}, "eos_token_id", (7,)),
        ({"eos_token_id": []}, "eos_token_id", None),
        ({"eos_token_id": None}, "eos_token_id", None),
        ({"q_lora_rank": None}, "q_lora_rank", None),
        ({"initializer_range": None}, "initializer_range", 0.02),
        ({"norm_topk_prob": None}, "norm_topk_prob", False),
        ({"rope_interleave": None}, "rope_interleave", False),
        ({"scoring_func": None, "seq_aux": None}, "n_shared_experts", 1),
        ({"n_shared_experts": 0}, "n_shared_experts", 0),
        ({"partial_rotary_factor": 1.0}, "rope_theta", 10000.0),
        ({"num_key_value_heads": None}, "num_key_value_heads", 3),
    ],
)
def test_other_code_bases_spellings_are_read(extra: dict, name: str, value: object) -> None:
    assert getattr(ModelConfig.from_dict(fields(**extra)), name) == value


# ---- what is refused, and that the message names the field ------------------------------------------------

WRONG = [
    # not a number of the right kind
    *[
        ({name: value}, name)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "kv_lora_rank", "v_head_dim",
                     "intermediate_size", "moe_intermediate_size", "qk_nope_head_dim",
                     "num_attention_heads", "max_position_embeddings", "num_experts_per_tok", "q_lora_rank")
        for value in (0, -3, 2.5, "8", True)
    ],
    *[({name: -1}, name) for name in ("first_k_dense_replace", "num_nextn_predict_layers", "n_shared_experts")],
    *[
        ({name: value}, name)
        for name in ("routed_scaling_factor", "rope_theta", "rms_norm_eps", "initializer_range")
        for value in (-1.0, math.nan, math.inf, 10**400, "1")
    ],
    *[({"routed_scaling_factor": 0}, "routed_scaling_factor")],
    *[({"rope_theta": value}, "rope_theta") for value in (0, 0.5, 1.0)],
    # a matrix that torch cannot address
    *[
        ({name: value}, name)
        for name in ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "v_head_dim",
                     "n_shared_experts", "q_lora_rank")
        for value in (2**57, 2**63, 2**200)
    ],
    # a null that says nothing about the numbers
    *[
        ({name: None}, name)
        for name in ("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", "rms_norm_eps",
                     "routed_scaling_factor", "tie_word_embeddings", "attention_bias")
    ],
    *[({name: value}, name) for name in ("aux_loss_alpha", "mtp_loss_weight") for value in (-1e-4, math.nan)],
    *[
        ({name: value}, name)
        for name in ("norm_topk_prob", "rope_interleave", "attention_bias", "tie_word_embeddings")
        for value in (1, "true")
    ],
    # fields that contradict one another
    ({"num_key_value_heads": 1}, "num_key_value_heads"),
    ({"qk_rope_head_dim": 5}, "qk_rope_head_dim"),
    ({"n_group": 3}, "n_group"),
    ({"n_group": 8}, "n_group"),
    ({"topk_group": 5}, "topk_group"),
    ({"num_experts_per_tok": 5}, "num_experts_per_tok"),
    ({"eos_token_id": "1"}, "eos_token_id"),
    ({"eos_token_id": [1, "2"]}, "eos_token_id"),
    ({"bos_token_id": [0]}, "bos_token_id"),
    ({"pad_token_id": "0"}, "pad_token_id"),
    ({"head_dim": 6}, "head_dim"),
    ({"num_local_experts": 4}, "num_local_experts"),
    # another architecture
    ({"model_type": "llama"}, "model_type"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"scoring_func": "softmax"}, "scoring_func"),
    ({"topk_method": "greedy"}, "topk_method"),
    ({"moe_layer_freq": 2}, "moe_layer_freq"),
    # unknown and missing
    ({"hidden_size": ...}, "hidden_size"),
    ({"vocab_size": None}, "vocab_size"),
    ({"rms_norm_epz": 1e-5, "rms_norm_eps": ...}, "rms_norm_eps"),
    # YaRN
    *[({"partial_rotary_factor": value}, "partial_rotary_factor") for value in (0.5, 0, "1")],
    ({"rope_scaling": YARN | {"partial_rotary_factor": 0.5}}, "rope_scaling.partial_rotary_factor"),
    ({"rope_scaling": YARN | {"attention_factor": 1.5}}, "rope_scaling.attention_factor"),
    ({"rope_scaling": "yarn"}, "rope_scaling"),
    ({"rope_scaling": YARN | {"type": "llama3"}}, "rope_scaling.type"),
    ({"rope_scaling": YARN | {"rope_type": "default"}}, "rope_scaling.type"),
    ({"rope_scaling": YARN | {"factor": 0.5}}, "rope_scaling.factor"),
    ({"rope_scaling": YARN | {"factor": "40"}}, "rope_scaling.factor"),
    ({"rope_scaling": YARN | {"beta_fast": 1, "beta_slow": 32}}, "rope_scaling.beta_fast"),
    ({"rope_scaling": YARN | {"mscale": -1}}, "rope_scaling.mscale"),
    ({"rope_scaling": YARN | {"mscale_all_dim": math.nan}}, "rope_scaling.mscale_all_dim"),
    ({"rope_scaling": YARN | {"original_max_position_embeddings": 0}}, "original_max_position_embeddings"),
    ({"rope_scaling": {"type": "yarn", "factor": 40}}, "original_max_position_embeddings"),
    ({"rope_scaling": YARN | {"betafast": 2}}, "betafast"),
    ({"rope_scaling": YARN | {"truncate": False}}, "truncate"),
    ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}}, "rope_parameters"),
    ({"rope_theta": 5.0, "rope_parameters": {"rope_type": "default", "rope_theta": 6.0}}, "rope_theta"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "name"), WRONG, ids=lambda case: str(case)[:60])
def test_a_wrong_field_is_refused_by_name(changes: dict, name: str) -> None:
    with unchecked(), pytest.raises(ConfigError, match=name.replace(".", r"\.")):
        ModelConfig.from_dict(fields(**changes))


def test_the_base_of_these_cases_is_valid() -> None:
    """Else every refusal above would prove nothing."""
    assert ModelConfig.from_dict(fields()) == small(max_position_embeddings=2048)
    ModelConfig.from_dict(fields(rope_scaling=YARN))


@given(
    config=configs(),
    name=st.sampled_from(sorted(f.name for f in dataclasses.fields(ModelConfig))),
    value=st.one_of(st.integers(-3, 300), st.floats(), st.none(), st.booleans(), st.text(max_size=3)),
)
def test_any_change_gives_a_valid_configuration_or_a_typed_error(
    config: ModelConfig, name: str, value: object
) -> None:
    """Never another exception, never a configuration that its own reader would refuse."""
    try:
        with unchecked(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            changed = ModelConfig.from_dict(config.to_dict() | {name: value})
    except ConfigError as error:
        assert isinstance(error, Dsv3Error) and str(error)
    else:
        assert ModelConfig.from_dict(changed.to_dict()) == changed


def test_replace_checks_the_whole_again() -> None:
    assert small().replace(num_attention_heads=7).num_key_value_heads == 7
    with pytest.raises(ConfigError, match="topk_group"):
        small().replace(n_group=1)
    with pytest.raises(ConfigError, match="hidden_dim"):
        small().replace(hidden_dim=3)


def test_rope_settings_of_another_kind_are_refused_in_the_constructor() -> None:
    with unchecked(), pytest.raises(ConfigError, match="rope_scaling"):
        small(rope_scaling={"factor": 40})


def test_an_unknown_preset_is_answered_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"'huge'.*nano, tiny, tiny-v3, v3-671b"):
        ModelConfig.preset("huge")


@pytest.mark.parametrize(
    ("text", "says"),
    [('{"hidden_size": 3', "not valid JSON"), ("[1, 2]", "list"), ("\x00\xff", "not valid JSON")],
)
def test_a_damaged_file_is_named(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    for given_path in (path, tmp_path):
        with pytest.raises(ConfigError, match=says) as caught:
            ModelConfig.from_json(given_path)
        assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelConfig.from_json(tmp_path / "config.json")


def test_a_wrong_field_in_a_file_names_file_and_field(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields(topk_group=9)), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"config\.json: topk_group: 9"):
        ModelConfig.from_json(path)
