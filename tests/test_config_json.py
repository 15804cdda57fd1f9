"""Foreign config.json files: what transformers loads is loaded here, to the same logits; where odd, with a word."""

import math
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import edit_json
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, build, small, tokens

from dsv3lib import DeepSeekV3, ModelConfig, YarnScaling
from dsv3lib.errors import ConfigError

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 1.0,
        "mscale_all_dim": 1.0}  # fmt: skip
# Each oddity changes no number; the second value is a word of the warning, or None where nothing is odd.
ODD: dict[str, tuple[dict[str, Any], str | None]] = {
    "longer than YaRN reaches": ({"max_position_embeddings": 999}, "max_position_embeddings: 999"),
    "shorter than YaRN reaches": ({"max_position_embeddings": 40}, None),
    "attention_factor null": ({"rope_parameters": YARN | {"attention_factor": None}}, None),
    "attention_factor as it follows": ({"rope_parameters": YARN | {"attention_factor": 1.0}}, None),
    "partial rotation of all": ({"rope_parameters": YARN | {"partial_rotary_factor": 1.0}}, None),
    "partial rotation, outside": ({"partial_rotary_factor": 1.0}, None),
    "YaRN in new words": ({"rope_parameters": YARN | {"llama_4_scaling": 2}}, "llama_4_scaling"),
    "unknown field": ({"unsloth_version": "2025.1"}, "unsloth_version"),
    "padding token of -1": ({"pad_token_id": -1}, "pad_token_id: -1"),
    "first token beyond the vocabulary": ({"bos_token_id": 5000}, "bos_token_id: 5000"),
    "an end token beyond it": ({"eos_token_id": [1, 5000]}, r"eos_token_id: \(1, 5000\)"),
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout"),
    "balance over the batch": ({"seq_aux": False}, "seq_aux"),
    "initial weights of zero": ({"initializer_range": 0.0}, None),
    "gates not normalised, by null": ({"norm_topk_prob": None}, None),
    "nothing about scoring": ({"scoring_func": None, "topk_method": None, "moe_layer_freq": None}, None),
    "a width that does not follow": ({"qk_head_dim": 99}, "qk_head_dim: 99"),
    "more dense layers than layers": ({"first_k_dense_replace": 7}, "first_k_dense_replace: 7"),
    "no shared expert": ({"n_shared_experts": 0}, None),
    "two names of the MTP depth": ({"num_mtp_layers": 0, "num_nextn_predict_layers": 1}, "num_mtp_layers: 0"),
}


@settings(max_examples=12)
@given(seed=SEEDS, odd=st.lists(st.sampled_from(sorted(ODD)), min_size=1, max_size=3, unique=True))
def test_oddities_give_transformers_own_logits(seed: int, odd: list[str]) -> None:
    """Any mixture of them, in a file that both libraries read."""
    from transformers import DeepseekV3ForCausalLM

    changes: dict[str, Any] = {"rope_parameters": YARN}
    for name in odd:
        new = dict(ODD[name][0])
        changes["rope_parameters"] = changes["rope_parameters"] | new.pop("rope_parameters", {})
        changes |= new
    shape = {"n_shared_experts": changes.get("n_shared_experts", 1)}
    shape |= {"first_k_dense_replace": 2} if "first_k_dense_replace" in changes else {}
    sizes = small(num_nextn_predict_layers=0, max_position_embeddings=128, **shape)
    ids = tokens(sizes, 2, 9, seed)
    with tempfile.TemporaryDirectory() as folder:
        build(sizes, seed).save_pretrained(folder)
        edit_json(Path(folder) / "config.json", **{"rope_scaling": ..., "rope_theta": ..., **changes})
        with warnings.catch_warnings(record=True) as told, torch.no_grad():
            warnings.simplefilter("always")
            ours = DeepSeekV3.from_pretrained(folder)(ids).logits
            messages = "\n".join(str(w.message) for w in told)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            theirs = DeepseekV3ForCausalLM.from_pretrained(folder).eval()(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5)
    for name in odd:
        assert ODD[name][1] is None or ODD[name][1].replace("\\", "") in messages, name


