"""NumPy's BLAS in one thread for a moment, and as before afterwards."""

import sys
import threading

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController

from dsv3lib.blas_threads import OneBlasThread, one_blas_thread


@pytest.fixture
def threads():
    """How many threads each BLAS has now; set to 2 before the test."""
    libraries = ThreadpoolController().select(user_api="blas").lib_controllers
    before = [library.get_num_threads() for library in libraries]
    for library in libraries:
        library.set_num_threads(2)
    yield lambda: {library.get_num_threads() for library in libraries}
    for library, number in zip(libraries, before, strict=True):
        library.set_num_threads(number)


def test_one_inside_and_as_before_outside(threads) -> None:
    context = OneBlasThread()
    if threads() != {2}:
        assert sys.platform != "linux", "NumPy's wheels for Linux bring OpenBLAS, which has threads"
        pytest.skip("a BLAS without threads (Apple's, say) has nothing to switch")
    with context:
        assert threads() == {1}
        np.ones((300, 300)) @ np.ones(300)
        with context:
            assert threads() == {1}
        assert threads() == {1}, "the inner end must not undo the outer beginning"
    assert threads() == {2}


def test_an_error_inside_sets_back_too(threads) -> None:
    before = threads()
    with pytest.raises(ZeroDivisionError), OneBlasThread():
        raise ZeroDivisionError
    assert threads() == before


class Library:
    """A BLAS that only counts."""

    def __init__(self) -> None:
        self.number = 2

    def get_num_threads(self) -> int:
        return self.number

    def set_num_threads(self, number: int) -> None:
        self.number = number


def test_the_last_of_several_threads_sets_back(monkeypatch) -> None:
    context, library = OneBlasThread(), Library()
    monkeypatch.setattr(context, "_libraries", [library])
    entered, may_leave = threading.Event(), threading.Event()

    def stay() -> None:
        with context:
            entered.set()
            may_leave.wait(timeout=10)

    worker = threading.Thread(target=stay)
    with context:
        worker.start()
        assert entered.wait(timeout=10)
    assert library.number == 1, "the first one out must not wake threads under the other's work"
    may_leave.set()
    worker.join(timeout=10)
    assert library.number == 2


def test_a_process_has_one() -> None:
    assert one_blas_thread() is one_blas_thread()
