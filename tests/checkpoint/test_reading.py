"""MTP modules in config.json and in the files, at odds: the main model is loaded, and what is left out is said."""

import json
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from checkpoint_folders import assert_same, edit_json, state_of
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import build, configs, tokens

from dsv3lib import DeepSeekV3, ModelConfig
from dsv3lib.errors import CheckpointError


@settings(max_examples=12)
@given(config=configs(max_layers=2), promised=st.integers(0, 3), limit=st.sampled_from([3000, 10**9]))
def test_mtp_modules_that_the_config_does_not_expect_or_misses(
    config: ModelConfig, promised: int, limit: int
) -> None:
    model, held = build(config), config.num_nextn_predict_layers
    ids = tokens(config, 2, 6)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_bytes=limit)
        edit_json(Path(folder) / "config.json", num_nextn_predict_layers=promised)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            back = DeepSeekV3.from_pretrained(folder)
    depth = min(promised, held)
    assert back.config == config.replace(num_nextn_predict_layers=depth)
    with torch.no_grad():
        assert torch.equal(back(ids).logits, model(ids).logits)
        ours, theirs = back(ids, return_mtp=True).mtp_logits, model(ids, return_mtp=True).mtp_logits
    assert len(ours) == depth and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=False))
    messages = [str(w.message) for w in told]
    if promised < held:
        layers = ", ".join(str(config.num_hidden_layers + k) for k in range(promised, held))
        assert (
            len(messages) == 1
            and f"as layers {layers}, config.json has num_nextn_predict_layers = {promised}" in (messages[0])
        )
    elif promised > held:
        assert len(messages) == 1 and f"promises {promised} MTP" in messages[0]
    else:
        assert not messages


@settings(max_examples=10)
@given(config=configs(max_layers=3).filter(lambda c: c.num_hidden_layers > 1))
def test_a_main_layer_too_many_is_another_model(config: ModelConfig) -> None:
    """Only whole MTP modules may be left out: to leave out a block of the main model changes every logit."""
    with tempfile.TemporaryDirectory() as folder:
        build(config).save_pretrained(folder)
        fewer = config.num_hidden_layers - 1
        dense = min(config.first_k_dense_replace, fewer)
        edit_json(Path(folder) / "config.json", num_hidden_layers=fewer, first_k_dense_replace=dense)
        with warnings.catch_warnings(), pytest.raises(CheckpointError, match=f"layers.{fewer}"):
            warnings.simplefilter("ignore")
            DeepSeekV3.from_pretrained(folder)


def test_what_transformers_saves_without_its_mtp_module_round_trips(tmp_path: Path) -> None:
    """transformers keeps the promise of a module in config.json and not its weights."""
    from transformers import DeepseekV3ForCausalLM

    model = build(ModelConfig.preset("nano").replace(num_hidden_layers=2))
    model.save_pretrained(tmp_path / "ours")
    theirs = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    with pytest.warns(UserWarning, match="promises 1 MTP"):
        back = DeepSeekV3.from_pretrained(tmp_path / "theirs")
    own = {n: t for n, t in state_of(model).items() if not n.startswith("model.layers.2.")}
    assert_same(own, state_of(back))
