"""transformers as the oracle: its files, its logits, its cache and its MTP modules against ours."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is fetched

import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, build, configs, randomize, small, tokens
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

from dsv3lib import DeepSeekV3, LatentCache, ModelConfig

TOLERANCE = 1e-4  # fp32, on logits of the order of one
PLAIN = {"attn_implementation": "eager", "experts_implementation": "eager"}  # their own plain code, any width


def theirs_from(folder: Path) -> DeepseekV3ForCausalLM:
    return DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32, **PLAIN).eval()


def ours_from(folder: Path) -> DeepSeekV3:
    with warnings.catch_warnings():  # transformers keeps the MTP depth in config.json and drops the modules
        warnings.filterwarnings("ignore", message=".*MTP module.*")
        return DeepSeekV3.from_pretrained(folder)


@torch.no_grad()
def assert_same_logits(ours: DeepSeekV3, theirs: DeepseekV3ForCausalLM, input_ids: torch.Tensor) -> None:
    """The same logits for the whole sequence at once and for each token alone, through both caches."""
    expected = theirs(input_ids).logits
    assert expected.std() > 0.05, "logits too flat to tell two models apart"
    torch.testing.assert_close(ours(input_ids).logits, expected, atol=TOLERANCE, rtol=0)
    cache, past = LatentCache(ours.config), None
    for t in range(input_ids.shape[1]):
        token = input_ids[:, t : t + 1]
        answer = theirs(token, past_key_values=past, use_cache=True)
        past = answer.past_key_values
        logits = ours(token, cache=cache).logits
        torch.testing.assert_close(logits, answer.logits, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(logits[:, 0], expected[:, t], atol=TOLERANCE, rtol=0)


@given(config=configs(oracle=True), seed=SEEDS, batch=st.integers(1, 3), length=st.integers(1, 12))
def test_transformers_loads_what_we_save(config: ModelConfig, seed: int, batch: int, length: int) -> None:
    ours = build(config, seed)
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        assert_same_logits(ours, theirs_from(folder), tokens(config, batch, length, seed))


@given(config=configs(oracle=True), seed=SEEDS, batch=st.integers(1, 3), length=st.integers(1, 12))
def test_we_load_what_transformers_saves(config: ModelConfig, seed: int, batch: int, length: int) -> None:
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**config.to_dict(), **PLAIN)).eval()
    randomize(theirs, torch.Generator().manual_seed(seed))
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder, max_shard_size="20KB")
        ours = ours_from(folder)
    assert ours.config == config.replace(num_nextn_predict_layers=0)
    assert_same_logits(ours, theirs, tokens(config, batch, length, seed))


@settings(max_examples=8)
@given(config=configs(oracle=True, yarn=True), seed=SEEDS)
def test_yarn_agrees_past_the_original_length(config: ModelConfig, seed: int) -> None:
    """Errors in YaRN do not show at short lengths."""
    ours = build(config, seed)
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        theirs = theirs_from(folder)
    input_ids = tokens(config, 1, min(config.max_position_embeddings, 160), seed)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(input_ids).logits, theirs(input_ids).logits, atol=2 * TOLERANCE, rtol=0
        )


@torch.no_grad()
def mtp_oracle(
    ours: DeepSeekV3, theirs: DeepseekV3ForCausalLM, input_ids: torch.Tensor
) -> list[torch.Tensor]:
    """Logits of each depth from transformers' own MTP layers with our weights."""
    depths, first = ours.config.num_nextn_predict_layers, ours.config.num_hidden_layers
    chain = MtpModel(theirs, depths).eval()
    renamed = {}
    for name, tensor in ours.state_dict().items():
        for k in range(depths):
            prefix = f"model.layers.{first + k}."
            if name.startswith(prefix):
                rest = name.removeprefix(prefix).replace("shared_head.norm", "post_norm")
                own = rest.split(".")[0] in ("enorm", "hnorm", "eh_proj", "post_norm")
                renamed[f"layers.{k}." + ("" if own else "mtp_block.") + rest] = tensor
    missing, unexpected = chain.load_state_dict(renamed, strict=False)
    assert not unexpected and not any(name.startswith("layers.") for name in missing)
    hidden, logits = theirs.model(input_ids).last_hidden_state, []
    positions = torch.arange(input_ids.shape[1])[None]
    for k in range(depths):
        # The embedding of the token k + 1 places on, the hidden state of the place itself.
        hidden = chain.forward_layer(
            k, hidden[:, :-1], positions[:, k + 1 :], None, input_ids=input_ids[:, k + 1 :]
        )
        logits.append(theirs.lm_head(hidden))
    return logits


