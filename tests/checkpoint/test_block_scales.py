"""FP8 files: each block by its own scale, whatever the scale's type, and damage named."""

import json
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from checkpoint_folders import MTP, assert_same, changed, edit, spoilt, state_of, without
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from strategies import SEEDS, build, small, tokens

from dsv3lib import DeepSeekV3, checkpoint
from dsv3lib.checkpoint.block_scales import exact_scales
from dsv3lib.checkpoint.shards import open_stored
from dsv3lib.errors import CheckpointError
from dsv3lib.kernels import dequantize

Q_A = "model.layers.0.self_attn.q_a_proj.weight"
WIDE = {"hidden_size": 136, "intermediate_size": 260, "moe_intermediate_size": 130, "kv_lora_rank": 130}


def test_fp8_files_come_back_as_their_own_blocks_say(tmp_path: Path) -> None:
    """Odd sizes, so that blocks at the edges are cut short."""
    model = build(small(**WIDE), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, fp8=True, max_shard_bytes=300_000)
    stored = {}
    for path in tmp_path.glob("*.safetensors"):
        stored |= load_file(path)
    back, state = DeepSeekV3.from_pretrained(tmp_path), {}
    assert back.lm_head.weight.dtype == torch.bfloat16
    checkpoint_names = {entry.name: entry for entry in checkpoint.entries(back)}
    state = back.state_dict()
    quantised = [n for n, t in stored.items() if t.dtype == torch.float8_e4m3fn]
    for name in quantised:
        scales = stored[name + "_scale_inv"]
        assert scales.dtype == torch.float32
        assert scales.shape == tuple(-(-n // 128) for n in stored[name].shape)
        by_hand = torch.empty(stored[name].shape)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
                by_hand[block] = stored[name][block].float() * scales[i, j]
        entry = checkpoint_names[name]
        assert torch.equal(state[entry.target][entry.at], by_hand.bfloat16()), name
        assert torch.equal(dequantize(stored[name], scales), by_hand)
    kept_high = {n for n in checkpoint_names if n not in quantised}
    assert {n.rsplit(".", 2)[1] for n in quantised} == {
        "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.gate.weight",
            MTP + "eh_proj.weight", "model.norm.weight"} <= kept_high  # fmt: skip
    input_ids = tokens(model.config, 2, 6)
    difference = (back(input_ids).logits - model(input_ids).logits).float()
    assert 0 < difference.norm() / model(input_ids).logits.float().norm() < 0.5


def test_fp8_config_says_so(tmp_path: Path) -> None:
    build(small(**WIDE)).save_pretrained(tmp_path, fp8=True)
    settings_ = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert settings_["quant_method"] == "fp8" and settings_["weight_block_size"] == [128, 128]


# ---- scales in other types --------------------------------------------------------------------------------

SCALE_TYPES = [torch.bfloat16, torch.float16, torch.float8_e8m0fnu]


@pytest.fixture(scope="module")
def fp8_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp8")
    build(small(hidden_size=136), dtype=torch.bfloat16).save_pretrained(folder, fp8=True)
    return folder


@settings(max_examples=10)
@given(kind=st.sampled_from(SCALE_TYPES), seed=SEEDS)
def test_scales_of_any_type_are_taken_exactly(fp8_folder: Path, kind: torch.dtype, seed: int) -> None:
    """A file whose scales are of another type loads as the one that holds the same numbers in FP32."""
    stored = load_file(fp8_folder / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name in sorted(n for n in stored if n.endswith("_scale_inv")):
        exponents = torch.randint(-14, 3, stored[name].shape, generator=generator)
        fraction = 0 if kind == torch.float8_e8m0fnu else torch.rand(stored[name].shape, generator=generator)
        drawn[name] = torch.exp2(exponents + fraction).to(kind)
    states = []
    with tempfile.TemporaryDirectory() as path:
        shutil.copy(fp8_folder / "config.json", path)
        for scales in (drawn, {name: scale.float() for name, scale in drawn.items()}):
            save_file(stored | scales, Path(path) / "model.safetensors")
            states.append(state_of(DeepSeekV3.from_pretrained(path, dtype=torch.float32)))
    assert_same(*states)


def test_every_e8m0_scale_is_its_power_of_two(tmp_path: Path) -> None:
    """The smallest are FP32's subnormal numbers."""
    save_file(
        {"w": torch.arange(255, dtype=torch.uint8).view(torch.float8_e8m0fnu)}, tmp_path / "model.safetensors"
    )
    with ExitStack() as stack:
        read = exact_scales(open_stored(tmp_path, stack), "w")
    assert read.dtype == torch.float32
    assert torch.equal(read.double(), torch.exp2(torch.arange(255).double() - 127))


ROUNDED = {
    "FP64 that FP32 rounds": torch.tensor([[0.1]], dtype=torch.float64),
    "E4M3": torch.ones(1, 1).to(torch.float8_e4m3fn),
    "integers": torch.ones(1, 1).int(),
}


@pytest.mark.parametrize("kind", ROUNDED)
def test_scales_that_would_be_rounded_are_refused(kind: str, tmp_path: Path) -> None:
    build(small()).save_pretrained(tmp_path, fp8=True)
    edit(tmp_path, changed(Q_A + "_scale_inv", lambda _: ROUNDED[kind]))
    with pytest.raises(CheckpointError, match=rf"{Q_A}_scale_inv holds torch.*FP32, BF16, FP16 or E8M0"):
        DeepSeekV3.from_pretrained(tmp_path)


def test_scales_beside_a_weight_that_is_not_fp8_are_passed_over(tmp_path: Path) -> None:
    """Somebody dequantised a checkpoint and left the scales: multiplying again would be wrong."""
    build(small()).save_pretrained(tmp_path)
    edit(tmp_path, lambda t: t | {Q_A + "_scale_inv": torch.full((1, 1), 60_000.0)})
    with pytest.warns(UserWarning, match=rf"scales of 1 tensor.*{Q_A} \(F32\)"):
        back = DeepSeekV3.from_pretrained(tmp_path)
    assert_same(state_of(build(small())), state_of(back))


# ---- damage -----------------------------------------------------------------------------------------------

FP8_DAMAGE = {
    "scales are missing": (without(Q_A + "_scale_inv"), rf"{Q_A} is FP8.*scale_inv"),
    "scales of another shape": (changed(Q_A + "_scale_inv", lambda v: v[:, :1].contiguous()), rf"{Q_A}.*\(1, 1\)"),
    "a scale of NaN": (changed(Q_A + "_scale_inv", spoilt(float("nan"))), rf"{Q_A}.*NaN"),
    "a value of NaN": (
        changed(Q_A, lambda v: spoilt(float("nan"))(v.float()).to(torch.float8_e4m3fn)), rf"{Q_A}.*NaN"),
    "scales for nothing": (lambda t: t | {"lm_head.weights_scale_inv": torch.ones(1, 1)}, "lm_head.weights_scale"),
}  # fmt: skip


@pytest.mark.parametrize("case", FP8_DAMAGE)
def test_damage_in_fp8_files_is_named(case: str, tmp_path: Path) -> None:
    change, says = FP8_DAMAGE[case]
    build(small(**WIDE)).save_pretrained(tmp_path, fp8=True)
    DeepSeekV3.from_pretrained(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(CheckpointError, match=says):
        DeepSeekV3.from_pretrained(tmp_path)


@pytest.mark.parametrize("block", [[128, 64], [0, 0], "128", [128]])
def test_a_block_size_that_makes_no_sense_is_refused(block: object, tmp_path: Path) -> None:
    build(small(**WIDE)).save_pretrained(tmp_path, fp8=True)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["quantization_config"]["weight_block_size"] = block
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="weight_block_size"):
        DeepSeekV3.from_pretrained(tmp_path)
