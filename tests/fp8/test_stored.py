"""Weights that stay in FP8: to the bit through files, run from as they lie, left alone by casts."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from strategies import build, tokens

from dsv3lib import DeepSeekV3, ModelConfig
from dsv3lib.errors import CheckpointError, ConfigError, InputError
from dsv3lib.fp8.stored import StoredExperts, StoredLinear, is_stored

CONFIG = ModelConfig.preset("nano").replace(num_hidden_layers=2, vocab_size=64)
WIDE = CONFIG.replace(hidden_size=192, kv_lora_rank=72, moe_intermediate_size=160)  # nothing divides by 128


@pytest.fixture(params=[CONFIG, WIDE], ids=["nano", "wide"])
def folder(request, tmp_path):
    build(request.param).save_pretrained(tmp_path, fp8=True)
    return tmp_path


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[n].reshape(-1).view(torch.uint8), b[n].reshape(-1).view(torch.uint8)) for n in a
    )


def test_out_and_in_again_to_the_bit(folder, tmp_path_factory) -> None:
    model = DeepSeekV3.from_pretrained(folder, dtype="fp8")
    assert is_stored(model)
    other = tmp_path_factory.mktemp("again")
    model.save_pretrained(other)
    files = [load_file(f / "model.safetensors") for f in (folder, other)]
    # kv_b_proj was dequantised, and is quantised again: the same values, scales within FP32's last bit.
    scales = [{n: f.pop(n) for n in list(f) if n.endswith("kv_b_proj.weight_scale_inv")} for f in files]
    assert same(*files) and scales[0].keys() == scales[1].keys()
    assert all(torch.allclose(scales[0][n], scales[1][n], rtol=2e-7, atol=0) for n in scales[0])
    fields = [json.loads((f / "config.json").read_text())["quantization_config"] for f in (folder, other)]
    assert fields[0] == fields[1] and fields[0]["weight_block_size"] == [128, 128]


def test_it_runs_from_what_it_stores(folder) -> None:
    """Beside the dequantised model: the same weights, so all that differs is what happens to the inputs."""
    stored = DeepSeekV3.from_pretrained(folder, dtype="fp8").eval()
    plain = DeepSeekV3.from_pretrained(folder, dtype=torch.float32).eval()
    down = stored.model.layers[0].mlp.down_proj
    assert torch.equal(down.dequantized(), plain.model.layers[0].mlp.down_proj.weight)
    ids = tokens(stored.config, 2, 12)
    with torch.no_grad():
        got, exact = stored(ids).logits, plain(ids).logits
        assert 0 < float((got - exact).norm() / exact.norm()) < 0.3
        rows, counts = torch.randn(40, stored.config.hidden_size), torch.tensor([0, 9, 0, 21, 1, 9, 0, 0])
        pair = (m.model.layers[1].mlp.experts.answer(rows, counts) for m in (stored, plain))
        got, exact = pair
    assert float((got - exact).norm() / exact.norm()) < 0.1
    assert stored.generate(ids[:1], max_new_tokens=3).shape == (1, 15)


def test_a_byte_a_weight(folder) -> None:
    stored = DeepSeekV3.from_pretrained(folder, dtype="fp8")
    for module in stored.modules():
        if isinstance(module, StoredLinear):
            assert module.weight.nbytes == module.in_features * module.out_features
        if isinstance(module, StoredExperts):
            assert module.gate_up_proj.nbytes == module.gate_up_proj.numel()
    kinds = {
        n.rpartition(".")[2]: p.dtype
        for n, p in stored.named_parameters()
        if "kv_b_proj" in n or "gate.weight" in n
    }
    assert set(kinds.values()) == {torch.float32}


def test_casts_and_moves_leave_fp8_as_it_is(folder) -> None:
    model = DeepSeekV3.from_pretrained(folder, dtype="fp8")
    before = {
        n: t.clone() for n, t in model.state_dict().items() if t.dtype == torch.float8_e4m3fn or "scale" in n
    }
    model.bfloat16().to("cpu").double().float()
    assert same(before, {n: t for n, t in model.state_dict().items() if n in before})
    assert model.lm_head.weight.dtype == torch.float32


def test_other_files_are_quantised_on_their_way(tmp_path) -> None:
    model = build(CONFIG)
    model.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "fp8", fp8=True)
    found = [DeepSeekV3.from_pretrained(tmp_path / f, dtype="fp8").state_dict() for f in ("plain", "fp8")]
    assert same(*({n: t for n, t in f.items() if "kv_b_proj" not in n} for f in found))


def test_what_it_cannot_do(folder) -> None:
    model = DeepSeekV3.from_pretrained(folder, dtype="fp8")
    ids = tokens(model.config, 1, 4)
    with pytest.raises(InputError, match="for inference alone"):
        model(ids, labels=ids)
    with pytest.raises(ConfigError, match="dtype is 'fp4', expected a torch.dtype, None or 'fp8'"):
        DeepSeekV3.from_pretrained(folder, dtype="fp4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s[:, :0], "has shape .*, expected"),
        (lambda s: -s, "expected finite numbers above zero"),
        (lambda s: s * torch.inf, "expected finite numbers above zero"),
        (lambda s: None, "is FP8 and its .*_scale_inv is missing"),
    ],
)
def test_blocks_that_do_not_match_are_refused(tmp_path, change, message: str) -> None:
    build(CONFIG).save_pretrained(tmp_path, fp8=True)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    scales = change(tensors.pop(name))
    if scales is not None:
        tensors[name] = scales.contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        DeepSeekV3.from_pretrained(tmp_path, dtype="fp8")
