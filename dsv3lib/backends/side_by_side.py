"""Independent pieces of work on a CPU's cores at the same time, each core at a piece of its own.

torch gives a part of every operation to every thread, and wakes and awaits them each time. Where operations are many
and small, as with experts and heads, that brings next to nothing; here threads are woken once for all pieces, and torch
works in a single thread inside of each.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache

import torch

WORTH_WAKING = 2**24  # multiplications of all pieces together; threads that sleep are woken in some 50 to 100 us


def side_by_side(pieces: Iterable[Callable[[], None]], multiplications: int) -> None:
    """Do all pieces, in any order, in as many threads as ``torch.get_num_threads()`` allows.

    No gradient is recorded. Where somebody watches torch's operations, which is asked for by thread (a profiler, a
    dispatch mode), the pieces come one after the other in the calling thread.

    Args:
        pieces: none reads what another writes. multiplications: of all of them, about; few wake nobody.

    Raises:
        BaseException: the first that a piece raised; pieces that had not begun are left out.
    """
    waiting, threads = deque(pieces), torch.get_num_threads()
    helpers = min(threads, len(waiting)) - 1
    if helpers < 1 or multiplications < WORTH_WAKING or _watched():
        with torch.no_grad():
            for piece in waiting:
                piece()
        return
    inference = torch.is_inference_mode_enabled()

    def work() -> None:
        with torch.inference_mode(inference), torch.no_grad():
            while (piece := _next(waiting)) is not None:
                try:
                    piece()
                except BaseException:
                    waiting.clear()
                    raise

    others = [_pool(os.getpid(), threads).submit(work) for _ in range(helpers)]
    try:
        torch.set_num_threads(1)  # of this thread
        work()
    finally:
        wait(others)
        torch.set_num_threads(threads)
    for other in others:
        other.result()


def _next(waiting: deque[Callable[[], None]]) -> Callable[[], None] | None:
    try:
        return waiting.popleft()
    except IndexError:  # another thread was quicker, or all are done
        return None


@lru_cache(maxsize=1)
def _pool(_process: int, threads: int) -> ThreadPoolExecutor:
    """The helpers, which sleep between two calls; a forked process has none of its parent's."""
    return ThreadPoolExecutor(threads, "dsv3lib-cpu", initializer=_in_one_thread)


def _in_one_thread() -> None:
    torch.get_num_threads()  # a new thread takes over the number of all, once; only then has it one of its own
    torch.set_num_threads(1)


def _watched() -> bool:
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch.autograd._profiler_enabled()
    )
