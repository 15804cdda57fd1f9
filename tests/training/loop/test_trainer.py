"""The training loop: losses, records, lengths and folders, on a model of a second."""

import math

import pytest
import torch
from trainers import SIZE

from dsv3lib import DeepSeekV3
from dsv3lib.errors import TrainingError
from dsv3lib.training.loop.schedule import Schedule
from dsv3lib.training.run.log import read_log


def test_losses_fall_and_records_say_what_happened(make):
    trainer = make(steps=30, learning_rate=1e-2, validation_batches=0)
    records = list(trainer)
    main = [r["losses"]["main"] for r in records]
    assert main[0] == pytest.approx(math.log(SIZE.vocab_size), rel=0.02)
    assert sum(main[-5:]) / 5 < main[0] - 1.0
    assert [r["step"] for r in records] == list(range(1, 31)) and trainer.finished
    assert records[-1]["tokens"] == sum(r["batch_size"] for r in records) * 32
    for r in records:
        for row, depth in zip(r["expert_load"], (0, 1), strict=True):  # a mixture layer, and the MTP module's
            assert sum(row) == r["batch_size"] * (32 - depth) * SIZE.num_experts_per_tok
        by_domain = torch.tensor(list(r["domain_load"].values())).sum(0)
        assert by_domain.tolist() == r["expert_load"]
    with pytest.raises(TrainingError, match="finished"):
        trainer.step()


def test_schedules_reach_the_model(make):
    trainer = make(steps=40, warmup_steps=1, bias_speed=0.01, aux_loss_alpha=0.5, validation_batches=0)
    router = trainer.model.routers()[0]
    for record in trainer:
        before = getattr(trainer, "bias_seen", torch.zeros(SIZE.n_routed_experts))
        load = torch.tensor(record["expert_load"][0]).double()
        expected = before + record["bias_speed"] * (load.mean() - load).sign().float()
        torch.testing.assert_close(router.e_score_correction_bias, expected)
        trainer.bias_seen = router.e_score_correction_bias.clone()
        parts = record["losses"]
        total = parts["main"] + record["mtp_loss_weight"] * parts["mtp_1"] + parts["balance"]
        assert record["loss"] == pytest.approx(total, rel=1e-5)
        assert parts["balance"] > 0.5
    assert record["bias_speed"] == 0 and record["mtp_loss_weight"] == 0.1


def test_a_gradient_is_clipped_to_the_norm_allowed(make):
    trainer = make(steps=1, gradient_clip=1e-3, validation_batches=0)
    record = trainer.step()
    grads = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    assert record["gradient_norm"] > 0.1  # as it was
    assert torch.stack([g.norm() for g in grads]).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_a_run_by_the_clock_decides_its_length_after_the_warm_up(make, tmp_path):
    trainer = make(tmp_path / "run", minutes=0.01, warmup_steps=3, validation_batches=0)
    for number, record in enumerate(trainer, start=1):
        assert record["step"] == number
        assert trainer.total_steps is not None or number < 3
    history = read_log(tmp_path / "run")
    assert trainer.steps_done == trainer.total_steps == history.plan["total_steps"] > history.plan["step"]
    assert history.plan["step"] <= 3 and history.end["reason"] == "finished"


def test_a_run_by_the_clock_that_is_resumed_keeps_its_length_and_is_a_run_of_so_many_steps(make, tmp_path):
    settings = {"warmup_steps": 3, "checkpoint_every": 2, "validation_batches": 0}
    for stopped_after in (2, 5):  # before and after the length is decided
        run = tmp_path / f"run-{stopped_after}"
        first = make(run, minutes=0.01, **settings)
        for record in first:
            if record["step"] == stopped_after:
                break
        resumed = make(run, resume=True, minutes=0.01, **settings)
        assert resumed.total_steps == first.total_steps
        resumed.run(progress=False)
        history = read_log(run)
        assert history.plan["total_steps"] == len(history.steps)
        reference = make(minutes=0.01, **settings)
        plan = history.plan
        reference.schedule = Schedule(reference.config, plan["total_steps"], plan["step"])
        assert [r["loss"] for r in reference] == history.column("loss")


def test_a_run_by_tokens_sees_them(make):
    trainer = make(tokens=1000, validation_batches=0)
    last = list(trainer)[-1]
    assert 1000 <= last["tokens"] < 1000 + 4 * 32


def test_the_log_holds_a_record_for_each_step_and_the_folder_a_model_that_loads(make, tmp_path):
    trainer = make(tmp_path / "run", steps=5, validate_every=2)
    seen = []
    end = trainer.run(callbacks=[lambda t, r: seen.append(r)], progress=False)
    history = read_log(tmp_path / "run")
    assert history.steps == seen and history.end == end and end["reason"] == "finished"
    assert history.header["training"]["seed"] == 0 and history.header["domains"] == ["docs", "arithmetic"]
    assert [v["step"] for v in history.validations] == [2, 4, 5]
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000005"]
    for folder in (tmp_path / "run" / "model", tmp_path / "run" / "checkpoints" / kept[-1]):
        loaded = DeepSeekV3.from_pretrained(folder)
        for (name, mine), theirs in zip(
            trainer.model.state_dict().items(), loaded.state_dict().values(), strict=True
        ):
            assert torch.equal(mine, theirs), name
        assert (folder / "tokenizer.json").exists()
    assert not list((tmp_path / "run").rglob("*.pt")) and not list((tmp_path / "run").rglob("*.pkl"))


def test_transformers_loads_what_was_trained(make, tmp_path):
    import transformers  # slow to import, and part of the test extra: its absence is a failure

    trainer = make(tmp_path / "run", steps=2)
    trainer.run(progress=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    ids = torch.tensor([tokenizer("The with statement 等 12")["input_ids"]])
    assert ids[0, 1:].tolist() == trainer.tokenizer.encode("The with statement 等 12")
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, trainer.model.eval()(ids).logits, rtol=1e-4, atol=1e-4)
