"""The requirement files agree, the scripts do what they promise, no file names a registry or a machine."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
EXTRAS_INSTALLED = ("lab", "test")  # what make setup installs, and what environment.yml lists
LARGEST_TRACKED_FILE = 20 * (1 << 20)  # bytes

# Written in pieces, so that this file does not hold what it forbids. A home of "me" is nobody's: an example.
FORBIDDEN = {
    "a registry's address": "|".join(
        [
            r"pypi" + r"\.org",
            r"python" + r"hosted\.org",
            r"download\.py" + r"torch\.org",
            r"deb\." + r"debian\.org",
            r"(?:archive|security)\.ubuntu\." + r"com",
            r"registry\.npm" + r"js\.org",
            r"repo\.ana" + r"conda\.com",
            r"conda\.ana" + r"conda\.org",
            r"index" + r"-url",
            r"find" + r"-links",
        ]
    ),
    "a path of one machine": "|".join(
        [
            r"/wo" + r"rk/",
            r"/ro" + r"ot/",
            r"/ho" + r"me/(?!me\b)[a-z]",
            r"/Us" + r"ers/[A-Za-z]",
            r"/tm" + r"p/",
            r"/op" + r"t/",
        ]
    ),
    "how it was made": "|".join([r"(?<!api/)\bsess" + r"ions\b", r"\bhelper ag" + r"ents?\b"]),
}
LOCK_FILES = ("uv.lock", "poetry.lock", "Pipfile.lock", "conda-lock.yml", "package-lock.json", "yarn.lock")


def project() -> dict:
    """The [project] table of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements(lines) -> dict[str, str]:
    """Requirement lines by package: its specifier and marker in a normal form."""
    parsed = [Requirement(line) for line in lines]
    assert len({canonicalize_name(each.name) for each in parsed}) == len(parsed), "a package is listed twice"
    return {canonicalize_name(each.name): f"{each.specifier};{each.marker}" for each in parsed}


def direct(extras) -> dict[str, str]:
    """The project's direct requirements with those of some extras."""
    lines = [*project()["dependencies"]]
    for extra in extras:
        lines += project()["optional-dependencies"][extra]
    return requirements(lines)


def constraints() -> list[Requirement]:
    """Each line of constraints.txt."""
    return [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines()]


def tracked() -> list[Path]:
    """Every file that git tracks, or would on the next `git add`."""
    # safe.directory: a checkout may belong to somebody else than the root who tests it
    anyones = ["-c", "safe.directory=*"]
    command = ["git", *anyones, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=60).stdout.decode()
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def offences(text: str) -> list[str]:
    """What a text holds that no file of the project may hold."""
    found = ((why, re.search(pattern, text)) for why, pattern in FORBIDDEN.items())
    return [f"{why}: {match.group()!r}" for why, match in found if match]


