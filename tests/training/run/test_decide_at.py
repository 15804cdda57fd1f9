"""A run by the clock that decides late, and runs begun before a setting existed."""

import json
from itertools import count

import pytest
import torch

from dsv3lib import DeepSeekV3, ModelConfig
from dsv3lib.errors import ConfigError, TrainingError
from dsv3lib.training.loop import trainer as trainer_module
from dsv3lib.training.loop.schedule import Schedule
from dsv3lib.training.loop.settings import TrainingConfig
from dsv3lib.training.loop.trainer import Trainer
from dsv3lib.training.text.data import PackedStream
from dsv3lib.training.text.domains import ArithmeticDomain
from dsv3lib.training.text.tokenizer import default_tokenizer

TOKENIZER = default_tokenizer()


def trainer(out, resume=False, **settings) -> Trainer:
    config = ModelConfig.preset("nano").replace(
        num_hidden_layers=2, hidden_size=32, num_nextn_predict_layers=0
    )
    model = DeepSeekV3(config, generator=torch.Generator().manual_seed(0))
    settings = {"batch_size": 1, "warmup_steps": 2, "validation_batches": 0, "threads": 1} | settings
    stream = PackedStream([ArithmeticDomain()], TOKENIZER, 16)
    return Trainer(model, stream, TrainingConfig(**settings), out=out, resume=resume)


def test_the_rate_is_constant_until_the_late_decision_and_falls_to_zero_after_it(tmp_path, monkeypatch):
    # A clock of our own: every look at it is 0.1 s later than the one before, so a step takes 0.1 s.
    ticks = count()
    monkeypatch.setattr(trainer_module.time, "perf_counter", lambda: next(ticks) / 10)
    shares = {
        "constant_share": 0.0,
        "cosine_share": 1.0,
        "rest_share": 0.0,
        "rest_ratio": 0.0,
        "tail_ratio": 0.0,
    }
    run = trainer(tmp_path / "run", minutes=0.03, decide_at=0.5, **shares)
    rates, decided = [], None
    for record in run:
        rates.append(record["learning_rate"])
        if decided is None and run.total_steps is not None:
            decided = record["step"]
            assert run.seconds >= 0.5 * 0.03 * 60
    assert decided is not None and run.total_steps > decided > 2
    assert rates[2:decided] == [run.config.learning_rate] * (decided - 2)
    assert all(a >= b for a, b in zip(rates[decided:], rates[decided + 1 :], strict=False))
    assert rates[-1] < 0.1 * rates[decided - 1]


def test_a_share_without_minutes_or_out_of_range_is_refused():
    for settings in (
        {"steps": 5, "decide_at": 0.5},
        {"minutes": 1, "decide_at": 0.0},
        {"minutes": 1, "decide_at": 1},
    ):
        with pytest.raises(ConfigError, match="decide_at"):
            TrainingConfig(**settings)
    undecided = Schedule(TrainingConfig(minutes=1), None)
    with pytest.raises(TrainingError, match="must be decided"):
        undecided.share(10_000)


def test_a_run_begun_before_a_setting_existed_resumes(tmp_path):
    out = tmp_path / "run"
    run = trainer(out, steps=4, checkpoint_every=1)
    run.step()
    run.step()
    described = json.loads((out / "run.json").read_text())
    del described["training"]["decide_at"]
    (out / "run.json").write_text(json.dumps(described))
    again = trainer(out, resume=True, steps=4, checkpoint_every=1)
    assert again.steps_done == 2
    described["training"]["learning_rate"] = 9e-3
    (out / "run.json").write_text(json.dumps(described))
    with pytest.raises(TrainingError, match="learning_rate"):
        trainer(out, resume=True, steps=4, checkpoint_every=1)
