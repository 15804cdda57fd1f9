"""The wait policy of OpenMP's threads, however Python and its kernels are started; what a user has set stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbclient import NotebookClient

from dsv3lib import doctor, openmp

ROOT = Path(__file__).resolve().parent.parent
REPORT = """
import json, os
from dsv3lib import openmp
print(json.dumps([openmp.IN_FORCE, os.environ.get("OMP_WAIT_POLICY")]))
"""
SETUP = """
import torch
torch.set_num_threads(2)
from dsv3lib.course import setup
setup(seed=1, device="cpu")
import threading
print("HOLDERS", sum(t.name.startswith("dsv3lib: OpenMP") for t in threading.enumerate()))
"""
linux = pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP comes with torch on Linux alone")


def environment(**given: str) -> dict[str, str]:
    """The environment of a learner who has chosen nothing, and what is given."""
    ours = {*openmp.VARIABLES, "OMP_NUM_THREADS", "MKL_NUM_THREADS"}
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", **given}


def output(code: str, *command: str, **given: str) -> str:
    """What a new Python prints."""
    command = command or (sys.executable, "-c", code)
    done = subprocess.run(
        command, env=environment(**given), capture_output=True, text=True, check=True, timeout=300, cwd="/"
    )
    return done.stdout


# Reads how long libgomp's threads spin: by the processor time of a thread that waits. One thread of a team of two
# sleeps for 20 ms in the parallel part, the other waits for it.
SPINNING = """
import ctypes, os, time
library = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD)
library.omp_set_num_threads(2)
def wait_for_the_other():
    BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    body = BODY(lambda _: time.sleep(0.02) if library.omp_get_thread_num() else None)
    began = time.process_time()
    library.GOMP_parallel(body, None, 2, 0)
    return time.process_time() - began
print("SPUN", min(wait_for_the_other() for _ in range(10)))
"""


@given(st.dictionaries(st.sampled_from((*openmp.VARIABLES, "PATH")), st.sampled_from(["active", "7"])), st.booleans())
def test_only_where_nobody_has_chosen(environ: dict[str, str], loaded: bool) -> None:
    before = dict(environ)
    held = openmp.begin(environ, loaded)
    assert environ.items() >= before.items(), "nothing that was set is changed"
    if before.keys() & set(openmp.VARIABLES):
        assert environ == before and held != openmp.LATE
    else:
        assert environ == before | {"OMP_WAIT_POLICY": "passive"}  # for children, in any case
        assert held == (openmp.LATE if loaded else "OMP_WAIT_POLICY=passive")


@pytest.mark.parametrize(
    ("first", "given_", "expected"),
    [
        ("", {}, ["OMP_WAIT_POLICY=passive", "passive"]),
        ("import torch\n", {}, ["late", "passive"]),
        ("", {"OMP_WAIT_POLICY": "active"}, ["OMP_WAIT_POLICY=active", "active"]),
        ("import torch\n", {"GOMP_SPINCOUNT": "5"}, ["GOMP_SPINCOUNT=5", None]),
    ],
)
def test_plain_python(first: str, given_: dict[str, str], expected: list) -> None:
    assert json.loads(output(first + REPORT, **given_)) == expected


def test_the_dsv3_command_sets_it_for_itself_and_its_kernels() -> None:
    found = json.loads(output("", sys.executable, "-m", "dsv3lib.cli", "doctor", "--json"))
    line = next(part for part in found if part["name"] == "threads")
    assert (line["status"], line["value"]) == ("ok", "OMP_WAIT_POLICY=passive")
    code = (
        "import os, dsv3lib; from dsv3lib.course.lab import lab_environment; "
        "print(lab_environment(os.environ)['OMP_WAIT_POLICY'])"
    )
    assert output(code) == "passive\n"


def spun(code: str, **given: str) -> float:
    """Seconds of processor time that a thread spun while another let it wait 20 ms."""
    return float(output(code + SPINNING, **given).split("SPUN")[1])


@linux
def test_threads_do_not_spin_whatever_was_loaded_first() -> None:
    spins = spun("import torch\n")
    in_time = spun("import dsv3lib, torch\n")
    late = spun("import torch\nfrom dsv3lib import openmp\nopenmp.settle(2)\n")
    assert spins > 4 * max(in_time, late), (spins, in_time, late)
    chosen = spun("import dsv3lib, torch\n", GOMP_SPINCOUNT="300000")
    assert chosen > 4 * max(in_time, late), "a user's own choice stands"


@linux
def test_setup_acts_once_where_torch_was_first_and_says_so() -> None:
    text = output(SETUP + 'setup(seed=1, device="cpu")\nprint("THREADS", threading.active_count())')
    assert text.count("their spinning was cut short from here on") == 2
    assert "HOLDERS 1" in text and "THREADS 2" in text
    text = output(SETUP, OMP_WAIT_POLICY="active")
    assert "OMP_WAIT_POLICY=active" in text and "HOLDERS 0" in text, "chosen by the user: nothing is done about it"
    assert "One thread" in openmp.settle(1, openmp.LATE)


def test_where_nothing_can_be_done_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmp, "LIBRARY", "libgomp-of-nobody.so")
    assert openmp.cut_spinning() is False
    assert "import dsv3lib before torch" in openmp.settle(2, openmp.LATE)
    monkeypatch.delattr(os, "RTLD_NOLOAD", raising=False)
    assert openmp.cut_spinning() is False


@linux
@pytest.mark.parametrize("road", ["nbclient", "papermill"])
def test_a_kernel_that_nothing_of_ours_has_started(road: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As JupyterLab started by hand, VS Code or a hub start it: torch comes first, as in most lessons."""
    for name in (*openmp.VARIABLES, "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SETUP)])
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = tmp_path / "book.ipynb"
    nbformat.write(book, path)
    if road == "nbclient":
        made = NotebookClient(book, timeout=300).execute()
    else:
        made = papermill.execute_notebook(str(path), str(path), progress_bar=False)
    shown = json.dumps(made.cells[-1].outputs)
    assert "their spinning was cut short" in shown and "HOLDERS 1" in shown


@pytest.mark.parametrize(
    ("in_force", "status"),
    [
        ("OMP_WAIT_POLICY=passive", "ok"),
        ("OMP_WAIT_POLICY=active, GOMP_SPINCOUNT=1000", "ok"),
        ("KMP_BLOCKTIME=0", "ok"),
        ("OMP_WAIT_POLICY=ACTIVE", "limited"),
        ("GOMP_SPINCOUNT=infinite", "limited"),
        ("OMP_WAIT_POLICY=passive, GOMP_SPINCOUNT=300000", "limited"),
        (openmp.LATE, "limited"),
    ],
)
def test_doctor_says_how_threads_wait(in_force: str, status: str) -> None:
    finding = doctor.check_threads(in_force)
    assert finding.status == status and "OMP_WAIT_POLICY=passive" in finding.without
