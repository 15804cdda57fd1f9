"""The run's log: whole lines whatever happens, and readers that are never led astray by half of one."""

import json
import os
import resource
import threading
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3lib.errors import SaveError, TrainingError
from dsv3lib.training.run.log import FILE_NAME, RunLog, cut_log, follow, read_log, write_whole

HEADER = {"kind": "header", "domains": ["code"]}


def step(number, loss=1.0):
    return {"kind": "step", "step": number, "losses": {"main": loss}}


def written(path, *records):
    log = RunLog(path)
    for record in records:
        log.write(record)
    log.close()
    return path


def test_reads_what_was_written_sorted_by_kind(tmp_path):
    plan, validation = {"kind": "plan", "step": 0, "total_steps": 2}, {"kind": "validation", "step": 2}
    end = {"kind": "end", "step": 2, "reason": "finished"}
    written(tmp_path / FILE_NAME, HEADER, plan, step(1, 2.5), step(2, 1.5), validation, end)
    history = read_log(tmp_path)
    assert (history.header, history.plan, history.end) == (HEADER, plan, end)
    assert history.column("losses", "main") == [2.5, 1.5] and history.validations == [validation]
    with pytest.raises(TrainingError, match=r"no 'losses.mtp_1'"):
        history.column("losses", "mtp_1")


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=5))
def test_floats_come_back_bit_for_bit(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("log") / FILE_NAME
    written(path, HEADER, *(step(i + 1, value) for i, value in enumerate(values)))
    assert [x.hex() for x in read_log(path).column("losses", "main")] == [x.hex() for x in values]


def test_a_log_cut_at_any_byte_gives_the_whole_lines_before(tmp_path):
    path = written(tmp_path / FILE_NAME, HEADER, step(1), step(2))
    content = path.read_bytes()
    header_ends = content.index(b"\n") + 1
    for cut in range(header_ends, len(content) + 1):
        path.write_bytes(content[:cut])
        assert len(read_log(path).steps) == content[header_ends:cut].count(b"\n")


def test_refuses_what_is_no_log(tmp_path):
    with pytest.raises(TrainingError, match="no log to read"):
        read_log(tmp_path)
    path = written(tmp_path / FILE_NAME, step(1))
    with pytest.raises(TrainingError, match="expected a header"):
        read_log(path)
    path.write_text(json.dumps(HEADER) + "\n{half\n" + json.dumps(step(1)) + "\n")
    with pytest.raises(TrainingError, match="line 2 is not JSON"):
        read_log(path)


def test_no_number_that_json_does_not_know(tmp_path):
    log = RunLog(tmp_path / FILE_NAME)
    with pytest.raises(ValueError):
        log.write(step(1, float("nan")))
    log.close()
    assert (tmp_path / FILE_NAME).read_bytes() == b""


def test_an_earlier_end_is_not_the_end_of_a_run_that_went_on(tmp_path):
    path = written(tmp_path / FILE_NAME, HEADER, step(1), {"kind": "end", "step": 1}, step(2))
    assert read_log(path).end is None


def test_cutting_leaves_the_checkpoints_steps_and_drops_every_end(tmp_path):
    validation = {"kind": "validation", "step": 2}
    end = {"kind": "end", "step": 3}
    path = written(tmp_path / FILE_NAME, HEADER, step(1), step(2), validation, step(3), end)
    cut_log(path, 2)
    history = read_log(path)
    assert [r["step"] for r in history.steps] == [1, 2]
    assert history.validations == [validation] and history.end is None
    cut_log(path, 2)  # once more changes nothing
    assert read_log(path) == history
    with pytest.raises(TrainingError, match="holds 2 steps, expected the 5"):
        cut_log(path, 5)
    assert read_log(path) == history


def test_cutting_drops_a_half_written_line(tmp_path):
    path = written(tmp_path / FILE_NAME, HEADER, step(1))
    with open(path, "a") as file:
        file.write('{"kind":"step","st')
    cut_log(path, 1)
    written(path, step(2))
    assert [r["step"] for r in read_log(path).steps] == [1, 2]


def test_following_a_log_that_grows(tmp_path):
    path = written(tmp_path / FILE_NAME, HEADER)
    end = {"kind": "end", "step": 2}

    def grow():
        written(path, step(1), step(2), end)

    writer = threading.Timer(0.1, grow)
    writer.start()
    assert list(follow(tmp_path, poll_seconds=0.02, timeout_seconds=10)) == [HEADER, step(1), step(2), end]
    writer.join()


def test_following_a_run_that_is_resumed_begins_again_from_the_header(tmp_path):
    path = written(tmp_path / FILE_NAME, HEADER, step(1), step(2))
    records = follow(path, poll_seconds=0.01, timeout_seconds=5)
    assert [next(records) for _ in range(3)] == [HEADER, step(1), step(2)]
    cut_log(path, 1)
    written(path, step(2, 7.0), {"kind": "end", "step": 2})
    assert list(records) == [HEADER, step(1), step(2, 7.0), {"kind": "end", "step": 2}]


@pytest.mark.parametrize("moment", ["between two looks", "as it is read"])
def test_following_a_log_that_is_removed_says_so(tmp_path, monkeypatch, moment):
    path = written(tmp_path / FILE_NAME, HEADER)
    records = follow(path, poll_seconds=0.01, timeout_seconds=5)
    assert next(records) == HEADER
    if moment == "between two looks":
        path.unlink()
    else:
        status = os.fstat
        monkeypatch.setattr(os, "fstat", lambda of: path.unlink(missing_ok=True) or status(of))
    with pytest.raises(TrainingError, match="there is no log to read"):
        next(records)


def test_following_gives_up_after_the_time_allowed(tmp_path):
    path = written(tmp_path / FILE_NAME, HEADER)
    assert list(follow(path, poll_seconds=0.01, timeout_seconds=0.05)) == [HEADER]


@contextmanager
def files_may_grow_to(size):
    """Lets no file of this process grow beyond some bytes: a real write that fails, as on a full disk.

    The limit ends inside the test: pytest writes its own report, perhaps to a file, before fixtures end.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_whole_lines(tmp_path):
    log = RunLog(tmp_path / FILE_NAME)
    log.write(HEADER)
    log.write(step(1))
    room = (tmp_path / FILE_NAME).stat().st_size + 10  # for a part of the next line
    with files_may_grow_to(room), pytest.raises(SaveError, match="no more can be logged"):
        log.write(step(2))
    log.close()
    assert (tmp_path / FILE_NAME).read_bytes().endswith(b"\n")
    assert [r["step"] for r in read_log(tmp_path).steps] == [1]


def test_a_full_disk_leaves_the_old_file_when_it_is_replaced(tmp_path):
    path = tmp_path / "run.json"
    write_whole(path, "old\n")
    with files_may_grow_to(100), pytest.raises(SaveError, match="is intact"):
        write_whole(path, "new" * 1000)
    assert path.read_text() == "old\n" and list(tmp_path.iterdir()) == [path]
