"""``dsv3 doctor``: what this machine has, line by line, and what works without the rest.

Each check is one small function that returns a :class:`Finding`. None of them may fail: a check-up that
falls over on a sick machine is of no use, so torch itself is only imported inside its check.
"""

import argparse
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import psutil
from rich import box
from rich.table import Table
from rich.text import Text

from . import openmp
from .terminal import plain_console

Status = Literal["ok", "limited", "missing"]

GIB = 1 << 30
OLDEST_PYTHON = (3, 11)
MEMORY_TO_TRAIN_GIB = 4  # the tiny preset, its optimiser and JupyterLab at once, with room to spare
DISK_FOR_RUNS_GIB = 2  # a few runs of the tiny preset with their checkpoints
FP8_CAPABILITY = (8, 9)  # the first NVIDIA generation whose tensor cores take FP8
BROWSER_VARIABLE = "DSV3_BROWSER"
BROWSER_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER_APPLICATIONS = (
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
STYLES = {"ok": "green", "limited": "yellow", "missing": "red"}


@dataclass(frozen=True)
class Finding:
    """One line of the check-up.

    Attributes:
        name: the part that was looked at.
        status: ``ok``, ``limited`` (there, but not enough for everything) or ``missing``.
        value: what was found.
        without: what works where this part is missing or limited.
        essential: whether nothing works without it.
    """

    name: str
    status: Status
    value: str
    without: str
    essential: bool = False


def check_python(found: tuple[int, int] | None = None) -> Finding:
    """Looks at the interpreter's version; ``found`` stands in for the running one's."""
    found = found or sys.version_info[:2]
    enough = found >= OLDEST_PYTHON
    running = f"{platform.python_implementation()} {platform.python_version()}"
    return Finding(
        "Python",
        "ok" if enough else "missing",
        running if enough else f"{found[0]}.{found[1]} is older than {OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]}",
        "nothing: dsv3lib needs Python 3.11 or newer",
        essential=True,
    )


def check_torch() -> Finding:
    """Imports torch and reads its version, its threads and the processor's vector instructions."""
    without = "nothing but this check-up: run make setup"
    try:
        import torch

        from . import gemm

        library = "oneDNN" if gemm.by_onednn() else "torch's BLAS"
        value = (
            f"{torch.__version__}, {torch.get_num_threads()} threads, "
            f"{torch.backends.cpu.get_cpu_capability()} on {platform.machine()}, "
            f"large FP32 products by {library}"
        )
    except Exception as error:  # a broken installation raises OSError, RuntimeError and others
        return Finding("torch", "missing", _in_words(error), without, essential=True)
    return Finding("torch", "ok", value, without, essential=True)


def check_threads(in_force: str = openmp.IN_FORCE) -> Finding:
    """Says how OpenMP's threads wait for one another: those that spin are slow beside busy programs."""
    name, value = openmp.POLICY
    without = f"everything, slowly while other programs keep the processor busy; {name}={value} mends it"
    found = "they spin: torch was loaded before dsv3lib" if in_force == openmp.LATE else in_force
    return Finding("threads", "limited" if openmp.spins(in_force) else "ok", found, without)


def check_triton(system: str = sys.platform) -> Finding:
    """Looks for Triton, which exists for Linux alone."""
    without = "everything: each operation has its PyTorch form"
    try:
        return Finding("triton", "ok", version("triton"), without)
    except PackageNotFoundError:
        value = "not installed" if system == "linux" else f"does not exist for {system}"
        return Finding("triton", "missing", value, without)


def check_gpu() -> Finding:
    """Looks for a CUDA device: its name, memory and architecture."""
    without = "everything, on the CPU with small models"
    try:
        import torch

        if not torch.cuda.is_available():
            return Finding("GPU", "missing", "no CUDA device", without)
        properties = torch.cuda.get_device_properties(0)
        capability = (properties.major, properties.minor)
    except Exception as error:  # a driver that does not fit raises from deep inside
        return Finding("GPU", "missing", _in_words(error), without)
    value = f"{properties.name}, {properties.total_memory / GIB:.0f} GiB, sm_{capability[0]}{capability[1]}"
    if capability < FP8_CAPABILITY:
        return Finding("GPU", "limited", value, "everything; FP8 on the tensor cores needs sm_89 or newer")
    return Finding("GPU", "ok", value, without)


def check_backend() -> Finding:
    """Asks a small model which code computes it here: the short form of ``model.explain()``."""
    without = "everything: layers/ is plain PyTorch"
    try:
        import torch

        from .config import ModelConfig
        from .model import DeepSeekV3

        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = DeepSeekV3(ModelConfig.preset("nano")).to(device)
        explanation = model.explain()
    except Exception as error:  # whatever is wrong with torch has its own line
        return Finding("backend", "missing", _in_words(error), without)
    plain = explanation.machine.backend.name == "plain"
    return Finding("backend", "limited" if plain else "ok", explanation.short(), without)


def check_memory(available: int | None = None) -> Finding:
    """Compares the free memory in bytes with what a training of the tiny preset needs."""
    memory = psutil.virtual_memory()
    available = memory.available if available is None else available
    enough = available >= MEMORY_TO_TRAIN_GIB * GIB
    return Finding(
        "memory",
        "ok" if enough else "limited",
        f"{available / GIB:.1f} GiB free of {memory.total / GIB:.1f}",
        f"the notebooks; to train tiny, close other programs until {MEMORY_TO_TRAIN_GIB} GiB are free",
    )


def check_disk(folder: Path, free: int | None = None) -> Finding:
    """Compares the free space in bytes where runs are written with what a few of them need."""
    try:
        free = shutil.disk_usage(folder).free if free is None else free
    except OSError as error:
        return Finding("free disk", "missing", _in_words(error), "everything that writes no file")
    return Finding(
        "free disk",
        "ok" if free >= DISK_FOR_RUNS_GIB * GIB else "limited",
        f"{free / GIB:.1f} GiB in {folder}",
        f"everything but long runs: their checkpoints want {DISK_FOR_RUNS_GIB} GiB",
    )


def check_jupyterlab() -> Finding:
    """Looks for JupyterLab and the widgets in the environment that runs this."""
    without = "the library and the dsv3 commands; the notebooks can be read without a kernel"
    found = {name: _version_of(name) for name in ("jupyterlab", "ipywidgets", "ipykernel")}
    lacking = [name for name, number in found.items() if number is None]
    if lacking:
        return Finding("JupyterLab", "missing", f"not installed: {', '.join(lacking)}", without)
    return Finding("JupyterLab", "ok", f"{found['jupyterlab']}, ipywidgets {found['ipywidgets']}", without)


def check_browser() -> Finding:
    """Looks for a Chromium, which the browser tests drive; a reader may use any browser."""
    path = find_browser()
    without = "the course in any other browser; only the browser tests of make test need Chromium"
    return Finding("browser", "ok" if path else "missing", path or "no Chromium or Chrome found", without)


def find_browser() -> str | None:
    """Returns the path of a Chromium or Chrome: ``DSV3_BROWSER`` first, then PATH, then macOS's folder."""
    chosen = os.environ.get(BROWSER_VARIABLE)
    names = (chosen,) if chosen else BROWSER_NAMES + BROWSER_APPLICATIONS
    return next((path for path in map(shutil.which, names) if path), None)


def examine(folder: Path | None = None) -> list[Finding]:
    """Runs every check.

    Args:
        folder: where runs would be written; the current folder by default.

    Returns:
        One finding for each part, essential ones first.
    """
    folder = folder or Path.cwd()
    checks: Iterable[Callable[[], Finding]] = (
        check_python,
        check_torch,
        check_threads,
        check_triton,
        check_gpu,
        check_backend,
        check_memory,
        lambda: check_disk(folder),
        check_jupyterlab,
        check_browser,
    )
    return [check() for check in checks]


def report(findings: Iterable[Finding]) -> Table:
    """Lays findings out as a table; what works without a part is said for every part, met or not."""
    table = Table(title="dsv3 doctor", title_justify="left", box=box.SIMPLE, pad_edge=False)
    for heading in ("", "status", "found", "without it"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        status = Text(finding.status, style=STYLES[finding.status])
        table.add_row(Text(finding.name), status, Text(finding.value), Text(finding.without, style="dim"))
    return table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``dsv3 doctor``."""
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Prints the check-up; returns 1 if something essential is missing, else 0."""
    findings = examine()
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        plain_console(soft_wrap=False).print(report(findings))
    return exit_status(findings)


def exit_status(findings: Iterable[Finding]) -> int:
    """Returns 1 if an essential part is missing, else 0."""
    return int(any(finding.essential and finding.status == "missing" for finding in findings))


def _version_of(package: str) -> str | None:
    """An installed package's version, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _in_words(error: Exception) -> str:
    """An error as one short line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
