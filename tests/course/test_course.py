"""Every exercise of the course and its check, and what a learner's function may do to it."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from learner_cell import lesson_module

from dsv3lib.course import syllabus
from dsv3lib.course.exercises import ALL, find
from dsv3lib.course.judge import judge
from dsv3lib.course.task import Exercise, Rejected, RightAnswer, WrongAnswer, expect_number, expect_tensor
from dsv3lib.errors import CourseError

# --- every exercise of the course ---------------------------------------------------------------------------


@pytest.mark.parametrize("one", ALL, ids=lambda one: one.id)
def test_solution_is_accepted(one: Exercise) -> None:
    verdict = judge(one, one.solution)
    assert (verdict.state, verdict.text) == ("right", one.praise)


@pytest.mark.parametrize(
    ("one", "wrong"), [(one, wrong) for one in ALL for wrong in one.wrong], ids=lambda x: getattr(x, "id", "")
)
def test_plausible_wrong_answer_is_rejected_in_words(one: Exercise, wrong: WrongAnswer) -> None:
    verdict = judge(one, wrong.function)
    assert verdict.state == "wrong", wrong.why
    assert "raised" not in verdict.text, "a wrong answer must be judged, not crash"
    assert len(verdict.text) > 20
    assert wrong.says in verdict.text, f"{wrong.why}: the sentence must name it"


@pytest.mark.parametrize(
    ("one", "right"),
    [(one, right) for one in ALL for right in one.also_right],
    ids=lambda x: getattr(x, "id", ""),
)
def test_every_natural_way_to_be_right_is_accepted(one: Exercise, right: RightAnswer) -> None:
    verdict = judge(one, right.function)
    assert verdict.state == "right", f"{right.how}: {verdict.text}"


@pytest.mark.parametrize("one", ALL, ids=lambda one: one.id)
def test_an_exercise_knows_five_ways_to_be_right_and_five_to_be_wrong(one: Exercise) -> None:
    assert len(one.also_right) >= 4, "with the solution, five natural ways to be right"
    assert len(one.wrong) >= 5 and all(wrong.says for wrong in one.wrong)
    assert len({wrong.says for wrong in one.wrong}) >= 5, "different mistakes need different sentences"
    assert len(one.spec) >= 2, "what it takes, and what it returns"
    assert len(one.solution_source().splitlines()) <= 25


@pytest.mark.parametrize("one", ALL, ids=lambda one: one.id)
@pytest.mark.parametrize("nonsense", [lambda *a: None, lambda *a: "42", lambda: 1, lambda *a: torch.zeros(0)])
def test_nonsense_is_rejected_and_never_raises(one: Exercise, nonsense: object) -> None:
    assert judge(one, nonsense).state == "wrong"


@pytest.mark.parametrize("one", ALL, ids=lambda one: one.id)
def test_exercise_is_complete(one: Exercise) -> None:
    assert one.solution.__name__ in one.prompt, "the prompt names the function to write"
    assert f"def {one.solution.__name__}(" in one.solution_source()
    assert len(one.hints) >= 2 and one.praise.strip() and one.minutes > 0
    assert syllabus.lesson(one.lesson).short == one.lesson


def test_ids_are_unique_and_found() -> None:
    assert len({one.id for one in ALL}) == len(ALL)
    assert find("mla.1").title
    with pytest.raises(CourseError, match=r"'mla\.99'; there are .*mla\.1"):
        find("mla.99")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"id": "mla"}, "must look like"),
        ({"dots": 4}, "dots is 4"),
        ({"wrong": ()}, "0 wrong"),
        ({"hints": ()}, "no hint"),
    ],
)
def test_malformed_exercise_is_refused(changes: dict, expected: str) -> None:
    one = find("mla.1")
    with pytest.raises(CourseError, match=expected):
        Exercise(**{**one.__dict__, **changes})


# --- what a learner's function may do ------------------------------------------------------------------------


BLANKS = [
    "...",
    "pass",
    "return",
    "return None",
    "raise NotImplementedError",
    "'''only words'''",
    "return ...",
]


@pytest.mark.parametrize("body", BLANKS)
def test_unanswered_is_open(tmp_path: Path, body: str) -> None:
    answer = lesson_module(tmp_path, f"def answer(a, b, c, d, e):\n    '''Doc.'''\n    {body}\n").answer
    assert judge(find("mla.1"), answer).state == "open"


@pytest.mark.parametrize("answer", [None, ...])
def test_nothing_handed_in_is_open(answer: object) -> None:
    assert judge(find("mla.1"), answer).state == "open"


def test_a_forgotten_return_is_named(tmp_path: Path) -> None:
    answer = lesson_module(tmp_path, "def answer(h, *others):\n    x = h * 2\n").answer
    verdict = judge(find("mla.1"), answer)
    assert verdict.state == "wrong" and "is there a `return`?" in verdict.text


def test_an_exception_comes_with_the_learners_own_line(tmp_path: Path) -> None:
    text = "import torch\ndef answer(q, *others):\n    x = 1\n    return torch.matmul(q, q)\n"
    verdict = judge(find("mla.2"), lesson_module(tmp_path, text).answer)
    assert verdict.state == "wrong"
    assert verdict.text.startswith("Your function raised RuntimeError:") and "shapes" in verdict.text
    assert verdict.line == "line 4: return torch.matmul(q, q)"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return answer(*a)", "calls itself without end"),
        ("return undefined", "never given a value"),
        ("return 1 / 0", "divided by zero"),
        ("return [][1]", "outside its tensor"),
        ("exit()", "end the notebook's kernel"),
        ("raise KeyError('x')", "not in its dictionary"),
        ("raise Exception", "raised Exception: no message"),
    ],
)
def test_errors_in_words(tmp_path: Path, body: str, expected: str) -> None:
    verdict = judge(find("mla.1"), lesson_module(tmp_path, f"def answer(*a):\n    {body}\n").answer)
    assert verdict.state == "wrong" and expected in verdict.text


@pytest.mark.parametrize(
    "body", ["pass", "\n        try:\n            pass\n        except Exception:\n            pass"]
)
def test_an_endless_loop_is_stopped(tmp_path: Path, body: str) -> None:
    answer = lesson_module(tmp_path, f"def answer(*a):\n    while True: {body}\n    return 1\n").answer
    started = time.monotonic()
    verdict = judge(find("mla.1"), answer, seconds=0.3)
    assert verdict.state == "wrong" and "Stopped after 0.3 seconds" in verdict.text
    assert verdict.line.startswith("line 2: while True")
    assert time.monotonic() - started < 10


def test_outside_the_main_thread_a_check_still_answers() -> None:
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(judge(find("mla.1"), find("mla.1").solution).state))
    thread.start()
    thread.join()
    assert found == ["right"]


def test_prints_are_shown_shortened_and_random_state_is_left_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    verdict = judge(find("mla.1"), lambda *a: print("hello " * 500) or torch.rand(1).item())
    assert torch.equal(torch.rand(3), expected)
    assert verdict.printed.startswith("hello hello") and len(verdict.printed) <= 400
    assert capsys.readouterr().out == ""


def test_a_called_function_is_explained() -> None:
    assert "without calling it; it got a int" in judge(find("mla.1"), 3).text


def test_interrupting_a_check_is_not_swallowed() -> None:
    def answer(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge(find("mla.1"), answer)


# --- the words of a checker ----------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(0, 10**6))
def test_expect_tensor_accepts_the_answer_and_rejects_any_change(shape: list[int], seed: int) -> None:
    expected = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expect_tensor(expected.float(), expected, "it")
    changed = expected.clone().view(-1)
    changed[seed % changed.numel()] += 0.01 * max(1.0, float(expected.abs().max()))
    with pytest.raises(Rejected, match="of the values are off; the worst is at"):
        expect_tensor(changed.view(shape), expected, "it")
    with pytest.raises(Rejected, match="should have shape"):
        expect_tensor(expected.unsqueeze(0), expected, "it")
    with pytest.raises(Rejected, match="NaN"):
        expect_tensor(expected * float("nan"), expected, "it")


@given(st.floats(-1e12, 1e12, allow_nan=False).filter(lambda x: abs(x) > 1e-6))
def test_expect_number_accepts_the_answer_and_names_the_slip(expected: float) -> None:
    expect_number(torch.tensor(expected, dtype=torch.float64), expected, "it")
    with pytest.raises(Rejected, match="Twice."):
        expect_number(2 * expected, expected, "it", slips={2 * expected: "Twice."})
    for other in (float("nan"), float("inf"), None, "3", True):
        with pytest.raises(Rejected):
            expect_number(other, expected, "it")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("torch.ones(2, 3) @ torch.ones(2, 3)", "In words: the shapes of two tensors do not fit each other."),
        ("torch.ones(2).double() @ torch.ones(2)", "In words: two tensors have different dtypes"),
        ("torch.ones(6).reshape(4, 2)", "In words: a reshape must keep the number of values."),
        ("torch.ones(2, 3).T.view(6)", "In words: `view` cannot do this to a transposed tensor"),
        ("torch.einsum('ab,bc->ac', torch.ones(2, 3), torch.ones(4, 2))", "In words: the einsum's letters"),
        ("bool(torch.ones(2) > 0)", "In words: a tensor of several values is neither true nor false"),
        ("torch.ones(1).backward()", "In words: the result is cut off from its inputs"),
        ("torch.ones(2, requires_grad=True).add_(1)", "In words: an in-place operation changed"),
        ("torch.ones(3).topk(5)", "In words: `topk` is asked for more values than there are."),
        ("(_ for _ in ()).throw(RuntimeError('a rare thing'))", "RuntimeError: a rare thing."),
    ],
)
def test_torchs_refusals_are_not_all_about_shapes(tmp_path: Path, body: str, expected: str) -> None:
    module = lesson_module(tmp_path, f"import torch\ndef f(*a):\n    return {body}\n")
    text = judge(find("mla.1"), module.f).text
    assert expected in text
    assert text.endswith("a rare thing.") or "In words" in text


def test_a_slip_is_named_by_the_value_it_gives() -> None:
    from dsv3lib.course.task import expect_same

    slips = {"the transpose": torch.arange(6.0).reshape(3, 2), "twice": torch.arange(6.0).reshape(2, 3) * 2}
    with pytest.raises(Rejected, match="twice"):
        expect_same(2 * torch.arange(6).reshape(2, 3), slips)
    for other in (None, 3, torch.zeros(1), torch.arange(6.0).reshape(2, 3)):
        expect_same(other, slips)
