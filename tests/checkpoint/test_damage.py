"""Damaged files, foreign ones and pickles: each refused, with the file or tensor named."""

import json
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from checkpoint_folders import (
    INDEX,
    MTP,
    SINGLE,
    assert_same,
    changed,
    edit,
    renamed,
    spoilt,
    state_of,
    without,
)  # fmt: skip
from strategies import build, small

from dsv3lib import DeepSeekV3, checkpoint
from dsv3lib.errors import CheckpointError, ConfigError

KV_A = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"

DAMAGE = {
    "a tensor is missing": (without(EXPERT), rf"missing.*{EXPERT}"),
    "the bias is missing": (without(BIAS), rf"missing.*{BIAS}"),
    "a tensor is renamed": (renamed(KV_A, KV_A + "x"), rf"missing.*{KV_A}"),
    "a tensor too many": (lambda t: t | {"model.layers.9.norm.weight": torch.ones(3)}, r"model\.layers\.9\.norm"),
    "a bias that the config denies": (
        lambda t: t | {"model.layers.0.self_attn.o_proj.bias": torch.ones(24)}, r"o_proj\.bias"),
    "a transposed tensor": (changed(KV_A, lambda v: v.t().contiguous()), rf"{KV_A}.*\(24, 16\).*\(16, 24\)"),
    "one row too few": (changed(EXPERT, lambda v: v[:-1].contiguous()), rf"{EXPERT}.*\(11, 24\).*\(12, 24\)"),
    "NaN": (changed(EXPERT, spoilt(float("nan"))), rf"{EXPERT}.*NaN"),
    "infinity": (changed("model.norm.weight", spoilt(float("inf"))), r"model\.norm\.weight.*infinity"),
    "NaN in the bias": (changed(BIAS, spoilt(float("nan"))), rf"{BIAS}.*NaN"),
    "whole numbers for weights": (changed(KV_A, lambda v: v.long()), rf"{KV_A}.*I64"),
    "another embedding for MTP": (
        changed(MTP + "embed_tokens.weight", spoilt(7.0)), rf"{MTP}embed_tokens.*model\.embed_tokens"),
    "another head for MTP": (
        changed(MTP + "shared_head.head.weight", spoilt(7.0)), rf"{MTP}shared_head\.head.*lm_head"),
    "NaN in an MTP copy": (changed(MTP + "embed_tokens.weight", spoilt(float("nan"))), rf"{MTP}embed_tokens"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(case: str, tmp_path: Path) -> None:
    change, says = DAMAGE[case]
    build(small()).save_pretrained(tmp_path)
    edit(tmp_path, lambda tensors: dict(tensors))
    DeepSeekV3.from_pretrained(tmp_path)  # whole so far
    edit(tmp_path, change)
    with pytest.raises(CheckpointError, match=says) as caught:
        DeepSeekV3.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, -1])
def test_a_truncated_file_is_named(kept: float, tmp_path: Path) -> None:
    build(small()).save_pretrained(tmp_path)
    path = tmp_path / SINGLE
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(CheckpointError, match=SINGLE.replace(".", r"\.")):
        DeepSeekV3.from_pretrained(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    build(small()).save_pretrained(tmp_path, max_shard_bytes=20_000)
    path = sorted(tmp_path.glob("*.safetensors"))[1]
    path.unlink()
    with pytest.raises(CheckpointError, match=path.name):
        DeepSeekV3.from_pretrained(tmp_path)


def test_an_index_that_promises_too_much_is_named(tmp_path: Path) -> None:
    build(small()).save_pretrained(tmp_path, max_shard_bytes=20_000)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["model.layers.0.ghost.weight"] = next(iter(index["weight_map"].values()))
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.ghost\.weight"):
        DeepSeekV3.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "\x00"])
def test_an_index_that_is_none_is_named(text: str, tmp_path: Path) -> None:
    build(small()).save_pretrained(tmp_path, max_shard_bytes=20_000)
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=INDEX.replace(".", r"\.")):
        DeepSeekV3.from_pretrained(tmp_path)


class Trap:
    """Unpickling this would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", SINGLE])
def test_pickles_are_never_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(small().to_dict()))
    sprung = tmp_path / "sprung"
    (tmp_path / name).write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(CheckpointError, match="safetensors"):
        DeepSeekV3.from_pretrained(tmp_path)
    assert not sprung.exists()


def test_folders_without_a_checkpoint_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        DeepSeekV3.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="nowhere"):
        DeepSeekV3.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps(small().to_dict()))
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*found: config\.json"):
        DeepSeekV3.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"model_type": "llama"}, ConfigError, "model_type.*llama"),
        ({"num_hidden_layers": 1}, CheckpointError, r"\(24, 24\)|layers"),
        ({"num_hidden_layers": 3, "num_nextn_predict_layers": 0}, CheckpointError, r"not belong.*eh_proj"),
        ({"hidden_size": 32}, CheckpointError, r"embed_tokens.*\(50, 24\).*\(50, 32\)"),
        ({"n_routed_experts": 16}, CheckpointError, r"missing.*experts\.8"),
        ({"n_routed_experts": 4, "n_group": 2}, CheckpointError, r"experts\.4|\(8,"),
        ({"q_lora_rank": None}, CheckpointError, r"missing.*q_proj"),
    ],
)  # fmt: skip
def test_the_config_of_another_model_is_noticed(
    changes: dict, error: type[Exception], says: str, tmp_path: Path
) -> None:
    build(small()).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | changes))
    with warnings.catch_warnings(), pytest.raises(error, match=says):
        warnings.simplefilter("ignore")  # of MTP modules that seem to be missing
        DeepSeekV3.from_pretrained(tmp_path)


def test_a_failed_load_leaves_a_given_model_unchanged(tmp_path: Path) -> None:
    """Names and shapes are checked before anything is read."""
    build(small()).save_pretrained(tmp_path)
    edit(tmp_path, without(EXPERT))
    model = build(small(), seed=1)
    before = state_of(model)
    with pytest.raises(CheckpointError):
        checkpoint.load(model, tmp_path)
    assert_same(before, state_of(model))