def test_conda_lists_what_pyproject_lists():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    from_conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (from_pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    options = [line for line in from_pip if line.startswith("-")]
    listed = requirements(line for line in from_pip if not line.startswith("-"))
    assert listed == direct(EXTRAS_INSTALLED)
    assert options == ["-c constraints.txt", "-e ."]
    assert from_conda == ["python=3.11", "pip", "git", "make"]
    assert project()["requires-python"] == ">=3.11"


def test_a_difference_would_be_seen():
    assert requirements(["torch==2.13.0"]) != requirements(["torch==2.13.1"])
    assert requirements(["a>=1"]) != requirements(["a>=1", "b"])
    assert requirements(["a; sys_platform == 'linux'"]) != requirements(["a"])
    assert requirements(["Some_Package>=1"]) == requirements(["some-package >= 1"])


def test_every_direct_requirement_is_pinned_within_its_range():
    pinned = {}
    for each in constraints():
        pinned.setdefault(canonicalize_name(each.name), []).append(each)
    every = [*project()["dependencies"]]
    for lines in project()["optional-dependencies"].values():
        every += lines
    for requirement in map(Requirement, every):
        pins = pinned.get(canonicalize_name(requirement.name))
        assert pins, f"{requirement.name} has no line in constraints.txt"
        for pin in pins:
            (only,) = pin.specifier
            assert only.operator == "=="
            assert requirement.specifier.contains(only.version), f"{pin} is not within {requirement}"


def test_the_package_takes_a_range_of_torch_and_the_course_one_version():
    found = direct(())
    assert found["torch"] == "<2.15,>=2.11;None"
    assert found["triton"] == '<3.9,>=3.6;sys_platform == "linux"'
    pinned = {each.name: str(each.specifier) for each in constraints()}
    assert pinned["torch"] == "==2.13.0" and pinned["triton"] == "==3.7.1"


def test_constraints_force_nothing_and_hold_only_pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(re.match(r"[a-z0-9][a-z0-9-]*==[^ ;]+( ; .+)?$", line) for line in lines)
    assert lines == sorted(lines, key=lambda line: line.partition("==")[0])
    assert not [line for line in lines if "+" in line.split(";")[0]], "a local version fits one machine only"


def test_no_file_names_a_registry_or_a_machine():
    found = {}
    for path in tracked():
        assert path.name not in LOCK_FILES, path
        data = path.read_bytes()
        assert len(data) <= LARGEST_TRACKED_FILE, path
        if b"\0" not in data and (offends := offences(data.decode("utf-8"))):  # binary: weights and pictures
            found[str(path.relative_to(ROOT))] = offends
    assert not found


@pytest.mark.parametrize(
    "text",
    [
        "see https://py" + "pi.org/simple",
        "--extra-index" + "-url x",
        "open('/wo" + "rk/main/data')",
        'File "/tm' + 'p/ipykernel_12/1.py"',
    ],
)
def test_the_search_finds_what_it_looks_for(text):
    assert offences(text)
    assert not offences("a plain sentence about networks and working paths/in/a/project")


def links(text: str) -> set[str]:
    """The relative addresses that a Markdown text links to."""
    return {address for address in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in address}


def test_the_readme_lists_the_notebooks_that_there_are():
    there = {
        f"notebooks/{path.stem}.ipynb" for path in (ROOT / "notebooks" / "source").glob("[0-9][0-9]_*.py")
    }
    listed = {
        address for address in links((ROOT / "README.md").read_text()) if address.startswith("notebooks/")
    }
    assert listed == there, "the course's table in README.md needs one row for each notebook, and no other"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_every_other_link_leads_somewhere(name):
    text = (ROOT / name).read_text()
    pages = [address for address in links(text) if not address.endswith(".ipynb")]
    assert not [address for address in pages if not (ROOT / address).exists()]


def test_links_are_found():
    assert links("[a](b/c.md) ![x](d.svg) [web](https://x.y) [part](e.md#part)") == {
        "b/c.md",
        "d.svg",
        "e.md",
    }


def test_the_licence_is_whole():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text
    assert project()["license"] == "Apache-2.0"


def test_make_lists_its_targets():
    shown = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    for target in ("setup", "lab", "test", "notebooks", "lint", "bench", "clean"):
        assert f"make {target} " in shown


def checkout(folder: Path) -> Path:
    """The files that the set-up script reads, in a folder of their own."""
    (folder / "tools").mkdir()
    for name in ("tools/setup.sh", "tools/chromium.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def fake(folder: Path, name: str, body: str) -> Path:
    """An executable script that stands in for a program."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + body)
    path.chmod(0o755)
    return path


def call(script: str, folder: Path, **variables: str) -> subprocess.CompletedProcess:
    """Runs one of the scripts of tools/ in a checkout."""
    own = ("PYTHON", "CI", "DSV3_BROWSER")
    environment = {name: value for name, value in os.environ.items() if name not in own}
    return subprocess.run(
        ["sh", f"tools/{script}"],
        cwd=folder,
        env={**environment, **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_no_python_is_told_in_words(tmp_path):
    done = call("setup.sh", checkout(tmp_path), PYTHON="python-that-is-not-there")
    assert done.returncode == 1 and "no Python 3.11 or newer was found" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_a_python_without_ensurepip_names_the_package_to_install(tmp_path):
    real = sys.executable
    lame = fake(tmp_path, "lame", f'case "$2" in *ensurepip*) exit 1;; esac\nexec "{real}" "$@"\n')
    done = call("setup.sh", checkout(tmp_path), PYTHON=str(lame))
    release = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert done.returncode == 1 and f"apt-get install python{release}-venv" in done.stderr


def stand_in_environment(folder: Path) -> Path:
    """A .venv whose Python is the real one but whose pip only writes down how it was called."""
    record = folder / "pip-calls"
    pip = f'if [ "$1 $2" = "-m pip" ]; then echo "$@" >> "{record}"; exit 0; fi\n'
    fake(folder, ".venv/bin/python", pip + f'exec "{sys.executable}" "$@"\n')
    fake(folder, ".venv/bin/pip", f"# {folder.resolve()}/.venv/bin/python\n")
    return record


def installs(record: Path) -> int:
    """How many times pip was asked to install."""
    return sum("-m pip install" in line for line in record.read_text().splitlines()) if record.exists() else 0


def test_setup_installs_once_and_again_only_when_requirements_change(tmp_path):
    record = stand_in_environment(checkout(tmp_path))
    assert call("setup.sh", tmp_path).returncode == 0
    assert installs(record) == 1 and "-c constraints.txt -e .[lab,test]" in record.read_text()
    second = call("setup.sh", tmp_path)
    assert second.returncode == 0 and second.stdout == "" and installs(record) == 1
    with open(tmp_path / "constraints.txt", "a") as file:
        file.write("zzz==1.0\n")
    assert call("setup.sh", tmp_path).returncode == 0 and installs(record) == 2
    (tmp_path / "README.md").write_text("changed")
    assert call("setup.sh", tmp_path).returncode == 0 and installs(record) == 2


def test_an_installation_that_failed_is_tried_again(tmp_path):
    record = stand_in_environment(checkout(tmp_path))
    python = tmp_path / ".venv/bin/python"
    working = python.read_text()
    python.write_text(working.replace("exit 0; fi", 'case "$3" in install) exit 1;; esac; exit 0; fi'))
    assert call("setup.sh", tmp_path).returncode != 0
    python.write_text(working)
    assert call("setup.sh", tmp_path).returncode == 0 and installs(record) == 2


def test_an_environment_that_was_moved_is_made_anew(tmp_path):
    stand_in_environment(checkout(tmp_path))
    fake(tmp_path, ".venv/bin/pip", "# elsewhere/.venv/bin/python\n")
    done = call("setup.sh", tmp_path, PYTHON="python-that-is-not-there")
    assert done.returncode == 1 and "no Python" in done.stderr  # it looked for one to make it with


@pytest.mark.parametrize(("ci", "status"), [("true", 1), ("", 0)])
def test_a_missing_browser_is_told_and_fails_on_ci(tmp_path, ci, status):
    tools = tmp_path / "bin"
    fake(tools, "id", "echo 1000\n")  # an ordinary user: nothing is installed
    sh = shutil.which("sh")
    environment = {"PATH": str(tools), "CI": ci}
    done = subprocess.run(
        [sh, str(ROOT / "tools/chromium.sh")], env=environment, capture_output=True, text=True, timeout=60
    )
    if sys.platform == "darwin" and done.returncode == 0 and not done.stderr:
        return  # a Mac that has Chrome in its Applications folder
    assert done.returncode == status and "apt-get install chromium" in done.stderr


def test_a_chosen_browser_is_enough(tmp_path):
    tools = tmp_path / "bin"
    fake(tools, "id", "echo 1000\n")
    browser = fake(tmp_path, "my-browser", "exit 0\n")
    environment = {"PATH": str(tools), "CI": "true", "DSV3_BROWSER": str(browser)}
    command = [shutil.which("sh"), str(ROOT / "tools/chromium.sh")]
    assert subprocess.run(command, env=environment, timeout=60).returncode == 0


def test_the_browser_fixture_fails_on_ci_and_skips_elsewhere(request):
    conftest = request.config.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    assert conftest.require_browser("/a/chromium", True) == "/a/chromium"
    with pytest.raises(pytest.fail.Exception, match="chromium.sh"):
        conftest.require_browser(None, True)
    with pytest.raises(pytest.skip.Exception, match="chromium.sh"):
        conftest.require_browser(None, False)


def test_without_triton_the_tests_refuse_to_run_where_it_exists(request):
    conftest = request.config.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    conftest.require_triton(True, "linux")
    conftest.require_triton(False, "darwin")
    with pytest.raises(pytest.UsageError, match="make setup"):
        conftest.require_triton(False, "linux")


def test_a_failing_phase_fails_the_run(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "tools")
    import run_tests

    good, bad = [sys.executable, "-c", "print('= 3 passed =')"], [sys.executable, "-c", "raise SystemExit(3)"]
    monkeypatch.setattr(run_tests, "phases", lambda: {"one": bad, "two": good})
    assert run_tests.main([]) == 1
    shown = capsys.readouterr().out
    assert re.search(r"one +FAILED", shown) and re.search(r"two +passed.* 3 passed", shown)
    assert run_tests.main(["two"]) == 0
    assert run_tests.main(["three"]) == 2


def test_the_notebooks_phase_leaves_the_learners_progress_alone(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "tools")
    import run_tests

    from dsv3lib.course import record

    monkeypatch.setenv(record.VARIABLE, "mine.json")
    assert run_tests.environment("unit", tmp_path)[record.VARIABLE] == "mine.json"
    assert Path(run_tests.environment("nbval", tmp_path)[record.VARIABLE]).parent == tmp_path


def test_every_phase_is_there(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    import run_tests

    commands = run_tests.phases()
    assert list(commands)[:2] == ["lint", "unit"]
    assert ("nbval" in commands) == any((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    assert ("browser" in commands) == (ROOT / "tests" / "browser").is_dir()
