"""Checkpoints: nothing is lost on the road out and in, and memory holds one tensor more than the model."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from checkpoint_folders import INDEX, MTP, SINGLE, assert_same, edit, state_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from strategies import SEEDS, build, configs, small

from dsv3lib import DeepSeekV3, ModelConfig


@settings(max_examples=20)
@given(
    config=configs(), seed=SEEDS, limit=st.sampled_from([1, 3000, 10**9]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)  # fmt: skip
def test_what_is_saved_is_loaded_to_the_bit(
    config: ModelConfig, seed: int, limit: int, dtype: torch.dtype
) -> None:
    model = build(config, seed, dtype)
    if dtype == torch.float64:  # the files hold the bias in FP32, as released ones do
        for router in model.routers():
            router.e_score_correction_bias = router.e_score_correction_bias.float().double()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_bytes=limit)
        names = sorted(p.name for p in Path(folder).iterdir())
        assert (INDEX in names) == (SINGLE not in names) and not any(n.endswith(".tmp") for n in names)
        back = DeepSeekV3.from_pretrained(folder)
    assert back.config == config
    assert_same(state_of(model), state_of(back))
    assert (back.lm_head.weight is back.model.embed_tokens.weight) == config.tie_word_embeddings


def test_the_files_have_the_released_layout(tmp_path: Path) -> None:
    model = build(small())
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / SINGLE)
    width = model.config.moe_intermediate_size
    experts = model.model.layers[1].mlp.experts
    prefix = "model.layers.1.mlp.experts.5."
    assert torch.equal(stored[prefix + "gate_proj.weight"], experts.gate_up_proj[5, :width])
    assert torch.equal(stored[prefix + "up_proj.weight"], experts.gate_up_proj[5, width:])
    assert torch.equal(stored[prefix + "down_proj.weight"], experts.down_proj[5])
    assert stored["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert torch.equal(stored[MTP + "embed_tokens.weight"], stored["model.embed_tokens.weight"])
    assert torch.equal(stored[MTP + "shared_head.head.weight"], stored["lm_head.weight"])
    own = {"eh_proj.weight", "enorm.weight", "hnorm.weight", "shared_head.norm.weight"}
    assert {MTP + name for name in own} <= stored.keys()


def test_rotary_rows_are_stored_as_the_config_says(tmp_path: Path) -> None:
    """With ``rope_interleave`` false the file holds two halves; in memory neighbours are always pairs."""
    rope, rank = 4, 12
    rows = {}
    for interleave in (True, False):
        model = build(small(rope_interleave=interleave))
        model.save_pretrained(tmp_path)
        rows[interleave] = load_file(tmp_path / SINGLE)["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"]
        assert_same(state_of(model), state_of(DeepSeekV3.from_pretrained(tmp_path)))
    assert torch.equal(rows[True][:rank], rows[False][:rank])
    assert torch.equal(rows[True][rank:][[0, 2, 1, 3]], rows[False][rank:])
    assert rope == rows[True].shape[0] - rank


def test_the_index_names_every_tensor_and_the_total(tmp_path: Path) -> None:
    build(small()).save_pretrained(tmp_path, max_shard_bytes=20_000)
    index = json.loads((tmp_path / INDEX).read_text())
    held, total = {}, 0
    for path in tmp_path.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            held[name] = path.name
            total += tensor.nbytes
        assert path.stat().st_size < 40_000
    assert index["weight_map"] == held and index["metadata"]["total_size"] == total
    assert len(set(held.values())) > 3


def test_a_smaller_checkpoint_leaves_no_stale_shards(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    build(small()).save_pretrained(tmp_path, max_shard_bytes=20_000)
    build(small(), seed=1).save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", SINGLE, "notes.txt"]
    assert_same(state_of(build(small(), seed=1)), state_of(DeepSeekV3.from_pretrained(tmp_path)))
    build(small(), seed=2).save_pretrained(tmp_path, max_shard_bytes=20_000)
    assert not (tmp_path / SINGLE).exists() and (tmp_path / "notes.txt").exists()
    assert_same(state_of(build(small(), seed=2)), state_of(DeepSeekV3.from_pretrained(tmp_path)))


def test_another_dtype_may_be_asked_for(tmp_path: Path) -> None:
    build(small()).save_pretrained(tmp_path)
    model = DeepSeekV3.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert all(r.e_score_correction_bias.dtype == torch.float32 for r in model.routers())


def test_files_without_mtp_load_the_main_model_with_a_word(tmp_path: Path) -> None:
    build(small()).save_pretrained(tmp_path)
    edit(tmp_path, lambda t: {n: v for n, v in t.items() if not n.startswith(MTP)})
    with pytest.warns(UserWarning, match="1 MTP module.*main model alone"):
        model = DeepSeekV3.from_pretrained(tmp_path)
    assert model.config.num_nextn_predict_layers == 0


def test_mtp_copies_may_be_absent(tmp_path: Path) -> None:
    build(small()).save_pretrained(tmp_path)
    edit(tmp_path, lambda t: {n: v for n, v in t.items() if n not in
         (MTP + "embed_tokens.weight", MTP + "shared_head.head.weight")})  # fmt: skip
    assert_same(state_of(build(small())), state_of(DeepSeekV3.from_pretrained(tmp_path)))


# ---- memory -----------------------------------------------------------------------------------------------

MEASURE = """
import resource, sys, torch
from dsv3lib import DeepSeekV3
torch.set_num_threads(1)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
DeepSeekV3.from_pretrained(sys.argv[1])  # a small one: every library is loaded
before = peak()
model = DeepSeekV3.from_pretrained(sys.argv[2])
print(peak() - before, sum(p.numel() * p.element_size() for p in model.parameters()))
"""


def test_loading_peaks_at_the_model_and_one_shard(tmp_path: Path) -> None:
    """Half of the files' bytes beside the model would mean that a second copy of it was held."""
    big = small(hidden_size=512, vocab_size=8000, moe_intermediate_size=512, intermediate_size=2048)
    build(small()).save_pretrained(tmp_path / "small")
    build(big).save_pretrained(tmp_path / "big", max_shard_bytes=8 * 2**20)
    assert len(list((tmp_path / "big").glob("*.safetensors"))) > 8
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "big")]
    grown, size = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert size > 64 * 2**20
    largest = 8000 * 512 * 4  # one tensor is read at a time
    assert grown < size + 2 * largest + 8 * 2**20 + 16 * 2**20
