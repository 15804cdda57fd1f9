"""What a notebook says of its kernels: what the code holds, what was measured, and what was not."""

import json

import pytest

from dsv3lib.course import at_scale
from dsv3lib.course.scale import compiled, measured_lines
from dsv3lib.errors import CourseError
from dsv3lib.kernels.toolchain import language, targets


def result(gpu, date, us, operation="mla_decode", share=0.5):
    case = {"operation": operation, "name": f"{operation} H16", "us": us, "share_of_limit": share}
    case["peers"] = {"FlashMLA": {"times": 0.9}}
    return {"machine": {"gpu": gpu, "date": date}, "cases": [case, {"operation": operation, "name": "wrong"}]}


def test_only_the_newest_run_of_each_machine_is_told_and_only_what_was_timed(tmp_path):
    for gpu, date, us in (
        ("H200", "2026-01-02", [30.0, 20.0]),
        ("H200", "2026-01-01", [99.0]),
        ("H100", "2026-01-01", [40.0]),
    ):
        content = result(gpu, date, us)
        (tmp_path / f"gpu-{gpu}-{date}.json").write_text(json.dumps(content))
    lines = sorted(measured_lines(("mla_decode",), tmp_path))
    assert lines == [
        "H100 · mla_decode H16: 40 µs, 50% of the machine's limit, 0.90 × FlashMLA",
        "H200 · mla_decode H16: 20 µs, 50% of the machine's limit, 0.90 × FlashMLA",
    ]
    assert measured_lines(("gate",), tmp_path) == measured_lines((), tmp_path / "none")
    assert "not yet" in measured_lines(("gate",), tmp_path)[0]


@pytest.mark.skipif(not language.INSTALLED, reason="Triton exists for Linux alone")
def test_kernels_are_compiled_on_the_spot(capsys):
    told, rows = compiled(("gate training",))
    assert "without a GPU" in told
    name, registers, spilled, shared, _ = rows[0]
    assert name == "gate training" and 0 < int(registers) <= 255 and spilled == "0" and shared.endswith("KiB")
    at_scale("gate training", operations=("gate",))
    out = capsys.readouterr().out
    assert all(line.startswith("measured | ") for line in out.splitlines()) and "registers" in out


@pytest.mark.skipif(not language.INSTALLED, reason="Triton exists for Linux alone")
def test_a_kernel_that_does_not_exist_is_named():
    with pytest.raises(CourseError, match="no kernel is called warp_drive"):
        compiled(("gate training", "warp_drive"))


def test_without_triton_or_interpreted_that_is_said(monkeypatch):
    monkeypatch.setattr(language, "INSTALLED", True)
    monkeypatch.setattr(targets, "interpreted", lambda: True)
    assert compiled(("gate",)) == ("TRITON_INTERPRET=1 is set: kernels are interpreted, not compiled.", [])
    monkeypatch.setattr(language, "INSTALLED", False)
    told, rows = compiled(("gate",))
    assert "Linux alone" in told and rows == []