@pytest.mark.parametrize("name", ODD)
def test_each_is_told_once_or_not_at_all(name: str) -> None:
    changes, word = ODD[name]
    fields = {**small(max_position_embeddings=128).to_dict(), "rope_parameters": YARN, **changes}
    del fields["rope_scaling"]
    if word is None:
        ModelConfig.from_dict(fields)
        return
    with pytest.warns(UserWarning, match=word) as told:
        config = ModelConfig.from_dict(fields)
    assert len(told) == 1
    with warnings.catch_warnings():
        # What is written again is no longer odd, but for a length, which stays.
        warnings.simplefilter("ignore" if "max_position_embeddings" in word else "error")
        assert ModelConfig.from_dict(config.to_dict()) == config


def test_a_file_s_warning_names_the_file(tmp_path: Path) -> None:
    build(small()).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", unsloth_version="2025.1")
    with pytest.warns(UserWarning, match=r"config\.json: unknown field 'unsloth_version'"):
        ModelConfig.from_json(tmp_path)


@given(factor=st.floats(1, 100), mscale=st.floats(0, 2) | st.none(), all_dim=st.floats(0, 2) | st.none())
def test_where_transformers_multiplies_otherwise_it_is_said(factor, mscale, all_dim) -> None:
    """DeepSeek's code takes mscale alone too, transformers only both; where that differs, nobody is left guessing."""
    from transformers import DeepseekV3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": 32, "rope_theta": 1e4}
    rope |= {k: v for k, v in (("mscale", mscale), ("mscale_all_dim", all_dim)) if v is not None}
    fields = {**small(max_position_embeddings=32).to_dict(), "rope_parameters": dict(rope)}
    for name in ("rope_scaling", "rope_theta"):
        del fields[name]
    _, theirs = ROPE_INIT_FUNCTIONS["yarn"](
        DeepseekV3Config(rope_parameters=rope, max_position_embeddings=32)
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ours = ModelConfig.from_dict(fields).rope_scaling.attention_factor
    assert bool(told) == (not math.isclose(ours, theirs, rel_tol=1e-9)), (ours, theirs)


def test_a_factor_of_null_is_the_ratio_of_the_lengths() -> None:
    rope = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32}
    fields = {**small(max_position_embeddings=128).to_dict(), "rope_parameters": rope}
    assert ModelConfig.from_dict({**fields, "rope_scaling": None}).rope_scaling == YarnScaling(4.0, 32)
    outside = {"rope_type": "yarn", "factor": 2}
    fields |= {"rope_parameters": outside, "rope_scaling": None, "original_max_position_embeddings": 64}
    assert ModelConfig.from_dict(fields).rope_scaling == YarnScaling(2.0, 64)


@given(
    sizes=st.dictionaries(
        st.sampled_from("vocab_size hidden_size intermediate_size moe_intermediate_size kv_lora_rank v_head_dim "
                        "qk_nope_head_dim n_shared_experts q_lora_rank num_attention_heads".split()),
        st.integers(1, 2**70) | st.integers(0, 70).map(lambda n: 2**n), max_size=4,
    )
)  # fmt: skip
def test_any_size_makes_a_model_without_memory_or_a_typed_error(sizes: dict[str, int]) -> None:
    fields = small(eos_token_id=None, bos_token_id=None).to_dict() | sizes
    fields["num_key_value_heads"] = fields["num_attention_heads"]
    try:
        config = ModelConfig.from_dict(fields)
    except ConfigError as error:
        assert any(str(error).startswith(name) for name in fields)
        return
    with torch.device("meta"):
        assert DeepSeekV3(config).parameter_counts()["main"] > 0


@pytest.mark.filterwarnings("error")
def test_a_model_without_shared_experts_writes_as_it_scores() -> None:
    """One row, where tokens go through the form for a single token, and two; forward, backward and the counts."""
    model = build(small(n_shared_experts=0, bos_token_id=None), dtype=torch.float64)
    ids = tokens(model.config, 2, 5)
    model(ids, labels=ids).loss.backward()
    assert model.parameter_counts()["shared_experts"] == 0
    row = ids[:1]
    for _ in range(6):
        row = torch.cat([row, model(row).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(ids[:1], 6, stop_tokens=()), row)
    assert torch.equal(model.generate(ids, 6, stop_tokens=())[:1], row)
