"""Runs every check of the project, one phase after the other, and closes with one line for each.

    python tools/run_tests.py            # all phases
    python tools/run_tests.py unit -x    # one phase; what follows is handed to pytest

A phase that fails does not keep the later ones from running. The unit tests and the notebooks run two at a
time with one thread each, which suits two cores and keeps results independent of the machine's width.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q"]
PARALLEL = ["-n", "2", "--dist", "loadfile"]
NBVAL = ["--nbval", "--nbval-current-env", "--nbval-cell-timeout=300", "--nbval-sanitize-with"]


def phases() -> dict[str, list[str]]:
    """Returns the command of each phase by its name, in the order in which they run."""
    found = (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")
    notebooks = sorted(str(path.relative_to(ROOT)) for path in found)
    commands = {
        "lint": [sys.executable, "-m", "ruff", "check", "--no-cache", "."],
        "unit": [*PYTEST, *PARALLEL, "tests"],
        "kernels": [*PYTEST, *PARALLEL, "tests/on_triton"],
        "compile": [*PYTEST, "-n", "2", "--dist", "load", "tests/compile"],
    }
    if notebooks:
        commands["nbval"] = [*PYTEST, *PARALLEL, *NBVAL, "tests/notebooks/sanitize.cfg", *notebooks]
    if (ROOT / "tests" / "browser").is_dir():
        commands["browser"] = [*PYTEST, "tests/browser"]
    return commands


def environment(phase: str, scratch: Path) -> dict[str, str]:
    """Returns the environment of a phase; the notebooks get one that leaves the learner's own progress alone."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    if phase == "kernels" and not _has_gpu():
        variables["TRITON_INTERPRET"] = "1"  # read when triton is first imported, hence a phase of its own
    if phase == "nbval":
        from dsv3lib.course.notebooks import environment as of_notebooks

        variables |= of_notebooks(scratch) | {"OMP_NUM_THREADS": "1"}
    return variables


def _has_gpu() -> bool:
    """Returns whether torch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()


def run(command: Sequence[str], variables: dict[str, str]) -> tuple[int, str]:
    """Runs a command with its output shown as it comes; returns its exit status and its last line."""
    last = ""
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        for line in process.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            last = line.strip(" =\n") or last
    return process.returncode, last


def main(arguments: Sequence[str]) -> int:
    """Runs the named phase, or all of them; returns 0 when everything passed."""
    commands = phases()
    if arguments:
        name, *extra = arguments
        if name not in commands:
            print(f"run_tests: no phase {name!r}; there are: {', '.join(commands)}", file=sys.stderr)
            return 2
        commands = {name: [*commands[name], *extra]}
    summary, failed = [], False
    for name, command in commands.items():
        print(f"\n== {name}: {' '.join(['python', *command[1:]])}", flush=True)
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="dsv3-tests-") as scratch:
            status, last = run(command, environment(name, Path(scratch)))
        failed |= status != 0
        mark = "passed" if status == 0 else "FAILED"
        summary.append(f"{name:8} {mark}  {time.monotonic() - started:6.0f} s  {last}")
    print("\n== summary", *summary, sep="\n", flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
