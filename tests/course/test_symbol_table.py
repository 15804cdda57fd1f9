"""Tables of symbols: numbers come from the presets, letters are set as they are in the paper."""

from __future__ import annotations

import re

import pytest

from dsv3lib.config import ModelConfig
from dsv3lib.course.symbol_table import SIZES, shape_of, symbols, typeset
from dsv3lib.course.tables import table
from dsv3lib.errors import CourseError

V3 = ModelConfig.preset("v3-671b")


def test_both_presets_stand_beside_each_symbol(capsys: pytest.CaptureFixture[str]) -> None:
    symbols("d", "d_h^R", ("c_t^{KV}", "latent", "[d_c]", "what is cached of a token"))
    head, d, rope, latent = (re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines())
    assert head == ["paper", "code", "shape", "V3", "tiny", "what it is"]
    assert d[:4] == ["d", "`hidden_size`", "7,168", "256"] and rope[2:4] == ["64", "16"]
    assert latent == ["c_t^{KV}", "`latent`", "[d_c]", "[512]", "[64]", "what is cached of a token"]


def test_sizes_alone_need_no_column_of_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    symbols("d", "V")
    assert "shape" not in capsys.readouterr().out


@pytest.mark.parametrize("letter", SIZES)
def test_each_known_symbol_is_a_field_of_the_config(letter: str) -> None:
    assert shape_of(letter, V3).replace(",", "") == str(getattr(V3, SIZES[letter][0]))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("[B, T, n_h, d_h + d_h^R]", "[B, T, 128, 192]"),
        ("[n_h*d_v, d]", "[16,384, 7,168]"),
        ("[d_h^R/2]", "[32]"),
        ("[T, d_c']", "[T, 1,536]"),
        ("[d_model]", "[d_model]"),
        ("[T + d]", "[T + 7168]"),
    ],
)
def test_shapes_are_worked_out(shape: str, expected: str) -> None:
    assert shape_of(shape, V3) == expected


def test_letters_are_set_with_index_and_power() -> None:
    assert typeset("q_{t,i}^R") == "<i>q<sub>t,i</sub><sup>R</sup></i>"
    assert typeset("d_h^R") == "<i>d<sub>h</sub><sup>R</sup></i>"
    assert typeset("a < b") == "<i>a &lt; b</i>"


def test_an_unknown_symbol_and_a_short_row_are_refused() -> None:
    with pytest.raises(CourseError, match="no symbol 'x'; there are V, d,"):
        symbols("x")
    with pytest.raises(CourseError, match="3 parts, expected 4"):
        symbols(("a", "b", "c"))


def test_a_table_has_its_columns_and_its_caption(capsys: pytest.CaptureFixture[str]) -> None:
    table(["schedule", "idle"], [["1F1B", 2100], ["DualPipe", "6 of `F`"]], caption="At 8 ranks.")
    assert capsys.readouterr().out.splitlines() == [
        "schedule  idle",
        "1F1B      2,100",
        "DualPipe  6 of `F`",
        "At 8 ranks.",
    ]
    table(["a", "b"], [["x", 1]], varies=True)
    assert all(line.startswith("measured | ") for line in capsys.readouterr().out.splitlines())
    with pytest.raises(CourseError, match="2 columns got a row of 1 cells"):
        table(["a", "b"], [["x"]])
