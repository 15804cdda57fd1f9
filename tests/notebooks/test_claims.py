"""Each bold claim of each lesson: its cell passes, and fails once its mechanism is switched off."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from lessons import STEMS, TO_BRING_TO_THE_PATTERN, notebook
from mutation import Off, examined, off_of
from nbformat import NotebookNode

from dsv3lib.course import claims, pairing
from dsv3lib.course.notebooks import environment
from dsv3lib.course.syllabus import lesson

pytestmark = pytest.mark.notebook

FOLDER = Path(__file__).parent / "claims"


@pytest.mark.parametrize("stem", sorted(set(STEMS) - TO_BRING_TO_THE_PATTERN))
def test_each_bold_claim_fails_when_its_mechanism_is_off(stem: str, tmp_path: Path) -> None:
    path, off = notebook(stem), FOLDER / f"{lesson(stem).short}.py"
    assert off.is_file(), f"{off} is missing: it says how each bold claim of the lesson is switched off"
    bold, known = claims.bold_claims(pairing.read_notebook(path)), set(off_of(off))
    assert len(bold) >= 3, f"{stem} opens with three claims, in bold; it has {len(bold)}"
    assert set(bold) <= known, f"not switched off by any test: {sorted(set(bold) - known)}"
    out = tmp_path / "found.json"
    script = Path(__file__).with_name("mutation.py")
    done = subprocess.run(
        [sys.executable, str(script), str(path), str(off), str(out)],
        env=environment(tmp_path),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert {name: trouble for name, trouble in found.items() if trouble} == {}
    assert set(found) == known, f"claims that no cell is tagged with: {sorted(known - set(found))}"


# --- the guard itself, on a small lesson ---------------------------------------------------------------------

WORDS = """\
1. **The sum of these numbers is large.** <!-- claim: large -->

It is above 10. <!-- claim: ten -->
"""


def small(words: str = WORDS, assertion: str = "assert total > 5") -> NotebookNode:
    code = [
        nbformat.v4.new_code_cell("FAST, STEPS = False, 9", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("def add(*n):\n    return sum(n) * factor\n\n\nfactor = 2"),
        nbformat.v4.new_code_cell("total = add(1, 2, 3)", metadata={"tags": ["count"]}),
        nbformat.v4.new_code_cell(assertion, metadata={"tags": ["claim:large", "claim:ten"]}),
    ]
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(words), *code])


def test_a_sound_lesson_has_no_findings() -> None:
    assert claims.claim_problems(small()) == []
    assert claims.bold_claims(small()) == ["large"]


@pytest.mark.parametrize(
    ("book", "expected"),
    [
        (small(WORDS.replace(" <!-- claim: large -->", "")), "a bold claim is tied to no cell"),
        (small(WORDS.replace(" <!-- claim: ten -->", "")), "the number 10 is tied to no cell"),
        (small(WORDS.replace("ten", "tenth")), "names claim 'tenth', but no code cell is tagged"),
        (small(WORDS.replace("It is above 10. <!-- claim: ten -->", "")), "no sentence names that claim"),
        (small(assertion="print(total > 5)"), "asserts nothing"),
        (small(assertion="assert True"), "asserts nothing"),
    ],
)
def test_a_missing_tie_is_found(book: NotebookNode, expected: str) -> None:
    assert any(expected in line for line in claims.claim_problems(book)), claims.claim_problems(book)


@pytest.mark.parametrize(
    "words",
    [
        "In V3 and FP8, `x = 3` and $n = 4$.",
        "See [part 5](05_x.ipynb) and 03.",
        "As §4.2 says, 14.",
        "## 7 ways",
    ],
)
def test_what_is_no_statement_needs_no_tie(words: str) -> None:
    assert claims.claim_problems(small(WORDS + "\n" + words)) == []


@pytest.mark.parametrize(
    ("off", "trouble"),
    [
        (Off("with a factor of 0", "factor = 0; rerun('count')"), ""),
        (
            Off("with a patched sum", "import builtins; patch(builtins, 'sum', lambda n: 0); rerun('count')"),
            "",
        ),
        (Off("with nothing changed", "pass"), "its cell passes with nothing changed"),
        (Off("x", "total = 0", given="total = 1"), "its cell fails on what is given: AssertionError()"),
        (Off("x", "total = 0", given="total = 9"), ""),
    ],
)
def test_switching_off(off: Off, trouble: str) -> None:
    assert dict(examined(small(), Path("small.ipynb"), {"large": off})) == {"large": trouble}
    assert sum([1]) == 1, "patches are undone"
