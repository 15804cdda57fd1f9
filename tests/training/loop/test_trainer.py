"""Settings, schedules, optimiser, averaging, evaluation and the loop that joins them, on a model of a second."""

import dataclasses
import errno
import math
import os
import signal
import subprocess

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3lib import DeepSeekV3, ModelConfig
from dsv3lib.errors import CheckpointError, ConfigError, SaveError, TrainingError
from dsv3lib.training.loop.average import WeightAverage
from dsv3lib.training.loop.evaluate import evaluate, token_bytes
from dsv3lib.training.loop.optimizer import AdamW
from dsv3lib.training.loop.schedule import Schedule, steps_for_seconds, steps_for_tokens
from dsv3lib.training.loop.settings import TrainingConfig
from dsv3lib.training.loop.trainer import Trainer
from dsv3lib.training.run import save_point
from dsv3lib.training.run.interrupt import deferred_interrupt
from dsv3lib.training.run.log import read_log
from dsv3lib.training.text.data import PackedStream
from dsv3lib.training.text.domains import builtin_domains
from dsv3lib.training.text.tokenizer import default_tokenizer

SIZE = ModelConfig.preset("nano").replace(num_hidden_layers=2)


@pytest.fixture(scope="module")
def text():
    return builtin_domains(("docs", "arithmetic")), default_tokenizer()


@pytest.fixture
def make(text):
    """Makes a trainer of a nano model; keyword arguments are training settings."""

    def trainer(out=None, resume=False, seq_len=32, model_seed=0, **settings):
        settings = {"batch_size": 4, "checkpoint_every": 2, "validation_batches": 1, "threads": 1, **settings}
        if not {"tokens", "minutes"} & settings.keys():
            settings.setdefault("steps", 4)
        model = DeepSeekV3(SIZE, generator=torch.Generator().manual_seed(model_seed))
        stream = PackedStream(*text, seq_len)
        return Trainer(model, stream, TrainingConfig(**settings), out=out, resume=resume)

    return trainer


# ---- settings --------------------------------------------------------------------------------------------


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


# ---- schedules -------------------------------------------------------------------------------------------


def test_the_papers_schedule_at_the_papers_tokens():
    """One step for each billion tokens; §4.2's corners must be where the paper has them."""
    config = TrainingConfig(steps=14_801, warmup_steps=1, learning_rate=2.2e-4)
    schedule = Schedule(config, 14_801)
    at = lambda billions: billions + 2  # noqa: E731  (the step after so many)
    assert schedule.learning_rate(at(0)) == schedule.learning_rate(at(9_999)) == 2.2e-4
    assert schedule.learning_rate(at(12_150)) == pytest.approx((2.2e-4 + 2.2e-5) / 2, rel=1e-3)
    assert schedule.learning_rate(at(14_301)) == pytest.approx(2.2e-5)
    assert schedule.learning_rate(at(14_632)) == pytest.approx(2.2e-5)
    assert schedule.learning_rate(at(14_634)) == pytest.approx(7.3e-6)
    assert (schedule.mtp_loss_weight(at(9_999)), schedule.mtp_loss_weight(at(10_001))) == (0.3, 0.1)
    assert (schedule.bias_speed(at(14_299)), schedule.bias_speed(at(14_301))) == (config.bias_speed, 0.0)


@given(st.integers(1, 400), st.integers(1, 30), st.integers(1, 64), st.integers(0, 40))
def test_curves_rise_once_and_fall_once(steps, warmup, batch, batch_warmup):
    config = TrainingConfig(
        steps=steps, warmup_steps=warmup, batch_size=batch, batch_warmup_steps=batch_warmup
    )
    schedule = Schedule(config, steps)
    rates = [schedule.learning_rate(s) for s in range(1, steps + 1)]
    peak = min(warmup, steps)
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak - 1 :] == sorted(
        rates[peak - 1 :], reverse=True
    )
    assert max(rates) <= config.learning_rate and min(rates) > 0
    sizes = [schedule.batch_size(s) for s in range(1, steps + 1)]
    assert sizes == sorted(sizes) and sizes[0] >= 1 and sizes[-1] <= batch
    assert steps <= batch_warmup or sizes[-1] == batch


def test_a_length_decided_early_moves_the_shares_and_not_the_rise():
    config = TrainingConfig(minutes=1.0, warmup_steps=10, batch_warmup_steps=10)
    early, late = Schedule(config, 100, decided_after=4), Schedule(config, 100)
    assert [early.share(s) for s in (4, 5, 6)] == [0.0, 0.0, 1 / 96] and late.share(10) == 0.0
    for curve in ("learning_rate", "batch_size"):
        assert [getattr(early, curve)(s) for s in range(1, 12)] == [
            getattr(late, curve)(s) for s in range(1, 12)
        ]
    assert early.learning_rate(100) == late.learning_rate(100) == config.learning_rate * config.tail_ratio


