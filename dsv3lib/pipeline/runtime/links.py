"""How ranks reach one another: gloo between processes, or queues between threads of one process.

Both deliver the same tensors, and gather in the order of the ranks, so that whatever is added up has the same bits.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from ...errors import TrainingError


@runtime_checkable
class Links(Protocol):
    """What the engine asks of a network.

    Attributes:
        rank: of this process in the world. world: how many there are.
        sent_bytes: of activations and gradients sent to another rank so far; those of experts included.
    """

    rank: int
    world: int
    sent_bytes: int

    def send(self, tensor: Tensor, to: int, tag: int) -> None:
        """Send and go on; sends of one tag arrive in order."""

    def receive(self, like: Tensor, source: int, tag: int) -> Tensor:
        """The next tensor of that tag, of the shape and dtype of ``like``."""

    def flush(self) -> None:
        """Wait until all that was sent has arrived."""

    def all_to_all(self, tensor: Tensor, send: list[int], receive: list[int], ranks: tuple[int, ...]) -> Tensor:
        """So many rows of the tensor to each of these ranks, in order, and so many from each; zero is allowed."""

    def gather(self, tensor: Tensor, ranks: tuple[int, ...]) -> list[Tensor]:
        """What each of these ranks gives, in their order; all of them call it."""

    def gather_objects(self, value: Any) -> list[Any]:
        """What each rank of the world gives, in order."""

    def process_group(self, ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
        """torch's own group of these ranks, for what torch does between them; threads have none."""


def _bytes_to_others(tensor: Tensor, send: list[int], ranks: tuple[int, ...], rank: int) -> int:
    rows = sum(n for other, n in zip(ranks, send, strict=True) if other != rank)
    return rows * tensor[:1].nbytes if rows else 0


class GlooLinks:
    """torch.distributed's default process group, which must be there.

    Args:
        groups: all sets of ranks that will gather, in one order everywhere.
    """

    def __init__(self, groups: Sequence[tuple[int, ...]] = ()) -> None:
        self.rank, self.world, self.sent_bytes = dist.get_rank(), dist.get_world_size(), 0
        self._groups = {ranks: dist.new_group(list(ranks)) for ranks in groups}
        self._under_way: list[tuple[dist.Work, Tensor]] = []

    def send(self, tensor: Tensor, to: int, tag: int) -> None:
        tensor = tensor.contiguous()
        self._under_way = [one for one in self._under_way if not one[0].is_completed()]
        self._under_way.append((dist.isend(tensor, to, tag=tag), tensor))
        self.sent_bytes += tensor.nbytes

    def receive(self, like: Tensor, source: int, tag: int) -> Tensor:
        tensor = torch.empty_like(like)
        dist.recv(tensor, source, tag=tag)
        return tensor

    def flush(self) -> None:
        for work, _ in self._under_way:
            work.wait()
        self._under_way.clear()

    def all_to_all(self, tensor: Tensor, send: list[int], receive: list[int], ranks: tuple[int, ...]) -> Tensor:
        if len(ranks) == 1:
            return tensor
        arrived = tensor.new_empty(sum(receive), *tensor.shape[1:])
        group, tensor = self._groups[ranks], tensor.contiguous()
        dist.all_to_all_single(arrived, tensor, receive, send, group=group, async_op=True).wait()
        self.sent_bytes += _bytes_to_others(tensor, send, ranks, self.rank)
        return arrived

    def gather(self, tensor: Tensor, ranks: tuple[int, ...]) -> list[Tensor]:
        every = [torch.empty_like(tensor) for _ in ranks]
        dist.all_gather(every, tensor, group=self._groups[ranks])
        return every

    def gather_objects(self, value: Any) -> list[Any]:
        every: list[Any] = [None] * self.world
        dist.all_gather_object(every, value)
        return every

    def process_group(self, ranks: tuple[int, ...]) -> dist.ProcessGroup:
        return self._groups[ranks]


class Board:
    """Where the threads of one process leave what they have for one another.

    Args:
        world: how many threads. timeout: seconds after which a thread waits in vain.
    """

    def __init__(self, world: int, timeout: float | int = 60) -> None:
        self.world, self.timeout = world, timeout
        self._queues: dict[tuple, queue.Queue] = {}
        self._lock = threading.Lock()

    def queue_of(self, key: tuple) -> queue.Queue:
        """The one queue of this sender, receiver and tag, made when either of them first asks for it."""
        with self._lock:  # two threads at once would make one each, and wait for what lies in the other's
            if key not in self._queues:
                self._queues[key] = queue.Queue()
            return self._queues[key]


class ThreadLinks:
    """The same between threads: the reference in one process.

    Args:
        board: shared by all. rank: of this thread.
    """

    def __init__(self, board: Board, rank: int) -> None:
        self.board, self.rank, self.world, self.sent_bytes = board, rank, board.world, 0

    def send(self, tensor: Tensor, to: int, tag: int) -> None:
        self.board.queue_of((self.rank, to, tag)).put(tensor.clone())
        self.sent_bytes += tensor.nbytes

    def receive(self, like: Tensor, source: int, tag: int) -> Tensor:
        return self._take((source, self.rank, tag))

    def flush(self) -> None:
        pass

    def all_to_all(self, tensor: Tensor, send: list[int], receive: list[int], ranks: tuple[int, ...]) -> Tensor:
        for other, rows in zip(ranks, tensor.split(send), strict=True):
            self.board.queue_of((self.rank, other, "rows", ranks)).put(rows.clone())
        self.sent_bytes += _bytes_to_others(tensor, send, ranks, self.rank)
        arrived = [self._take((other, self.rank, "rows", ranks)) for other in ranks]
        if [len(rows) for rows in arrived] != receive:
            raise TrainingError(f"rank {self.rank}: {list(map(len, arrived))} rows came, expected {receive}")
        return torch.cat(arrived)

    def gather(self, tensor: Tensor, ranks: tuple[int, ...]) -> list[Tensor]:
        return self._exchange(tensor, ranks, "tensors")

    def gather_objects(self, value: Any) -> list[Any]:
        return self._exchange(value, tuple(range(self.world)), "objects")

    def process_group(self, ranks: tuple[int, ...]) -> None:
        return None

    def _exchange(self, value: Any, ranks: tuple[int, ...], what: str) -> list[Any]:
        for other in ranks:
            self.board.queue_of((self.rank, other, what, ranks)).put(value)
        return [self._take((other, self.rank, what, ranks)) for other in ranks]

    def _take(self, key: tuple) -> Any:
        try:
            return self.board.queue_of(key).get(timeout=self.board.timeout)
        except queue.Empty:
            raise TrainingError(f"rank {self.rank}: nothing came from rank {key[0]} ({key[2]})") from None


def in_threads(world: int, work: Any) -> list[Any]:
    """Run ``work(links)`` for each rank in a thread of this process.

    Args:
        world: how many. work: called with each rank's links.

    Returns:
        What each returned.
    """
    board, results = Board(world), [None] * world
    failed: list[BaseException] = []
    n_threads = torch.get_num_threads()

    def one(rank: int) -> None:
        # As in the processes: a product that is cut in two sums in another order. A new thread first takes the others'.
        torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            results[rank] = work(ThreadLinks(board, rank))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(n_threads)
    if failed:
        raise failed[0]
    return results
