"""docs/kernels.md says what is: every table in it is computed, and a stale one fails here."""

import sys
from pathlib import Path

import pytest

from dsv3lib.kernels.toolchain import language

pytestmark = pytest.mark.skipif(not language.INSTALLED, reason="Triton exists for Linux alone")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import kernel_page  # noqa: E402


def test_the_page_is_what_would_be_written():
    assert kernel_page.main(["--check"]) == 0, "python tools/kernel_page.py writes it anew"


def test_a_stale_table_and_missing_marks_are_seen():
    page = "<!-- numbers -->\nold\n<!-- /numbers -->\n"
    assert kernel_page.filled(page, {"numbers": "new"}) == page.replace("old", "new")
    with pytest.raises(SystemExit, match="marks of 'code'"):
        kernel_page.filled(page, {"code": "new"})


def test_the_floor_is_the_larger_of_the_two_times():
    rows = {
        line.split(" | ")[0] + line.split(" | ")[1]: line
        for line in kernel_page.table_of_numbers().splitlines()
    }
    assert rows["| `gemm_fp8`4096 × 24576 × 7168"].endswith(
        "| 729 | arithmetic |"
    )  # 1.443 TFLOP at 1979 TFLOP/s
    assert rows["| `gemm_fp8`64 × 24576 × 7168"].endswith("| 37 | memory |")  # 0.18 GB at 4.8 TB/s


def test_without_results_no_speed_is_claimed(tmp_path):
    assert "no speed is claimed" in kernel_page.table_of_measurements(tmp_path)
