"""The check-up: every part is looked at, nothing that is missing makes it fall over."""

import argparse
import builtins
import importlib.metadata
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from dsv3lib import DeepSeekV3, ModelConfig, doctor

PARTS = ["Python", "torch", "threads", "triton", "GPU", "backend", "memory", "free disk", "JupyterLab", "browser"]


def test_every_part_has_a_status_a_value_and_a_way_on():
    findings = doctor.examine()
    assert [finding.name for finding in findings] == PARTS
    for finding in findings:
        assert finding.status in doctor.STYLES and finding.value and finding.without
    assert doctor.exit_status(findings) == 0  # the tests themselves run on Python and torch


def test_json_holds_the_same_findings(capsys):
    assert doctor.run(argparse.Namespace(json=True)) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [line["name"] for line in shown] == PARTS
    assert set(shown[0]) == {"name", "status", "value", "without", "essential"}


def test_the_table_shows_each_word(capsys):
    findings = doctor.examine()
    console = Console(width=400, record=True)
    console.print(doctor.report(findings))
    shown = console.export_text()
    for finding in findings:
        assert finding.value in shown and finding.without in shown


@given(essential=st.lists(st.booleans(), min_size=1), statuses=st.data())
def test_only_a_missing_essential_part_fails(essential, statuses):
    drawn = [statuses.draw(st.sampled_from(["ok", "limited", "missing"])) for _ in essential]
    findings = [
        doctor.Finding("part", status, "value", "without", needed)
        for status, needed in zip(drawn, essential, strict=True)
    ]
    expected = any(needed and status == "missing" for status, needed in zip(drawn, essential, strict=True))
    assert doctor.exit_status(findings) == int(expected)


@pytest.mark.parametrize(("found", "status"), [((3, 10), "missing"), ((3, 11), "ok"), ((3, 13), "ok")])
def test_an_old_python_is_missing(found, status):
    assert doctor.check_python(found).status == status


@pytest.mark.parametrize("error", [ImportError("no torch"), OSError("libcudart.so: cannot open")])
def test_a_broken_torch_is_told_in_words(monkeypatch, error):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "torch":
            raise error
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    finding = doctor.check_torch()
    assert finding.status == "missing" and finding.essential and str(error) in finding.value
    assert doctor.check_gpu().status == "missing"


def test_the_backend_is_the_short_form_of_explain(monkeypatch):
    model = DeepSeekV3(ModelConfig.preset("nano"))
    finding = doctor.check_backend()
    assert finding.status == "ok" and finding.value == model.explain().short()
    monkeypatch.setattr(DeepSeekV3, "explain", lambda self: 1 / 0)
    assert doctor.check_backend().status == "missing" and "division" in doctor.check_backend().value


@pytest.mark.parametrize(("system", "words"), [("darwin", "does not exist"), ("linux", "not installed")])
def test_no_triton_is_no_disaster(monkeypatch, system, words):
    def absent(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(doctor, "version", absent)
    finding = doctor.check_triton(system)
    assert finding.status == "missing" and words in finding.value and not finding.essential


@pytest.mark.parametrize(
    ("capability", "status"), [((8, 0), "limited"), ((8, 9), "ok"), ((9, 0), "ok"), ((10, 0), "ok")]
)
def test_a_gpu_is_named_and_judged_by_its_generation(monkeypatch, capability, status):
    major, minor = capability
    properties = SimpleNamespace(name="Some GPU", total_memory=80 * doctor.GIB, major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    finding = doctor.check_gpu()
    assert finding.status == status
    assert finding.value == f"Some GPU, 80 GiB, sm_{major}{minor}"


@pytest.mark.parametrize(("gib", "status"), [(1, "limited"), (8, "ok")])
def test_memory_and_disk_are_compared_with_the_need(gib, status):
    assert doctor.check_memory(gib * doctor.GIB).status == status
    assert doctor.check_disk(Path.cwd(), gib * doctor.GIB).status == status


def test_a_folder_that_is_not_there_is_told(tmp_path):
    assert doctor.check_disk(tmp_path / "gone").status == "missing"


def test_lacking_packages_of_jupyterlab_are_named(monkeypatch):
    monkeypatch.setattr(doctor, "_version_of", {"jupyterlab": "4"}.get)
    finding = doctor.check_jupyterlab()
    assert finding.status == "missing" and "ipywidgets, ipykernel" in finding.value


def test_the_browser_is_the_one_that_was_chosen(monkeypatch, tmp_path):
    browser = tmp_path / "my-browser"
    browser.write_text("#!/bin/sh\n")
    monkeypatch.setenv(doctor.BROWSER_VARIABLE, str(browser))
    assert doctor.find_browser() is None  # it cannot be run
    browser.chmod(0o755)
    assert doctor.find_browser() == str(browser)
    assert doctor.check_browser().status == "ok"


def test_no_browser_is_found_where_none_is(monkeypatch, tmp_path):
    monkeypatch.delenv(doctor.BROWSER_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor, "BROWSER_APPLICATIONS", ())
    assert doctor.check_browser().status == "missing"


def test_a_missing_torch_makes_the_command_fail(monkeypatch, capsys):
    broken = replace(doctor.check_python(), name="torch", status="missing")
    monkeypatch.setattr(doctor, "examine", lambda: [broken])
    assert doctor.run(argparse.Namespace(json=False)) == 1
    assert "torch" in capsys.readouterr().out


def test_importing_the_doctor_does_not_import_torch():
    import subprocess

    code = "import sys, dsv3lib.doctor; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
