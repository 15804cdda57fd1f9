"""A JupyterLab server for the browser tests: its own port, token and folders, and a certain end."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dsv3lib.course.lab import prepare_settings
from dsv3lib.course.record import FILE, HIDDEN, VARIABLE
from dsv3lib.course.workspace import Workspace

LIGHT, DARK = "JupyterLab Light", "JupyterLab Dark"
START_SECONDS = 180
STOP_SECONDS = 30

_ANNOUNCEMENTS = "@jupyterlab/apputils-extension:announcements"


@dataclass(frozen=True)
class LabServer:
    """A running server: where it listens, the folder it serves, and the learner's progress file."""

    url: str
    token: str
    root: Path
    progress: Path
    pid: int

    def address(self, notebook: str) -> str:
        """Return the address that opens one notebook alone, with a fresh layout."""
        return f"{self.url}/doc/tree/{notebook}?reset&token={self.token}"


@contextmanager
def serve(root: Path, home: Path, *, theme: str = LIGHT, locale: str = "") -> Iterator[LabServer]:
    """Run JupyterLab on ``root`` while the block lasts; nothing outside ``home`` is read or written by it.

    Args:
        root: the folder that is served.
        home: an empty folder for configuration, data, runtime files, workspaces, settings and progress.
        theme: JupyterLab's theme.
        locale: JupyterLab's language, as in ``"de_DE"``; the system's own when empty.
    """
    names = ("config", "data", "runtime", "workspaces", "settings", "ipython")
    folders = {name: home / name for name in names}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    quiet = {"disabledExtensions": {_ANNOUNCEMENTS: True}}
    _write(folders["config"] / "labconfig" / "page_config.json", quiet)
    extensions = folders["settings"] / "@jupyterlab"
    _write(extensions / "apputils-extension" / "themes.jupyterlab-settings", {"theme": theme})
    # Every cell stays in the page, so that a test can read outputs that are scrolled away.
    _write(extensions / "notebook-extension" / "tracker.jupyterlab-settings", {"windowingMode": "none"})
    if locale:
        _write(extensions / "translation-extension" / "plugin.jupyterlab-settings", {"locale": locale})
    token, port = secrets.token_hex(16), _free_port()
    progress = Workspace(root).progress if (root / HIDDEN).is_dir() else home / FILE
    environment = {
        **os.environ,
        "JUPYTER_CONFIG_DIR": str(folders["config"]),
        "JUPYTER_DATA_DIR": str(folders["data"]),
        "JUPYTER_RUNTIME_DIR": str(folders["runtime"]),
        "JUPYTERLAB_WORKSPACES_DIR": str(folders["workspaces"]),
        "JUPYTERLAB_SETTINGS_DIR": str(folders["settings"]),
        "IPYTHONDIR": str(folders["ipython"]),
        "JUPYTER_TOKEN": token,
        VARIABLE: str(progress),
    }
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        f"--ServerApp.root_dir={root}",
        "--LabApp.expose_app_in_browser=True",
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--ServerApp.jpserver_extensions={'jupyterlab_jupytext': False}",  # a text must not follow a test
    ]
    if (root / HIDDEN).is_dir():
        command.append(prepare_settings(Workspace(root)))
    log = home / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        server = LabServer(f"http://127.0.0.1:{port}", token, root, progress, process.pid)
        try:
            _wait(server, process, log)
            yield server
        finally:
            _stop(process)


def _wait(server: LabServer, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    request = urllib.request.Request(
        f"{server.url}/api/status", headers={"Authorization": f"token {server.token}"}
    )
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"JupyterLab ended with {process.returncode}:\n{log.read_text()[-3000:]}")
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not answer in {START_SECONDS} s:\n{log.read_text()[-3000:]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server; asked politely, it shuts its kernels down. What then still stands is killed."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
