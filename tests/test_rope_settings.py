"""Position interpolation in a configuration: both dialects, read by transformers too, refused when odd."""

from pathlib import Path

import pytest
import torch
from strategies import build, small, tokens
from transformers import DeepseekV3ForCausalLM

from dsv3lib import ModelConfig
from dsv3lib.errors import ConfigError
from dsv3lib.rope_settings import LinearScaling


def fields(**changes: object) -> dict:
    return small().to_dict() | changes


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["type", "rope_type"])
def test_linear_scaling_is_read_and_written(name: str, kind: str) -> None:
    given = fields(**{"rope_scaling": None, name: {kind: "linear", "factor": 4}})
    if name == "rope_parameters":
        del given["rope_scaling"]
    config = ModelConfig.from_dict(given)
    assert config.rope_scaling == LinearScaling(4.0)
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert config.to_dict()["rope_scaling"] == {"type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    ("scaling", "says"),
    [
        ({"type": "linear"}, "factor: None, expected how many times longer"),
        ({"type": "linear", "factor": 0.5}, "factor: 0.5, expected a number >= 1"),
        ({"type": "linear", "factor": 2, "attention_factor": 1.2}, "attention_factor: 1.2, expected null or 1"),
        ({"type": "dynamic", "factor": 2}, "'yarn', 'linear' or 'default'"),
    ],
)
def test_odd_settings_are_refused(scaling: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ModelConfig.from_dict(fields(rope_scaling=scaling))


def test_two_fields_that_contradict_each_other_are_refused() -> None:
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    with pytest.raises(ConfigError, match="rope_parameters"):
        ModelConfig.from_dict(fields(rope_scaling={"type": "linear", "factor": 2}, rope_parameters=yarn))


def test_transformers_gives_the_same_logits(tmp_path: Path) -> None:
    config = small(rope_scaling=LinearScaling(4.0), num_nextn_predict_layers=0, rms_norm_eps=1e-6)
    ours, ids = build(config).eval(), tokens(config, 1, 40)
    ours_plain = build(config.replace(rope_scaling=None)).eval()
    ours.save_pretrained(tmp_path)
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    with torch.no_grad():
        theirs = DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **plain).eval()
        expected = theirs(ids).logits
        torch.testing.assert_close(ours(ids).logits, expected, atol=1e-4, rtol=0)
        assert (ours_plain(ids).logits - expected).abs().max() > 1e-2
