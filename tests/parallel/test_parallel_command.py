"""``dsv3 train --parallel`` from the command line: what it refuses at once, and a whole run."""

import argparse
import re

import pytest
import torch

from dsv3lib import DeepSeekV3
from dsv3lib.cli import main
from dsv3lib.errors import ConfigError
from dsv3lib.layers.operations import PLAIN_OPERATIONS
from dsv3lib.model.loss import LossWeights
from dsv3lib.training.run import command, parallel_command
from dsv3lib.training.run import folder as run_folder
from dsv3lib.training.run.log import read_log
from dsv3lib.training.text.data import PackedStream
from dsv3lib.training.text.folder import open_domains
from dsv3lib.training.text.tokenizer import Tokenizer

REFUSED = {
    "--parallel pp=2,ep=3": "ep: 3, expected a divisor of n_routed_experts",
    "--parallel pp=4,tp=2": "tp=2",
    "--parallel pp=8 --schedule 1f1b": "stages",
    "--parallel pp=2 --schedule dualpipe --microbatches 7": "microbatches: 7",
    "--parallel pp=2 --microbatches 4 --batch-size 6": "batch size of step 1: 6",
    "--parallel pp=2,dp=16 --schedule 1f1b": "processes: 32",
    "--parallel pp=2 --device cuda": "--device: 'cuda'",
    "--parallel pp=2 --balance none bias": "--balance",
    "--microbatches 8": "--microbatches: given without --parallel",
    "--cut measured": "--cut: given without --parallel",
}


@pytest.mark.parametrize("options", REFUSED)
def test_bad_input_is_refused_before_a_process_starts(options, tmp_path, capsys, monkeypatch):
    start = "dsv3lib.pipeline.runtime.processes._start"
    monkeypatch.setattr(start, lambda *_, **__: pytest.fail("a process was started"))
    out = tmp_path / "run"
    assert main(["train", "--preset", "nano", "--steps", "2", "--out", str(out), *options.split()]) == 2
    assert REFUSED[options] in capsys.readouterr().err
    assert not out.exists()


def test_a_port_in_use_and_a_world_of_another_size_are_told(tmp_path, capsys, monkeypatch):
    import socket

    held = socket.socket()
    held.bind(("127.0.0.1", 0))
    held.listen()
    around = {
        "TORCHELASTIC_RUN_ID": "here", "RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(held.getsockname()[1]),
    }  # fmt: skip
    for name, value in around.items():
        monkeypatch.setenv(name, value)
    command = ["train", "--preset", "nano", "--steps", "2", "--out", str(tmp_path / "run"), "--schedule", "1f1b"]
    assert main([*command, "--parallel", "pp=2"]) == 2
    assert "world size: 3, expected 2" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*command, "--parallel", "pp=2"]) == 2
    told = capsys.readouterr().err
    assert "MASTER_PORT" in told and around["MASTER_PORT"] in told
    held.close()


def resumed(out, *options):
    """How a run would go on."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parallel_command.settle(parser.parse_args(["--resume", str(out), *options]))


def test_a_run_from_the_command_line(tmp_path, capfd):
    texts = tmp_path / "text"
    texts.mkdir()
    for page in range(12):
        (texts / f"{page}.txt").write_text(f"Page {page} of twelve: {page} times {page} is {page * page}.\n" * 20)
    out = tmp_path / "run"
    options = f"--preset nano --data {texts} --seq-len 16 --steps 3 --parallel pp=2 --microbatches 4 --cut measured "
    options += f"--out {out}"
    assert main(["train", *options.split()]) == 0
    pattern = r"optimizer states: (\S+) MB on the fullest rank \(ZeRO-1; unsharded (\S+) MB\)"
    told = re.search(pattern, capfd.readouterr().out)
    assert float(told[1]) < 0.6 * float(told[2])  # DualPipe has two copies
    log, recorded = read_log(out), run_folder.read_run(out)
    assert [record["step"] for record in log.steps] == [1, 2, 3] and log.end["reason"] == "finished"
    assert log.validations and recorded["parallel"]["layout"].startswith("pp=2")
    costs = tuple(recorded["parallel"]["costs"])
    assert len(costs) == 4 and min(costs) > 0
    assert resumed(out).costs == resumed(out, "--parallel", "pp=1").costs == costs  # as they were: the same numbers
    assert resumed(out, "--cut", "measured").costs == costs
    with pytest.raises(ConfigError, match="--cut: operations for .*, a run whose cut is 'measured'"):
        resumed(out, "--cut", "operations")
    model = DeepSeekV3(
        DeepSeekV3.from_pretrained(out / "model").config, generator=torch.Generator().manual_seed(0)
    )
    model.choice.backend = lambda *_, **__: PLAIN_OPERATIONS
    domains, _ = open_domains(str(texts), [], text="full")
    batch = PackedStream(domains, Tokenizer.from_pretrained(out / "tokenizer"), 16).next_batch(4)
    total, training = 0.0, recorded["training"]
    weights = LossWeights(training["mtp_loss_weight"], model.aux_loss_alpha)
    for row in range(4):
        ids, labels, documents = (t[row : row + 1] for t in (batch.input_ids, batch.labels, batch.document_ids))
        loss = model(ids, labels=labels, document_ids=documents, loss_weights=weights).loss
        total += (loss * 0.25).item()
    assert log.steps[0]["loss"] == total  # to the bit, in FP32
    for file in (tmp_path / "run").rglob(".unfinished*"):
        pytest.fail(f"left over: {file}")
