"""The wheel: built from what git tracks, installed outside the clone, used with nothing of the clone in reach."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from test_setup import ROOT, tracked

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of the tracked files, built with the tools that are installed: nothing is fetched."""
    folder = tmp_path_factory.mktemp("wheel")
    for path in tracked():
        inside = path.relative_to(ROOT)
        if inside.parts[0] not in ("tests", "benchmarks", "docs"):
            (folder / "source" / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / "source" / inside)
    command = [
        *PIP,
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(folder / "source"),
    ]
    subprocess.run(command, check=True, timeout=300)
    shutil.rmtree(folder / "source")
    return next(folder.glob("dsv3lib-*.whl"))


@pytest.fixture(scope="module")
def elsewhere(wheel, tmp_path_factory) -> Path:
    """An environment that holds this wheel alone; its requirements are looked up where the tests run.

    A path in a ``.pth`` file is searched after the environment's own packages, and the ``.pth`` files that lie
    there are not read: so the clone, which is installed there in place, stays out of reach.
    """
    folder = tmp_path_factory.mktemp("elsewhere")
    venv.create(folder / "env", with_pip=False, symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(folder / "env")}))
    command = [
        *PIP,
        "--python",
        str(folder / "env" / "bin" / "python"),
        "install",
        "-q",
        "--no-deps",
        str(wheel),
    ]
    subprocess.run(command, check=True, timeout=300)
    (site / "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def run(folder: Path, *command: str) -> subprocess.CompletedProcess:
    """Runs a program of the environment, away from the clone."""
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    variables |= {"HOME": str(folder / "home"), "NO_COLOR": "1"}
    (folder / "home").mkdir(exist_ok=True)
    program = str(folder / "env" / "bin" / command[0])
    return subprocess.run(
        [program, *command[1:]],
        cwd=folder / "home",
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_wheel_holds_the_library_and_the_course_and_no_tests(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for needed in ("dsv3lib/py.typed", "dsv3lib/configs/tiny.json", "dsv3lib/kernels/tuned/sm_90.json"):
        assert needed in names
    assert any(name.endswith("share/dsv3lib/notebooks/00_start_here.ipynb") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]
    modules = {str(p.relative_to(ROOT)) for p in tracked() if p.is_relative_to(ROOT / "dsv3lib")}
    modules = {name for name in modules if name.endswith(".py")}
    assert modules <= set(names), sorted(modules - set(names))


def test_the_model_works_where_only_the_wheel_is(elsewhere):
    code = """
import torch, dsv3lib
from dsv3lib import DeepSeekV3, ModelConfig
ids = torch.arange(6)[None]
model = DeepSeekV3(ModelConfig.preset("nano"), generator=torch.Generator().manual_seed(0))
assert torch.isfinite(model(ids, labels=ids).loss)
assert model.generate(ids, max_new_tokens=2).shape[1] >= 7
print(dsv3lib.__file__)
"""
    done = run(elsewhere, "python", "-W", "error", "-c", code)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(elsewhere / "env"), (
        "the clone was imported, not the wheel"
    )


def test_the_doctor_runs_there(elsewhere):
    done = run(elsewhere, "dsv3", "doctor", "--json")
    assert done.returncode == 0, done.stderr
    assert {"Python", "torch"} <= {line["name"] for line in json.loads(done.stdout)}


def test_the_lab_finds_the_course_that_the_wheel_brought(elsewhere):
    done = run(elsewhere, "dsv3", "lab", "--help")
    assert done.returncode == 0 and "--language" in done.stdout, done.stderr
    code = "from dsv3lib.course.lab import INSTALLED, FIRST; assert (INSTALLED / FIRST).is_file()"
    done = run(elsewhere, "python", "-c", code)
    assert done.returncode == 0, done.stderr


def test_the_shipped_checkpoint_is_found_there_offline_or_its_absence_is_told(elsewhere):
    """The expected answer follows from what git tracks: with the weights the model, without them the way out."""
    shipped = ROOT / "data" / "checkpoints" / "tiny-v3" / "model.safetensors" in tracked()
    code = """
from dsv3lib import DeepSeekV3
from dsv3lib.errors import CheckpointError
try:
    print("found", DeepSeekV3.from_pretrained("tiny-v3").config.num_hidden_layers)
except CheckpointError as error:
    print("missing", error)
"""
    done = run(elsewhere, "python", "-W", "error", "-c", code)
    assert done.returncode == 0, done.stderr
    if shipped:
        assert done.stdout.strip() == "found 12"
    else:
        assert done.stdout.startswith("missing tiny-v3:") and "make checkpoint" in done.stdout
