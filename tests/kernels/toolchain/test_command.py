"""``dsv3 kernels``: the table for somebody without a GPU."""

import json

import pytest

from dsv3lib.cli import main
from dsv3lib.kernels.toolchain import aot, language, targets
from dsv3lib.kernels.toolchain import command as kernels_command

needs_triton = pytest.mark.skipif(not language.INSTALLED, reason="Triton exists for Linux alone")


@needs_triton
def test_the_table_says_what_the_code_holds(monkeypatch, capsys):
    builds = list(aot.builds(("routing",), ("sm_90",)))[:2]
    monkeypatch.setattr(aot, "builds", lambda families=(), generations=(): iter(builds))
    assert main(["kernels", "routing", "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)
    assert [line["operation"] for line in lines] == [b.specimen.operation for b in builds]
    assert all(0 < line["registers"] <= 255 and line["generation"] == "sm_90" for line in lines)
    assert main(["kernels", "routing"]) == 0
    shown = capsys.readouterr().out
    assert "registers" in shown and builds[0].specimen.operation in shown and "Hopper" in shown


@needs_triton
def test_several_processes_give_the_same_lines_in_the_same_order():
    one = list(kernels_command.compile_lines(("routing",), ("sm_90",), progress=False))
    assert len(one) > 4, "few builds are compiled in this process, and nothing would be compared"
    again = [kernels_command._line(("routing",), ("sm_90",), i) for i in range(len(one))]
    assert one == again


def test_an_unknown_family_is_named(capsys):
    assert main(["kernels", "warp_drive"]) == 2
    assert "warp_drive" in capsys.readouterr().err


@needs_triton
def test_interpreted_kernels_are_not_compiled(monkeypatch, capsys):
    monkeypatch.setattr(targets, "interpreted", lambda: True)
    monkeypatch.setattr(kernels_command.os, "cpu_count", lambda: 1)
    assert main(["kernels", "routing"]) == 2
    said = capsys.readouterr().err
    assert "TRITON_INTERPRET" in said and "compiling:" not in said, "it is refused before any work begins"
