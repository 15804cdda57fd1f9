"""Shipped checkpoints: found by name, a local folder first, and each way of not being there told."""

import re
import shutil

import pytest
import torch

from dsv3lib import DeepSeekV3, ModelConfig
from dsv3lib.errors import CheckpointError
from dsv3lib.shipped import checkpoint_folder
from dsv3lib.training.text.tokenizer import Tokenizer, default_tokenizer

CONFIG = ModelConfig.preset("nano").replace(num_hidden_layers=2, hidden_size=32, num_nextn_predict_layers=2)


@pytest.fixture
def places(tmp_path):
    """A clone's place and a wheel's; the checkpoint lies in the second."""
    folder = tmp_path / "wheel" / "tiny-v3"
    model = DeepSeekV3(CONFIG, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    model.save_pretrained(folder, mtp_copies=False)
    default_tokenizer().save(folder)
    return tmp_path / "clone", tmp_path / "wheel"


def test_the_name_is_looked_up_in_the_clone_then_in_what_a_wheel_brought(places, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert checkpoint_folder("tiny-v3", places) == places[1] / "tiny-v3"
    shutil.copytree(places[1], places[0])
    assert checkpoint_folder("tiny-v3", places) == places[0] / "tiny-v3"


def test_any_other_name_is_a_folder(tmp_path):
    assert checkpoint_folder(tmp_path) == tmp_path
    with pytest.raises((CheckpointError, ValueError), match="tiny-v4"):
        DeepSeekV3.from_pretrained("tiny-v4")


def test_a_local_folder_of_that_name_comes_first_and_is_said(places, monkeypatch, tmp_path):
    shutil.copytree(places[1] / "tiny-v3", tmp_path / "tiny-v3")
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match=re.escape(str(tmp_path / "tiny-v3"))):
        model = DeepSeekV3.from_pretrained("tiny-v3")
    assert model.config.hidden_size == 32


def test_where_it_is_missing_or_half_there_the_way_out_is_named(places, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"tiny-v3.*looked in.*make checkpoint"):
        checkpoint_folder("tiny-v3", (tmp_path / "a", tmp_path / "b"))
    for file in ("tokenizer.json", "model.safetensors"):
        (places[1] / "tiny-v3" / file).unlink()
        with pytest.raises(CheckpointError, match=f"not whole, {file} is missing.*git checkout"):
            checkpoint_folder("tiny-v3", places)


def test_without_the_mtp_copies_the_file_is_smaller_and_the_model_the_same(tmp_path):
    model = DeepSeekV3(CONFIG, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path / "with")
    model.save_pretrained(tmp_path / "without", mtp_copies=False)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("with", "without")]
    copies = 2 * 2 * CONFIG.vocab_size * CONFIG.hidden_size * 4
    assert sizes[0] - sizes[1] == pytest.approx(copies, rel=0.01)
    ids = torch.arange(6, 26)[None]
    outs = [DeepSeekV3.from_pretrained(tmp_path / name)(ids, return_mtp=True) for name in ("with", "without")]
    assert torch.equal(outs[0].logits, outs[1].logits)
    for a, b in zip(outs[0].mtp_logits, outs[1].mtp_logits, strict=True):
        assert torch.equal(a, b)


def test_transformers_reads_the_shape_of_tiny_v3_and_gives_the_same_logits(tmp_path):
    from transformers import AutoModelForCausalLM

    config = ModelConfig.preset("tiny-v3").replace(num_hidden_layers=3)
    model = DeepSeekV3(config, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    model.save_pretrained(tmp_path, mtp_copies=False)
    ours = DeepSeekV3.from_pretrained(tmp_path, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(6, config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)


def test_the_shipped_weights_give_the_same_logits_in_transformers():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = checkpoint_folder("tiny-v3")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = DeepSeekV3.from_pretrained("tiny-v3", dtype=torch.float32).eval()
    text = "def __init__(self, name):\n    self.name = name\n"
    ids = torch.tensor([Tokenizer.from_pretrained("tiny-v3").encode(text, bos=True)])
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == ids[0].tolist()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
