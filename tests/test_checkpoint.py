"""Checkpoints: nothing lost on the road, nothing damaged passes, and what stood there before survives."""

import errno
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from strategies import SEEDS, build, configs, small, tokens

from dsv3lib import DeepSeekV3, ModelConfig, checkpoint
from dsv3lib.errors import CheckpointError, ConfigError, SaveError
from dsv3lib.kernels import dequantize

SINGLE, INDEX = checkpoint.SINGLE, checkpoint.INDEX
MTP = "model.layers.2."  # of strategies.small


def state_of(model: DeepSeekV3) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


# ---- round trips ------------------------------------------------------------------------------------------


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


# ---- FP8 --------------------------------------------------------------------------------------------------

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


# ---- saving fails -----------------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_full_disk_keeps_what_was_there(tmp_path: Path) -> None:
    """A real file system of 1 MiB where mounting is allowed, a limit on the size of files elsewhere."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    try:
        mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    try:
        build(small()).save_pretrained(disk, max_shard_bytes=40_000)
        before = files_of(disk)
        big = build(small(hidden_size=256, vocab_size=1000))
        if mounted:
            with pytest.raises(SaveError, match="disk is full.*free some space"):
                big.save_pretrained(disk, max_shard_bytes=200_000)
        else:
            with file_size_limit(500_000), pytest.raises(SaveError, match="not saved"):
                big.save_pretrained(disk)
        assert files_of(disk) == before, "earlier files changed, or temporary ones were left"
        assert_same(state_of(build(small())), state_of(DeepSeekV3.from_pretrained(disk)))
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=True)


class file_size_limit:
    """No file may grow past so many bytes; writing more fails as on a full disk, with another number."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def __enter__(self) -> None:
        self.handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.before[1]))

    def __exit__(self, *details: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)
        signal.signal(signal.SIGXFSZ, self.handler)


def test_a_write_that_fails_keeps_what_was_there(tmp_path: Path) -> None:
    build(small()).save_pretrained(tmp_path)
    before = files_of(tmp_path)
    big = build(small(hidden_size=256, vocab_size=1000))
    with file_size_limit(500_000), pytest.raises(SaveError, match="not saved"):
        big.save_pretrained(tmp_path)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("nth", [0, 2])
def test_a_disk_that_fills_up_midway_keeps_what_was_there(
    nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(small()).save_pretrained(tmp_path, max_shard_bytes=20_000)
    before, calls = files_of(tmp_path), []

    def filling(tensors: dict, path: Path, metadata: dict) -> None:
        calls.append(path)
        Path(path).write_bytes(b"half a file")
        if len(calls) > nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save_file", filling)
    with pytest.raises(SaveError, match="disk is full"):
        build(small(), seed=1).save_pretrained(tmp_path, max_shard_bytes=20_000)
    assert len(calls) == nth + 1 and files_of(tmp_path) == before


def test_an_interrupt_while_saving_leaves_no_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(small()).save_pretrained(tmp_path)
    before = files_of(tmp_path)

    def interrupted(tensors: dict, path: Path, metadata: dict) -> None:
        Path(path).write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(small(), seed=1).save_pretrained(tmp_path)
    assert files_of(tmp_path) == before


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "taken"
    path.write_text("a file")
    with pytest.raises(SaveError, match="taken"):
        build(small()).save_pretrained(path)
    assert path.read_text() == "a file"


# ---- damaged files ----------------------------------------------------------------------------------------


def edit(folder: Path, change) -> None:
    """Rewrite the single file with other tensors."""
    save_file(change(load_file(folder / SINGLE)), folder / SINGLE)


def without(name: str):
    return lambda t: {n: v for n, v in t.items() if n != name}


def renamed(name: str, other: str):
    return lambda t: {other if n == name else n: v for n, v in t.items()}


def changed(name: str, change):
    return lambda t: t | {name: change(t[name])}


def spoilt(value: float):
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return change


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


Q_A = "model.layers.0.self_attn.q_a_proj.weight"
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
        ({"num_nextn_predict_layers": 2}, CheckpointError, r"missing.*layers\.3"),
    ],
)  # fmt: skip
def test_the_config_of_another_model_is_noticed(
    changes: dict, error: type[Exception], says: str, tmp_path: Path
) -> None:
    build(small()).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | changes))
    with pytest.raises(error, match=says):
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
