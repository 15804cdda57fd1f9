"""A run in which something goes wrong: told by name, and nothing lost that was saved."""

import errno
import math
import os
import signal
import subprocess

import pytest
import torch
from trainers import SIZE

from dsv3lib import DeepSeekV3
from dsv3lib.errors import CheckpointError, SaveError, TrainingError
from dsv3lib.training.loop.trainer import Trainer
from dsv3lib.training.run import save_point
from dsv3lib.training.run.interrupt import deferred_interrupt
from dsv3lib.training.run.log import read_log
from dsv3lib.training.text.data import PackedStream
from dsv3lib.training.text.domains import builtin_domains


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
