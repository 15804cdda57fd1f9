"""``dsv3 lab``: JupyterLab on the learner's own copy of the course, in their language if it is asked for.

The server listens on the loopback address alone and keeps Jupyter's token.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import dsv3lib
from dsv3lib.course import overview, record, workspace
from dsv3lib.course.workspace import Workspace
from dsv3lib.errors import CourseError
from dsv3lib.files import write_whole

FIRST = "00_start_here.ipynb"
NOTEBOOKS = "notebooks"
INSTALLED = Path(sys.prefix) / "share" / "dsv3lib" / NOTEBOOKS  # where a wheel puts the notebooks
OVERRIDES = {
    "@jupyterlab/docmanager-extension:plugin": {"defaultViewers": {"markdown": "Markdown Preview"}},
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
}
"""JupyterLab's defaults in the course: the overview is shown as a page, and nothing pops up. A learner's own win."""
LANGUAGE_SETTING = Path("@jupyterlab") / "translation-extension" / "plugin.jupyterlab-settings"
LANGUAGES = ("en", "de-DE", "es-ES", "fr-FR", "zh-CN")
HIGHEST_PORT = 65535


def find_course(start: Path, package: Path | None = None, installed: Path = INSTALLED) -> Path:
    """Returns the folder that holds the lessons' originals in ``notebooks/``.

    It is the checkout around ``start``, else the checkout that dsv3lib is imported from, else what a wheel
    installed.

    Args:
        start: the folder the learner is in.
        package: dsv3lib's own folder.
        installed: where a wheel has put the notebooks.

    Raises:
        CourseError: if there are no notebooks in any of these places.
    """
    start = start.resolve()
    package = package or Path(dsv3lib.__file__).resolve().parent
    for folder in (start, *start.parents, package.parent):
        if (folder / NOTEBOOKS / FIRST).is_file():
            return folder
    if not (installed / FIRST).is_file():
        raise CourseError(
            f"the course's notebooks were not found: looked for {NOTEBOOKS}/{FIRST} in {start} and above, in "
            f"{package.parent}, and for {installed / FIRST}. Run dsv3 lab inside a clone of the project."
        )
    return installed.parent


def set_language(language: str, settings: Path) -> Path:
    """Sets the language of JupyterLab itself in the learner's settings; their other settings stay.

    Args:
        language: ``de-DE`` and the like, or ``en``.
        settings: JupyterLab's folder of user settings.

    Returns:
        The settings file that was written.

    Raises:
        CourseError: if the language or its pack is missing, or the present settings file cannot be read.
    """
    if language not in LANGUAGES:
        raise CourseError(f"language {language!r} is unknown; there are: {', '.join(LANGUAGES)}")
    pack = f"jupyterlab-language-pack-{language}"
    if language != "en" and not _installed(pack):
        raise CourseError(f"language {language!r} needs the package {pack}: run make setup")
    path = settings / LANGUAGE_SETTING
    present = _read_settings(path) if path.is_file() else {}
    present["locale"] = language.replace("-", "_")
    write_whole(path, json.dumps(present, indent=2) + "\n")
    return path


def lab_command(folder: Path, page: str, browser: bool = True, port: int | None = None) -> list[str]:
    """Returns the command that starts JupyterLab on a folder, with one of its files open.

    Args:
        folder: what JupyterLab shows. page: the file in it that is opened.
        browser: whether to open one. port: where to listen, or None for the first free one.
    """
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--ip=127.0.0.1",
        f"--ServerApp.root_dir={folder}",
        f"--LabApp.default_url=/lab/tree/{page}",
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        # With jupytext's extension, a learner's answers would be saved into the lessons' sources too.
        "--ServerApp.jpserver_extensions={'jupyterlab_jupytext': False}",
    ]
    command += [] if browser else ["--no-browser"]
    # In a container the learner is root, which JupyterLab refuses by default; token and loopback stay.
    command += ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    return command if port is None else [*command, f"--port={port}", "--ServerApp.port_retries=0"]


def lab_environment(environment: Mapping[str, str], own: Workspace | None = None) -> dict[str, str]:
    """Returns the environment for JupyterLab and its kernels.

    Args:
        environment: the process's. An empty ``JUPYTER_TOKEN`` would switch the token off and is left out.
        own: the learner's copy; progress and layout are theirs, unless the environment names others.
    """
    kept = {name: value for name, value in environment.items() if name != "JUPYTER_TOKEN" or value}
    if own is None:
        return kept
    mine = {record.VARIABLE: own.progress, "JUPYTERLAB_WORKSPACES_DIR": own.hidden / "layout"}
    return {name: str(path) for name, path in mine.items()} | kept


def prepare_settings(own: Workspace) -> str:
    """Writes JupyterLab's defaults for the course; returns the option that makes it read them."""
    folder = own.hidden / "settings"
    write_whole(folder / "overrides.json", json.dumps(OVERRIDES, indent=2) + "\n")
    return f"--LabApp.app_settings_dir={folder}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``dsv3 lab``."""
    workspace.add_arguments(parser)
    parser.add_argument("--reset", metavar="LESSON", help="begin a lesson anew; your copy of it is set aside")
    parser.add_argument(
        "--originals",
        action="store_true",
        help="open the lessons as they are kept in the project, to edit them",
    )
    parser.add_argument("--no-browser", action="store_true", help="print the address instead of opening it")
    parser.add_argument("--port", type=_port, help="listen here (default: the first free one from 8888)")
    parser.add_argument(
        "--language", metavar="CODE", help=f"JupyterLab's own language, from now on: {', '.join(LANGUAGES)}"
    )