def test_a_slow_machine_decides_before_its_warm_up_is_over(make, monkeypatch):
    trainer = make(minutes=1.0, warmup_steps=20, batch_size_start=4, validation_batches=0)
    monkeypatch.setattr("dsv3lib.training.loop.trainer.time.perf_counter", iter(range(0, 10_000, 4)).__next__)
    records = list(trainer)  # four seconds a step
    assert trainer.schedule.decided_after == 2 and len(records) == 2 + (60 - 8) // 4


def test_nothing_in_the_warm_up_depends_on_the_length_and_nothing_after_it_goes_without():
    config = TrainingConfig(minutes=1.0, warmup_steps=5)
    undecided = Schedule(config, None)
    for total in (6, 1000):
        decided = Schedule(config, total)
        for curve in ("learning_rate", "batch_size", "mtp_loss_weight", "bias_speed"):
            assert [getattr(undecided, curve)(s) for s in range(1, 6)] == [
                getattr(decided, curve)(s) for s in range(1, 6)
            ]
    with pytest.raises(TrainingError, match="must be decided by step 5"):
        undecided.learning_rate(6)


@given(st.integers(1, 100_000), st.integers(1, 20), st.integers(0, 30), st.integers(2, 64))
def test_steps_for_tokens_are_enough_and_not_one_too_many(tokens, batch, batch_warmup, length):
    config = TrainingConfig(tokens=tokens, batch_size=batch, batch_warmup_steps=batch_warmup)
    steps = steps_for_tokens(config, length, tokens)
    sizes = [Schedule(config, None).batch_size(s) * length for s in range(1, steps + 1)]
    assert sum(sizes[:-1]) < tokens <= sum(sizes)


def test_steps_for_seconds_fill_the_time_and_always_leave_one():
    config = TrainingConfig(minutes=1.0, batch_size=8, batch_size_start=8, warmup_steps=5)
    assert steps_for_seconds(config, 5, seconds_left=40.0, seconds_per_sequence=0.5) == 15
    assert steps_for_seconds(config, 5, seconds_left=-3.0, seconds_per_sequence=0.5) == 6


# ---- optimiser and average -------------------------------------------------------------------------------


def toy(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7), torch.nn.Linear(7, 3)).to(dtype)


def train_toy(model, optimizer, steps, learning_rate=1e-2):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(16, 5, generator=generator).to(model[0].weight.dtype)
        model.zero_grad()
        model(x).pow(2).sum().backward()
        optimizer(learning_rate)


def test_adamw_agrees_with_torchs():
    ours, theirs = toy(), toy()
    adam = AdamW(ours.named_parameters())
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    train_toy(ours, adam.step, 20)
    train_toy(theirs, lambda _: reference.step(), 20)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_decay_pulls_matrices_and_leaves_norms_and_biases():
    model = toy()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    AdamW(model.named_parameters(), weight_decay=0.5).step(0.1)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if p.ndim >= 2 else 1.0))


def test_master_weights_keep_what_bf16_would_lose():
    """Steps of 1e-5 on weights near 1 vanish in BF16, one by one; the FP32 masters add them up."""
    weight = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    adam = AdamW([("weight", weight)], weight_decay=0.0, moment_dtype=torch.bfloat16)
    for _ in range(1000):
        weight.grad = torch.ones_like(weight)
        adam.step(1e-5)
    torch.testing.assert_close(adam.masters["weight"], torch.full((2, 2), 0.99), rtol=0, atol=2e-4)
    assert weight.dtype == torch.bfloat16 and weight[0, 0].item() == pytest.approx(0.99, abs=4e-3)
    assert adam.first["weight"].dtype == torch.bfloat16
    assert (torch.ones(2, dtype=torch.bfloat16) - 1e-5 == 1).all()  # what would have happened without


