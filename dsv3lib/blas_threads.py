"""NumPy's matrix products in one thread, while a token goes through.

A product of 256 x 256 takes 3 µs; to wake a second thread for half of it takes longer. NumPy's BLAS wakes one
all the same, and its threads then compete with torch's for the cores. It has no argument to say so, only a
number of threads for the whole process: set for a moment, and set back.
"""

from __future__ import annotations

import functools
import threading
from types import TracebackType

from threadpoolctl import ThreadpoolController


class OneBlasThread:
    """A context in which NumPy's products run in the calling thread alone; several threads may be in it at once."""

    def __init__(self) -> None:
        self._libraries = ThreadpoolController().select(user_api="blas").lib_controllers
        self._before: list[int] = []
        self._inside = 0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = [library.get_num_threads() for library in self._libraries]
                for library in self._libraries:
                    library.set_num_threads(1)
            self._inside += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:  # the last one out
                for library, threads in zip(self._libraries, self._before, strict=True):
                    library.set_num_threads(threads)


@functools.cache
def one_blas_thread() -> OneBlasThread:
    """The context of this process; the libraries are looked for at the first call, which takes some 10 ms."""
    return OneBlasThread()
