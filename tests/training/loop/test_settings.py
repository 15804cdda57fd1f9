"""Settings of a run: refused by name where out of range, read and written, never changed."""

import dataclasses
import math

import pytest

from dsv3lib.errors import ConfigError
from dsv3lib.training.loop.settings import TrainingConfig


@pytest.mark.parametrize(
    "settings, field",
    [
        ({}, "steps, tokens, minutes"),
        ({"steps": 1, "minutes": 1.0}, "steps, minutes"),
        ({"steps": 0}, "steps"),
        ({"steps": 5, "batch_size": 0}, "batch_size"),
        ({"steps": 5, "batch_size": 2, "batch_size_start": 3}, "batch_size_start"),
        ({"steps": 5, "learning_rate": 0.0}, "learning_rate"),
        ({"steps": 5, "learning_rate": math.nan}, "learning_rate"),
        ({"steps": 5, "bias_speed": -0.001}, "bias_speed"),
        ({"steps": 5, "aux_loss_alpha": -1.0}, "aux_loss_alpha"),
        ({"steps": 5, "beta2": 1.0}, "beta2"),
        ({"steps": 5, "ema_decay": 1.0}, "ema_decay"),
        ({"steps": 5, "constant_share": 0.8, "cosine_share": 0.5}, "constant_share"),
        ({"steps": 5, "rest_ratio": 2.0}, "rest_ratio"),
        ({"minutes": -1.0}, "minutes"),
        ({"minutes": math.inf}, "minutes"),
        ({"steps": 5, "warmup_steps": 0}, "warmup_steps"),
        ({"steps": 5, "threads": 0}, "threads"),
        ({"steps": 5, "seed": -1}, "seed"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings, field):
    with pytest.raises(ConfigError, match=field):
        TrainingConfig(**settings)


def test_settings_survive_json_and_unknown_ones_are_refused():
    config = TrainingConfig(minutes=2, batch_size=12)
    assert TrainingConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="learning_speed"):
        TrainingConfig.from_dict({"steps": 1, "learning_speed": 1})


def test_frozen_settings_cannot_change_under_a_run():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainingConfig(steps=1).seed = 2
