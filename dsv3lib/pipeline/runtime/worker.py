"""One rank's process: joins the others over gloo, does its work, writes down its result or its error.

Started by ``processes.launch``; or by torchrun, whose ranks watch one another (:func:`as_torchrun_says`).
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...errors import ConfigError
from .heartbeat import Heartbeat
from .links import GlooLinks
from .status import Status

TIMEOUT = timedelta(seconds=60)


@dataclass
class Rank:
    """What the work of one process is given.

    Args:
        rank, world: which of how many.
        tell: writes down what begins now.
    """

    rank: int
    world: int
    tell: Callable[[str], None] = lambda doing: None

    def links(self, groups: Sequence[tuple[int, ...]] = ()) -> GlooLinks:
        """To the other ranks; all call it with the same groups."""
        return GlooLinks(groups)

    def gather_objects(self, value: Any) -> list[Any]:
        """What each rank of the world gives, in order, before there are links."""
        every: list[Any] = [None] * self.world
        dist.all_gather_object(every, value)
        return every


def as_torchrun_says(work: Callable[[Rank], Any], timeout: timedelta = TIMEOUT) -> Any:
    """Do a rank's work among those that torchrun has started; its environment variables say where they meet.

    Args:
        work: what this rank does. timeout: of every exchange.

    Returns:
        What the work returned.

    Raises:
        ConfigError: there is no meeting at that address and port.
        Dsv3Error: the work raised; it names rank and action. Where another rank failed, stopped or was killed, this
            process ends instead, and says which.
    """
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
        heart = Heartbeat(store, rank, world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
    except (dist.DistNetworkError, dist.DistStoreError, ValueError) as error:
        where = f"MASTER_ADDR={os.environ.get('MASTER_ADDR')}, MASTER_PORT={os.environ.get('MASTER_PORT')}"
        raise ConfigError(
            f"{where}: the ranks cannot meet there ({str(error).splitlines()[0]}); is the port in use, or are ranks "
            "missing? Give torchrun another --master-port"
        ) from error
    heart.start()
    member = Rank(rank, world, heart.tell)
    try:
        result = work(member)
        heart.tell("finished")
        dist.barrier()  # nobody leaves while another still wants something of it
    except Exception as error:
        raise heart.blame(error) from error
    heart.leave()
    dist.destroy_process_group()
    return result


def main(folder: Path, rank: int, world: int, port: int, parent: int) -> int:
    """The whole life of a started process."""
    status = Status(folder, rank, parent)
    try:
        torch.set_num_threads(1)
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=TIMEOUT)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=TIMEOUT)
        task = torch.load(folder / "task.pt", weights_only=False)
        module, _, name = task["work"].partition(":")
        work = getattr(importlib.import_module(module), name)
        result = work(Rank(rank, world, status.tell), *task["arguments"])
        status.tell("finished")
        torch.save(result, folder / f"result-{rank}.part")
        os.replace(folder / f"result-{rank}.part", folder / f"result-{rank}.pt")
        dist.barrier()  # nobody leaves while another still wants something of it
        dist.destroy_process_group()
        return 0
    except BaseException as error:
        with (folder / f"output-{rank}.txt").open("a") as output:  # its own output may be a terminal
            traceback.print_exc(file=output)
        status.fail(f"{type(error).__name__}: {error}")
        return 1


if __name__ == "__main__":
    sys.stderr.flush()
    code = main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
    sys.stderr.flush()
    os._exit(code)  # gloo's threads may wait for a rank that is gone