def test_optimizer_state_goes_out_and_in_exactly():
    one, other = toy(), toy()
    first = AdamW(one.named_parameters())
    train_toy(one, first.step, 3)
    other.load_state_dict(one.state_dict())
    second = AdamW(other.named_parameters())
    second.load_state_tensors({k: v.clone() for k, v in first.state_tensors().items()}, first.count)
    for model, adam in ((one, first), (other, second)):
        train_toy(model, adam.step, 3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    broken = first.state_tensors() | {"first.0.weight": torch.zeros(2, 2)}
    with pytest.raises(CheckpointError, match=r"first.0.weight.*\(2, 2\), expected"):
        second.load_state_tensors(broken, 3)
    del broken["first.0.weight"]
    with pytest.raises(CheckpointError, match="first.0.weight' is missing"):
        second.load_state_tensors(broken, 3)


def test_average_follows_slowly_and_gives_the_weights_back():
    model = toy()
    average = WeightAverage(model, decay=0.5)
    start = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    average.update(model)  # the first decay is 2/11
    torch.testing.assert_close(average.tensors["0.weight"], start + 9 / 11)
    own = model[0].weight.detach().clone()
    with average.applied(model):
        assert torch.equal(model[0].weight, average.tensors["0.weight"])
    assert torch.equal(model[0].weight, own)


# ---- evaluation ------------------------------------------------------------------------------------------


def test_a_model_that_knows_nothing_pays_ln_v_for_every_token(make, text):
    trainer = make(batch_size_start=4)
    with torch.no_grad():
        trainer.model.lm_head.weight.zero_()
    trainer.model.train()
    result = evaluate(trainer.model, trainer.stream, batches=1, batch_size=4)
    assert trainer.model.training and list(result.domains) == ["docs", "arithmetic"]
    for name, domain in result.domains.items():
        assert domain.loss == pytest.approx(math.log(SIZE.vocab_size), rel=1e-6)
        batch = trainer.stream.validation_batches(name, 1, 4)[0]
        same = batch.document_ids[:, 1:] == batch.document_ids[:, :-1]
        targets = batch.input_ids[:, 1:][same & (batch.labels[:, 1:] >= 0)].tolist()
        size = sum(len(text[1].backend.id_to_token(t)) for t in targets if t > 5)
        assert domain.tokens == len(targets)
        assert domain.bits_per_byte == pytest.approx(12 * len(targets) / size, rel=1e-6)  # log2(4096) = 12
    assert len(result.max_violation) == len(SIZE.moe_layers)


@given(st.text(max_size=60).filter(lambda s: s.isprintable()))
def test_token_bytes_add_up_to_the_texts_bytes(written):
    tokenizer = default_tokenizer()
    ids = tokenizer.encode(written, bos=True, eos=True)
    assert token_bytes(tokenizer)[torch.tensor(ids)].sum() == len(written.encode())


# ---- the loop --------------------------------------------------------------------------------------------


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


# ---- what goes wrong -------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_saved(make, tmp_path):
    trainer = make(tmp_path / "run", steps=6)
    steps = iter(trainer)
    for _ in range(3):
        next(steps)
    with torch.no_grad():
        trainer.model.lm_head.weight[0, 0] = math.nan
    with pytest.raises(TrainingError, match=r"step 4: loss \(main\) is nan.*step-00000002"):
        next(steps)
    assert len(read_log(tmp_path / "run").steps) == 3
    again = make(tmp_path / "run", resume=True, steps=6)
    assert again.steps_done == 2 and again.run(progress=False)["reason"] == "finished"


def test_weights_that_spoil_a_router_stop_the_run_with_the_step(make, tmp_path):
    trainer = make(tmp_path / "run", steps=6)
    trainer.step()
    with torch.no_grad():
        trainer.model.model.embed_tokens.weight.fill_(math.nan)
    with pytest.raises(TrainingError, match="step 2: .*[Nn]a[Nn].*no save point yet"):
        trainer.step()


def test_a_gradient_that_is_not_finite_is_told_before_the_weights_change(make):
    trainer = make(steps=3)
    trainer.step()
    before = trainer.model.lm_head.weight.detach().clone()
    trainer.model.lm_head.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(TrainingError, match="step 2: gradient norm is (inf|nan)"):
        trainer.step()
    assert torch.equal(trainer.model.lm_head.weight, before)


def test_ctrl_c_finishes_the_step_and_saves(make, tmp_path):
    trainer = make(tmp_path / "run", steps=6, checkpoint_every=None, validation_batches=0)
    plain = make(steps=6, validation_batches=0)
    reference = [r["loss"] for r in plain]
    draw = trainer.stream.next_batch

    def press_in_third_step(size):
        if trainer.steps_done == 2:
            signal.raise_signal(signal.SIGINT)
        return draw(size)

    trainer.stream.next_batch = press_in_third_step
    assert trainer.run(progress=False)["reason"] == "interrupted"
    assert trainer.steps_done == 3 and save_point.latest_savepoint(tmp_path / "run").name == "step-00000003"
    again = make(tmp_path / "run", resume=True, steps=6, checkpoint_every=None, validation_batches=0)
    again.run(progress=False)
    assert read_log(tmp_path / "run").column("loss") == reference


def test_ctrl_c_between_steps_saves_too(make, tmp_path):
    def press(trainer, record):
        if record["step"] == 2:
            raise KeyboardInterrupt

    trainer = make(tmp_path / "run", steps=5, checkpoint_every=None)
    assert trainer.run(callbacks=[press], progress=False)["reason"] == "interrupted"
    assert save_point.latest_savepoint(tmp_path / "run").name == "step-00000002"


def test_ctrl_c_pressed_twice_does_not_wait():
    with pytest.raises(KeyboardInterrupt), deferred_interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.requested
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_folder_that_holds_something_is_refused_and_an_empty_one_is_not(make, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TrainingError, match="exists and is no run of ours"):
        make(tmp_path)
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty")
    with pytest.raises(TrainingError, match="holds a run already"):
        make(tmp_path / "empty")
    with pytest.raises(TrainingError, match="no run to resume"):
        make(tmp_path / "nowhere", resume=True)
    assert (tmp_path / "notes.txt").read_text() == "mine" and not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    "change, field",
    [
        ({"seed": 1}, r"training\.seed: the run was begun with 0"),
        ({"learning_rate": 0.1}, r"training\.learning_rate"),
        ({"steps": 9}, r"training\.steps.*with 4, it is to be resumed with 9"),
        ({"seq_len": 16}, r"stream\.seq_len"),
        ({"threads": 2}, r"training\.threads"),
    ],
)
def test_resuming_another_run_is_refused_by_name(make, tmp_path, change, field):
    threads = torch.get_num_threads()
    make(tmp_path / "run").step()
    try:
        with pytest.raises(TrainingError, match=field):
            make(tmp_path / "run", resume=True, **change)
    finally:
        torch.set_num_threads(threads)


