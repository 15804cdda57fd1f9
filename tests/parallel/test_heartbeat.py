"""Ranks under torchrun watch one another: one that is stopped, killed or raises ends the run, and is named."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from itertools import groupby

import psutil
import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from dsv3lib import DeepSeekV3
from dsv3lib.errors import ConfigError, TrainingError
from dsv3lib.pipeline.runtime import heartbeat
from dsv3lib.pipeline.runtime.heartbeat import SILENT_AFTER_FAULT, SILENT_BEATS, Heartbeat
from dsv3lib.pipeline.runtime.worker import as_torchrun_says
from dsv3lib.training.run import save_point

SECONDS = 15


def machine(number, port, command):
    """torchrun's agent of one of two machines, with one rank."""
    where = f"--nnodes 2 --nproc-per-node 1 --node-rank {number} --master-addr 127.0.0.1 --master-port {port}"
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *where.split(), "-m", "dsv3lib.cli", *command],
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def faults():
    """One by default; DSV3_FAULTS=3 is three of each kind."""
    times = int(os.environ.get("DSV3_FAULTS", 0))
    return [(kind, number) for number in range(times) for kind in ("SIGSTOP", "SIGKILL")] or [("SIGSTOP", 0)]


@pytest.mark.parametrize(("kind", "number"), faults())
def test_a_rank_alone_on_its_machine_is_missed_by_the_other_and_leaves_nothing_behind(kind, number, tmp_path):
    texts, out = tmp_path / "text", tmp_path / "run"
    texts.mkdir()
    for page in range(12):
        (texts / f"{page}.txt").write_text(f"Page {page} of twelve: {page} times {page} is {page * page}.\n" * 20)
    options = f"train --preset nano --data {texts} --seq-len 16 --steps 100000 --checkpoint-every 3 --out {out}"
    command = [*options.split(), "--parallel", "pp=2", "--microbatches", "4"]
    port = free_port()
    agents = [machine(number, port, command) for number in range(2)]
    try:
        until = time.monotonic() + 120
        while save_point.latest_savepoint(out) is None:
            assert time.monotonic() < until and all(agent.poll() is None for agent in agents)
            time.sleep(0.1)
        (struck,) = psutil.Process(agents[1].pid).children()
        started = [one for agent in agents for one in psutil.Process(agent.pid).children(recursive=True)]
        assert len(started) == 4  # a rank and its watchdog each
        time.sleep(random.Random(number).uniform(0.0, 1.0))  # any phase of a step
        begun = time.monotonic()
        os.kill(struck.pid, getattr(signal, kind))
        told = [agent.communicate(timeout=60)[0] for agent in agents]
        assert time.monotonic() - begun < SECONDS, told
    finally:
        for one in [one for agent in agents for one in psutil.Process().children(recursive=True)]:
            one.kill()
    assert all(agent.returncode != 0 for agent in agents)
    assert re.search(r"rank 0 ends: rank 1 stopped or was killed during step \d+: \w+", told[0]), told[0]
    assert psutil.wait_procs(started, timeout=2)[1] == []
    DeepSeekV3.from_pretrained(save_point.latest_savepoint(out))


class Three:
    """Rank 0 of three looks round by round at what a test writes for the others."""

    def __init__(self):
        whole = dist.HashStore()
        self.hearts = [Heartbeat(whole, rank, 3) for rank in range(3)]
        self.store, self.rounds = dist.PrefixStore("heartbeat", whole), [0, 0, 0]

    def round(self, *beating):
        for rank in (0, *beating):
            self.rounds[rank] += 1
            self.store.set(f"beat/{rank}", str(self.rounds[rank]))
        return self.hearts[0].look(self.store)


@given(st.lists(st.booleans(), max_size=5 * SILENT_BEATS).map(lambda beats: [*beats, *[False] * SILENT_BEATS]))
def test_a_rank_is_missed_after_so_many_silent_rounds_in_a_row_and_a_slow_one_never(beats):
    three = Three()
    three.hearts[1].tell("step 3: saving")
    three.round(1, 2)
    for number, beat in enumerate(beats):
        silent = [len(list(run)) for alive, run in groupby(beats[: number + 1]) if not alive]
        missed = not beat and silent[-1] >= SILENT_BEATS
        found = three.round(*([1] if beat else []), 2)
        assert bool(found) == missed, (number, found)
        if missed:
            assert found == "rank 1 stopped or was killed during step 3: saving: no sign of life for 8 s"
            return


def test_who_is_done_is_not_missed_and_who_failed_is_named_with_its_error():
    three = Three()
    three.store.set("end/2", "left")
    for _ in range(2 * SILENT_BEATS):
        assert three.round(1) == ""
    three.hearts[1].tell("step 4: clipping")
    error = three.hearts[1].blame(ConfigError("size: 3, expected 2"))
    assert isinstance(error, ConfigError)
    assert three.round(1) == str(error)
    assert str(error).startswith("rank 1 failed during step 4: clipping: ConfigError: size: 3, expected 2")
    assert isinstance(three.hearts[2].blame(ValueError("on purpose")), TrainingError)


def test_an_error_that_only_says_that_somebody_is_gone_waits_for_who_it_is(monkeypatch):
    three = Three()
    found = []

    def wait(seconds):
        found.extend(three.round(1) for _ in range(int(seconds / heartbeat.BEAT)))

    monkeypatch.setattr(heartbeat.time, "sleep", wait)
    three.round(1, 2)
    three.hearts[0].blame(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"))
    assert found[: SILENT_AFTER_FAULT - 1] == [""] * (SILENT_AFTER_FAULT - 1)
    assert found[SILENT_AFTER_FAULT - 1].startswith("rank 2 stopped or was killed during joining: no sign")


def test_a_rank_that_is_done_leaves_no_watchdog(monkeypatch):
    around = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in around.items():
        monkeypatch.setenv(name, str(value))
    seen = []

    def work(rank):
        seen.extend(one for one in psutil.Process().children() if "guardian.py" in " ".join(one.cmdline()))
        return rank.gather_objects("done")

    assert as_torchrun_says(work) == ["done"]
    assert len(seen) == 1 and psutil.wait_procs(seen, timeout=10)[1] == []
    assert not dist.is_initialized()
