"""Weights side by side in one block: the same model, saved, trained and copied as ever."""

import copy
import mmap

import pytest
import torch

from dsv3lib import DeepSeekV3, ModelConfig
from dsv3lib.memory import ALIGNMENT, allocate

NANO = ModelConfig.preset("nano")
IDS = torch.arange(12).view(2, 6)


def packed(config: ModelConfig = NANO) -> DeepSeekV3:
    """A model with the weights of ``plain``, in one block."""
    with torch.device("meta"):
        model = DeepSeekV3(config)
    allocate(model, torch.float32)
    model.load_state_dict(plain(config).state_dict())
    return model


def plain(config: ModelConfig = NANO) -> DeepSeekV3:
    return DeepSeekV3(config, torch.Generator().manual_seed(1))


def test_parameters_lie_side_by_side_and_share_no_cache_line():
    parameters = list(packed().parameters())
    starts = [p.data_ptr() for p in parameters]
    assert len({p.untyped_storage().data_ptr() for p in parameters}) == 1
    assert all((start - starts[0]) % ALIGNMENT == 0 for start in starts)
    for p, here, following in zip(parameters, starts, starts[1:], strict=False):
        assert 0 <= following - here - p.numel() * p.element_size() < ALIGNMENT


def test_the_model_is_the_same_and_trains_the_same():
    results = []
    for model in (plain(), packed()):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()
        results.append(model(IDS).logits)
    assert torch.equal(*results)


def test_weights_do_not_run_into_each_other():
    model = packed()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        model.model.norm.weight.fill_(7.0)
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert changed == ["model.norm.weight"]


def test_a_copy_has_weights_of_its_own():
    model = packed()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert bool(model.lm_head.weight.any())


def test_tied_embeddings_stay_one():
    model = packed(NANO.replace(tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_routers_bias_keeps_its_dtype():
    with torch.device("meta"):
        model = DeepSeekV3(NANO)
    allocate(model, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {r.e_score_correction_bias.dtype for r in model.routers()} == {torch.float32}


def test_a_loaded_model_lies_in_one_block(tmp_path):
    plain().save_pretrained(tmp_path)
    loaded = DeepSeekV3.from_pretrained(tmp_path)
    assert len({p.untyped_storage().data_ptr() for p in loaded.parameters()}) == 1
    assert torch.equal(loaded(IDS).logits, plain()(IDS).logits)


@pytest.mark.parametrize("lack", ["the constant", "the kernel"])
def test_without_huge_pages_the_block_is_ordinary_memory(monkeypatch, lack):
    if lack == "the constant":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    else:
        monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 9999, raising=False)
    assert torch.equal(packed()(IDS).logits, plain()(IDS).logits)