def run(arguments: argparse.Namespace) -> int:
    """Becomes JupyterLab, so that Ctrl-C and every signal reach it and nothing stays behind.

    Returns:
        JupyterLab's exit status, on Windows alone, where a process cannot become another one.
    """
    if find_spec("jupyterlab") is None:
        raise CourseError("JupyterLab is not installed here: run make setup, or pip install -e '.[lab]'")
    course = find_course(Path.cwd())
    if arguments.language:
        from jupyterlab.commands import get_user_settings_dir

        set_language(arguments.language, Path(get_user_settings_dir()))
    browser, port = not arguments.no_browser, arguments.port
    if arguments.originals:
        command = lab_command(course, f"{NOTEBOOKS}/{FIRST}", browser, port)
        environment = lab_environment(os.environ)
    else:
        own = Workspace(workspace.folder_of(arguments.folder, arguments.learner))
        _bring_up_to_date(own, course, arguments.reset)
        command = [*lab_command(own.folder, overview.PAGE, browser, port), prepare_settings(own)]
        environment = lab_environment(os.environ, own)
    if os.name == "nt":
        return subprocess.run(command, env=environment, check=False).returncode
    sys.stdout.flush()
    os.execve(command[0], command, environment)


def _bring_up_to_date(own: Workspace, course: Path, reset: str | None) -> None:
    """Makes or refreshes a learner's copy, and says what happened to it."""
    for line in own.prepare(course):
        print(line)
    if reset:
        print(own.reset(reset, course))
    print(f"your copy of the course: {own.folder}")


def _read_settings(path: Path) -> dict[str, object]:
    """The learner's present settings; JupyterLab allows comments in them, so json5 reads them."""
    import json5

    try:
        present = json5.loads(path.read_text(encoding="utf-8") or "{}")
    except ValueError as error:
        raise CourseError(f"{path} is not valid JSON5 ({error}); mend or remove it") from error
    if not isinstance(present, dict):
        raise CourseError(f"{path} holds {type(present).__name__}, expected an object; mend or remove it")
    return present


def _installed(package: str) -> bool:
    """Whether a package is installed."""
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _port(text: str) -> int:
    """A port number from the command line."""
    if not text.isdecimal() or not 1 <= int(text) <= HIGHEST_PORT:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: expected a number from 1 to {HIGHEST_PORT}")
    return int(text)
