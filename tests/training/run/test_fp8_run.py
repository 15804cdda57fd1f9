"""``dsv3 train --fp8 tile``: the recipe is in the record of the run, and a resumed run goes on with it alike."""

import json

import pytest
import torch

from dsv3lib import DeepSeekV3, ModelConfig
from dsv3lib.cli import main
from dsv3lib.errors import ConfigError
from dsv3lib.fp8 import Recipe
from dsv3lib.training.loop.settings import TrainingConfig
from dsv3lib.training.loop.trainer import Trainer
from dsv3lib.training.run.folder import read_run
from dsv3lib.training.text.data import PackedStream
from dsv3lib.training.text.folder import open_domains
from dsv3lib.training.text.tokenizer import default_tokenizer

STEPS = 4


def trainer(out, resume: bool = False, fp8: str | None = "tile") -> Trainer:
    config = ModelConfig.preset("nano").replace(num_nextn_predict_layers=0, num_hidden_layers=2)
    tokenizer = default_tokenizer()
    stream = PackedStream(open_domains(None, ())[0], tokenizer, seq_len=16, seed=0)
    model = DeepSeekV3(config.replace(vocab_size=tokenizer.vocab_size), torch.Generator().manual_seed(0))
    settings = TrainingConfig(
        steps=STEPS,
        batch_size=2,
        validation_batches=0,
        checkpoint_every=2,
        threads=1,
        fp8=fp8,
        bf16_moments=True,
    )
    return Trainer(model, stream, settings, out=out, resume=resume)


def test_a_resumed_run_goes_on_in_fp8_to_the_same_losses(tmp_path) -> None:
    whole = [record["loss"] for record in trainer(tmp_path / "whole")]
    first = trainer(tmp_path / "cut")
    losses = [first.step()["loss"] for _ in range(2)]
    again = trainer(tmp_path / "cut", resume=True)
    assert again.model.recipe == Recipe.named("tile") and again.steps_done == 2
    assert again.optimizer.first["lm_head.weight"].dtype == torch.bfloat16
    assert losses + [record["loss"] for record in again] == whole
    recorded = read_run(tmp_path / "cut")
    assert recorded["recipe"] == "tile" and recorded["training"]["fp8"] == "tile"
    assert whole != [record["loss"] for record in trainer(None, fp8="none")]


def test_the_command_takes_the_recipe(tmp_path, capsys) -> None:
    out = tmp_path / "run"
    options = (
        "--preset nano --no-mtp --seq-len 16 --batch-size 2 --steps 1 --threads 1 --fp8 tile --out".split()
    )
    assert main(["train", *options, str(out)]) == 0
    training = json.loads((out / "run.json").read_text())["training"]
    assert training["fp8"] == "tile" and training["bf16_moments"] is True


def test_a_recipe_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="fp8.*'fp4'"):
        TrainingConfig(steps=1, fp8="fp4")
