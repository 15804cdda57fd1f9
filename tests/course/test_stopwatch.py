"""The stopwatch takes the best run, keeps no gradient and waits for a GPU."""

import pytest
import torch

from dsv3lib.course import stopwatch
from dsv3lib.errors import CourseError

CPU = torch.device("cpu")


def test_the_best_of_the_runs_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.0, 10.0, 12.0, 20.0, 23.0])
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: next(clock))
    assert stopwatch.milliseconds(lambda: None, CPU) == 2000


def test_each_run_is_in_inference_mode() -> None:
    seen = []
    stopwatch.milliseconds(lambda: seen.append(torch.is_inference_mode_enabled()), CPU, repeats=4)
    assert seen == [True] * 4


def test_a_gpu_is_waited_for_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("wait"))
    stopwatch.milliseconds(lambda: order.append("run"), torch.device("cuda"), repeats=2)
    assert order == ["wait", "run", "wait"] * 2


def test_no_run_is_no_time() -> None:
    with pytest.raises(CourseError, match="repeats is 0"):
        stopwatch.milliseconds(lambda: None, CPU, repeats=0)
