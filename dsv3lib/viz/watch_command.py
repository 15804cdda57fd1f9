"""``dsv3 watch RUN``: the expert load of a run, live in the browser, while the run goes on elsewhere.

The page is served by Voilà on the loopback address alone and wants its token, like JupyterLab. It only reads
the run's log, so it can be opened, closed and opened again at any time, before the run's end and after.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from ..errors import ConfigError

HIGHEST_PORT = 65535
_NOTEBOOK = "watch.ipynb"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("run_folder", metavar="RUN", help="folder of the run, as given to dsv3 train --out")
    parser.add_argument("--no-browser", action="store_true", help="print the address instead of opening it")
    parser.add_argument("--port", type=int, help="listen here (default: the first free one from 8866)")


def run(arguments: argparse.Namespace) -> int:
    """Become Voilà on the view's page, so that Ctrl-C reaches it and nothing stays behind.

    Returns:
        Voilà's exit status, on Windows alone, where a process cannot become another one.

    Raises:
        TrainingError: there is no such run, or no log in it. ConfigError: Voilà is missing, or the port is
        none.
    """
    from .load_history import LoadHistory
    from .watch import first_record

    path = Path(arguments.run_folder)
    LoadHistory.of_header(first_record(path))  # what cannot be shown is said here, not in the browser
    if find_spec("voila") is None or find_spec("anywidget") is None:
        raise ConfigError("voila, anywidget: not installed here; run make setup, or pip install -e '.[lab]'")
    if arguments.port is not None and not 1 <= arguments.port <= HIGHEST_PORT:
        raise ConfigError(f"--port: {arguments.port}, expected a number from 1 to {HIGHEST_PORT}")
    command = voila_command(not arguments.no_browser, arguments.port)
    environment = voila_environment(os.environ, path)
    if os.name == "nt":
        return subprocess.run(command, env=environment, check=False).returncode
    sys.stdout.flush()
    os.execve(command[0], command, environment)


def voila_command(browser: bool = True, port: int | None = None) -> list[str]:
    """The command that serves the view's page."""
    command = [
        sys.executable,
        "-m",
        "voila",
        str(files("dsv3lib.viz") / _NOTEBOOK),
        "--Voila.ip=127.0.0.1",
        "--Voila.auto_token=True",
        "--VoilaConfiguration.show_tracebacks=True",
    ]
    command += [] if browser else ["--no-browser"]
    return command if port is None else [*command, f"--port={port}", "--Voila.port_retries=0"]


def voila_environment(environment: Mapping[str, str], run_folder: Path) -> dict[str, str]:
    """The environment for Voilà and its kernels: where the run is; an empty token would switch it off."""
    from .watch import RUN_VARIABLE

    kept = {name: value for name, value in environment.items() if name != "JUPYTER_TOKEN" or value}
    return kept | {RUN_VARIABLE: str(run_folder.resolve()), "OMP_NUM_THREADS": "1"}