@settings(max_examples=12)
@given(config=configs(oracle=True, mtp=(1, 3), rope_interleave=True), seed=SEEDS, length=st.integers(4, 10))
def test_mtp_logits_agree_at_every_depth(config: ModelConfig, seed: int, length: int) -> None:
    ours = build(config, seed)
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        theirs = theirs_from(folder)
    input_ids = tokens(config, 2, length, seed)
    expected = mtp_oracle(ours, theirs, input_ids)
    with torch.no_grad():
        out = ours(input_ids, return_mtp=True)
    assert len(out.mtp_logits) == len(expected) == config.num_nextn_predict_layers
    for k, (got, wanted) in enumerate(zip(out.mtp_logits, expected, strict=True), start=1):
        assert got.shape == (2, length - k, config.vocab_size)
        torch.testing.assert_close(got, wanted, atol=TOLERANCE, rtol=0)


def _drop_bias(model: DeepSeekV3) -> None:
    for router in model.routers():
        router.e_score_correction_bias.zero_()


def _other_eps(model: DeepSeekV3) -> None:
    for module in model.modules():
        if hasattr(module, "eps"):
            module.eps = 0.05


def _swap_gate_and_up(model: DeepSeekV3) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("gate_up_proj"):
            parameter.data = parameter.roll(parameter.shape[1] // 2, 1)


def _other_theta(model: DeepSeekV3) -> None:
    model.rope.config = model.config.replace(rope_theta=50.0)


def _halves_as_pairs(model: DeepSeekV3) -> None:
    rope = model.config.qk_rope_head_dim
    for name, parameter in model.named_parameters():
        if name.endswith("kv_a_proj_with_mqa.weight"):
            order = torch.arange(rope).view(2, -1).t().flatten()
            parameter.data[-rope:] = parameter.data[-rope:][order]


@pytest.mark.parametrize("spoil", [_drop_bias, _other_eps, _swap_gate_and_up, _other_theta, _halves_as_pairs])
def test_the_oracle_notices_a_wrong_model(spoil, tmp_path: Path) -> None:
    ours = build(small())
    ours.save_pretrained(tmp_path)
    theirs = theirs_from(tmp_path)
    input_ids = tokens(ours.config, 2, 12)
    assert_same_logits(ours, theirs, input_ids)
    ours = build(small())
    spoil(ours)
    with pytest.raises(AssertionError):
        assert_same_logits(ours, theirs, input_ids)


def test_the_mtp_oracle_notices_the_paper_s_order_of_eh_proj(tmp_path: Path) -> None:
    """The released files feed [embedding; hidden], the reverse of the paper's Eq. 21."""
    ours = build(small())
    ours.save_pretrained(tmp_path)
    input_ids = tokens(ours.config, 1, 8)
    (expected,) = mtp_oracle(ours, theirs_from(tmp_path), input_ids)
    weight = ours.model.layers[-1].eh_proj.weight
    weight.data = weight.roll(ours.config.hidden_size, 1)
    with torch.no_grad():
        assert (ours(input_ids, return_mtp=True).mtp_logits[0] - expected).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("fp8", [False, True])
def test_a_released_style_file_is_read_by_both(fp8: bool, tmp_path: Path) -> None:
    """Ours in BF16, theirs from the same BF16 values: a checkpoint's dtype survives both roads."""
    ours = build(small(hidden_size=128), dtype=torch.bfloat16)
    ours.save_pretrained(tmp_path, fp8=fp8)
    back = DeepSeekV3.from_pretrained(tmp_path)
    assert back.lm_head.weight.dtype == torch.bfloat16
    if not fp8:  # transformers needs a GPU's kernels for FP8 files
        theirs = DeepseekV3ForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(theirs.lm_head.weight, back.lm_head.weight)
        assert theirs.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32
