"""Self-distillation of the MTP chain: the loss, what it moves and what it must leave alone."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trainers import SIZE

from dsv3lib import DeepSeekV3
from dsv3lib.errors import ConfigError
from dsv3lib.training.baselines.measure import first_drafts
from dsv3lib.training.loop.distillation import DraftTrainer, distillation_loss, within_document
from dsv3lib.training.loop.settings import TrainingConfig
from dsv3lib.training.text.data import Batch, PackedStream

DEEP = SIZE.replace(num_nextn_predict_layers=2)
SETTINGS = TrainingConfig(
    steps=25, batch_size=4, learning_rate=1e-2, weight_decay=0.0, bias_speed=1e-2, checkpoint_every=10,
    validation_batches=0, ema_decay=0.0, threads=1,
)  # fmt: skip


def draft_trainer(text, out=None, resume=False, shape=DEEP, **changes):
    model = DeepSeekV3(shape, generator=torch.Generator().manual_seed(0))
    config = dataclasses.replace(SETTINGS, **changes)
    return DraftTrainer(model, PackedStream(*text, 32), config, out=out, resume=resume)


@given(st.integers(0, 2**31), st.integers(1, 3))
def test_the_loss_is_the_divergence_from_the_model_some_places_on(seed, depth):
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 9, 7, generator=draw, dtype=torch.float64)
    drafts = torch.randn(2, 9 - depth, 7, generator=draw, dtype=torch.float64)
    counted = torch.rand(2, 9 - depth, generator=draw) < 0.7
    p, q = logits.float().softmax(-1), drafts.float().softmax(-1)
    plain = [
        sum(float(p[b, i + depth, v] * (p[b, i + depth, v] / q[b, i, v]).log()) for v in range(7))
        for b, i in counted.nonzero().tolist()
    ]
    expected = sum(plain) / len(plain) if plain else 0.0
    assert distillation_loss(logits, drafts, counted).item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert distillation_loss(logits, logits[:, depth:], counted).item() == pytest.approx(0.0, abs=1e-6)
    if len(plain) > 1:  # one place off is another loss
        assert distillation_loss(logits.roll(1, 1), drafts, counted).item() != pytest.approx(expected, rel=1e-4)


def test_no_gradient_reaches_the_model_that_teaches():
    logits = torch.randn(1, 5, 7, requires_grad=True)
    drafts = torch.randn(1, 4, 7, requires_grad=True)
    distillation_loss(logits, drafts, torch.ones(1, 4, dtype=torch.bool)).backward()
    assert logits.grad is None and drafts.grad.abs().sum() > 0


def test_a_draft_across_a_border_or_into_padding_does_not_count():
    ids = torch.arange(6)[None]
    batch = Batch(ids, torch.tensor([[0, 1, 2, 3, 4, -100]]), torch.tensor([[0, 0, 1, 1, 1, 1]]), ids)
    assert within_document(batch, 1).tolist() == [[True, False, True, True, False]]
    assert within_document(batch, 2).tolist() == [[False, False, True, False]]


def test_the_modules_learn_and_the_main_model_stays_to_the_last_bit(text):
    trainer = draft_trainer(text)
    model, before = trainer.model, {n: t.clone() for n, t in trainer.model.state_dict().items()}
    held_out = trainer.stream.validation_batches("docs", 2, 4)
    _, agreed = first_drafts(model, held_out)
    records = list(trainer)
    modules = tuple(f"model.layers.{k}." for k in (2, 3))
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert moved and all(n.startswith(modules) for n in moved)
    assert {n.split(".")[2] for n in moved} == {"2", "3"}
    assert any("e_score_correction_bias" in n for n in moved)  # their own balance goes on
    for depth in ("mtp_1", "mtp_2"):
        falls = [r["losses"][depth] for r in records]
        assert sum(falls[-5:]) < 0.7 * sum(falls[:5])
    assert all(r["loss"] == pytest.approx(sum(r["losses"].values()) / 2) for r in records)
    _, agrees = first_drafts(model, held_out)
    assert all(after > earlier for after, earlier in zip(agrees, agreed, strict=True))


def test_a_run_that_was_stopped_goes_on_to_the_same_losses(text, tmp_path):
    whole = [r["losses"] for r in draft_trainer(text, tmp_path / "whole")]
    stopped = draft_trainer(text, tmp_path / "stopped")
    first = [stopped.step()["losses"] for _ in range(13)]  # killed: three steps behind its save point
    goes_on = draft_trainer(text, tmp_path / "stopped", resume=True)
    assert goes_on.steps_done == 10
    assert first[:10] + [r["losses"] for r in goes_on] == whole


@pytest.mark.parametrize(
    "shape, changes, name",
    [
        (SIZE.replace(num_nextn_predict_layers=0), {}, "num_nextn_predict_layers"),
        (DEEP, {"ema_decay": 0.9}, "ema_decay"),
        (DEEP, {"validation_batches": 2}, "validation_batches"),
    ],
)
def test_what_cannot_be_is_refused(text, shape, changes, name):
    with pytest.raises(ConfigError, match=name):
        draft_trainer(text, shape=shape, **changes)