def test_resuming_with_another_model_text_or_beginning_is_refused(make, text, tmp_path):
    make(tmp_path / "run")
    model = DeepSeekV3(SIZE.replace(rope_theta=20000.0), generator=torch.Generator().manual_seed(0))
    config = make().config
    with pytest.raises(TrainingError, match=r"model\.rope_theta"):
        Trainer(model, PackedStream(*text, 32), config, out=tmp_path / "run", resume=True)
    model = DeepSeekV3(SIZE, generator=torch.Generator().manual_seed(0))
    with pytest.raises(TrainingError, match=r"stream\.weights|stream\.domains"):
        other = PackedStream(builtin_domains(("docs",)), text[1], 32)
        Trainer(model, other, config, out=tmp_path / "run", resume=True)
    with pytest.raises(TrainingError, match="initial_weights"):
        make(tmp_path / "run", resume=True, model_seed=1)


def test_a_damaged_savepoint_is_told_and_the_one_before_still_serves(make, tmp_path):
    trainer = make(tmp_path / "run", steps=6)
    steps = iter(trainer)
    for _ in range(5):
        next(steps)
    newest = save_point.latest_savepoint(tmp_path / "run")
    moments = newest / "training" / "optimizer.safetensors"
    moments.write_bytes(moments.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="optimizer.safetensors.*remove this save point"):
        make(tmp_path / "run", resume=True, steps=6)
    for path in sorted(newest.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    newest.rmdir()
    assert make(tmp_path / "run", resume=True, steps=6).steps_done == 2


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few megabytes; ``None`` where this process may not mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)], capture_output=True
    )
    yield place if mount.returncode == 0 else None
    if mount.returncode == 0:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_keeps_the_savepoint_before_and_the_log(make, tmp_path, small_disk, monkeypatch):
    run = (small_disk or tmp_path) / "run"
    trainer = make(run, steps=8, keep_checkpoints=1)
    steps = iter(trainer)
    for _ in range(3):
        next(steps)
    if small_disk is not None:
        room = os.statvfs(small_disk)
        (small_disk / "ballast").write_bytes(b"x" * (room.f_bavail * room.f_bsize - 1_000_000))
    else:

        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(save_point, "save_tensors", full)
    with pytest.raises(SaveError, match="No space left on device.*earlier files are intact"):
        next(steps)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000002"]
    assert len(read_log(run).steps) == 4
    if small_disk is not None:
        (small_disk / "ballast").unlink()
    monkeypatch.undo()
    again = make(run, resume=True, steps=8, keep_checkpoints=1)
    assert again.steps_done == 2
    assert [r["step"] for r in again][-1] == 8
    assert [r["step"] for r in read_log(run).steps] == list(range(1, 9))


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "model"
    save_point.write_folder(target, lambda folder: (folder / "a").write_text("old"))

    def fails_half_way(folder):
        (folder / "a").write_text("new")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(SaveError, match="No space left"):
        save_point.write_folder(target, fails_half_way)
    assert (target / "a").read_text() == "old" and list(tmp_path.iterdir()) == [target]
    save_point.write_folder(target, lambda folder: (folder / "b").write_text("new"))
    assert [p.name for p in target.iterdir()] == ["b"] and list(tmp_path.iterdir()) == [target]


def test_frozen_settings_cannot_change_under_a_run():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainingConfig(steps=1).seed = 2
