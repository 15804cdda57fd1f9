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


TO_BRING_TO_THE_PATTERN = {"mla", "routing"}
"""Lessons whose exercises are older than the rule below; who brings one to it takes it out."""


@pytest.mark.parametrize(
    "one", [one for one in ALL if one.lesson not in TO_BRING_TO_THE_PATTERN], ids=lambda o: o.id
)
def test_an_exercise_knows_five_ways_to_be_right_and_five_to_be_wrong(one: Exercise) -> None:
    assert len(one.also_right) >= 4, "with the solution, five natural ways to be right"
    assert len(one.wrong) >= 5 and all(wrong.says for wrong in one.wrong)
    assert len({wrong.says for wrong in one.wrong}) == len(one.wrong), "two mistakes need two sentences"
    assert one.spec and one.spec[-1][0] == "returns"
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


# --- check, hint, solution, progress -------------------------------------------------------------------------


def test_check_shows_and_keeps_the_outcome(capsys: pytest.CaptureFixture[str], progress_file: Path) -> None:
    course.check("mla.1")
    assert capsys.readouterr().out.startswith("Open · exercise mla.1")
    assert not progress_file.exists()
    course.check("mla.1", lambda *a: 1)
    assert "should be a tensor; you returned int 1" in capsys.readouterr().out
    assert kept(progress_file)["exercises"]["mla.1"] == {"state": "wrong", "tries": 1}
    course.check("mla.1", find("mla.1").solution)
    assert capsys.readouterr().out.startswith("Right")
    course.check("mla.1", lambda *a: 1)
    assert kept(progress_file)["exercises"]["mla.1"] == {"state": "right", "tries": 3}


def test_hints_come_one_at_a_time(capsys: pytest.CaptureFixture[str], progress_file: Path) -> None:
    hints = find("mla.1").hints
    for number in (1, 2, 3, 3):
        course.hint("mla.1")
        lines = capsys.readouterr().out.splitlines()
        assert lines == [f"Hint {i + 1} of 3 | {hints[i]}" for i in range(number)]
    assert kept(progress_file)["exercises"]["mla.1"]["hints"] == 3


def test_solution_is_shown_folded(capsys: pytest.CaptureFixture[str], progress_file: Path) -> None:
    course.solution("mla.1")
    assert find("mla.1").solution_source() in capsys.readouterr().out
    assert kept(progress_file)["exercises"]["mla.1"]["solution_shown"] is True


def test_exercise_shows_task_dots_and_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    course.exercise("mla.5")
    assert "●●● · 9 minutes" in capsys.readouterr().out


def test_progress_counts(capsys: pytest.CaptureFixture[str]) -> None:
    course.check("start.1", find("start.1").solution)
    course.check("start.2", lambda *a: 3)
    record.learner().update("predictions", "start.p1", answer=3)
    capsys.readouterr()
    course.progress()
    out = capsys.readouterr().out
    assert f"1 of {len(ALL)} exercises solved, 1 tried" in out
    assert re.search(r"00_start_here .*1 of 3 solved +■◪□ +1", out)


@pytest.mark.parametrize("function", ["check", "hint", "solution", "exercise"])
def test_unknown_exercise(function: str) -> None:
    with pytest.raises(CourseError, match="there is no exercise 'mla.77'"):
        getattr(course, function)("mla.77")


# --- predictions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "actual", "expected"),
    [
        (None, "it grows", "No prediction made | What happened: it grows."),
        ("it grows", "it grows", "As you predicted | What happened: it grows."),
        ("it stays", "it grows", "Not as you predicted | You predicted: it stays. What happened: it grows."),
        (70, 68.6, "As you predicted | You predicted: 70 KiB. What happened: 68.6 KiB."),
        (686, 68.6, "Yours was 10 times too high."),
        (7, 70, "Yours was 10 times too low."),
        (0, 70, "The difference is 70."),
    ],
)
def test_reveal_compares(
    answer: object, actual: object, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if answer is not None:
        record.learner().update(
            "predictions", "mla.p1", answer=answer, unit="KiB" if answer != str(answer) else ""
        )
    course.reveal("mla.p1", actual)
    assert expected in capsys.readouterr().out


def test_reveal_of_a_time_is_not_compared_by_the_notebook_tests(capsys: pytest.CaptureFixture[str]) -> None:
    course.reveal("mla.p1", 12.3456, unit="ms", varies=True)
    assert capsys.readouterr().out == "measured | No prediction made. What happened: 12.35 ms.\n"


def test_predict_never_waits(capsys: pytest.CaptureFixture[str], progress_file: Path) -> None:
    course.predict("mla.p1", "Which?", options=["this", "that"])
    assert capsys.readouterr().out == "Predict | Which?\n  ( ) this\n  ( ) that\n"
    course.predict("mla.p2", "How many?", number=(1, 10_000, "KiB"))
    assert "a number: 1 to 10,000 KiB" in capsys.readouterr().out
    assert not progress_file.exists()


@pytest.mark.parametrize(
    ("key", "given", "expected"),
    [
        ("mla.1", {"options": ["a", "b"]}, "must look like"),
        ("mla.p1", {}, "either options"),
        ("mla.p1", {"options": ["a", "b"], "number": (1, 2)}, "either options"),
        ("mla.p1", {"options": ["a", "a"]}, "all different"),
        ("mla.p1", {"number": (2, 2)}, "expected low < high"),
    ],
)
def test_malformed_prediction(key: str, given: dict, expected: str) -> None:
    with pytest.raises(CourseError, match=expected):
        course.predict(key, "?", **given)


# --- the progress file ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"exercises": 3}', '{"exercises": {"mla.1": 3}}', "\xff", ""]
)
def test_an_unreadable_file_is_set_aside_not_lost(content: str, progress_file: Path) -> None:
    progress_file.parent.mkdir(parents=True)
    progress_file.write_text(content, encoding="latin-1")
    assert record.learner().update("exercises", "mla.1", state="right") == ""
    assert kept(progress_file)["exercises"] == {"mla.1": {"state": "right"}}
    aside = [path for path in progress_file.parent.iterdir() if "unreadable" in path.name]
    assert len(aside) == 1 and aside[0].read_text(encoding="latin-1") == content


def test_a_folder_that_cannot_be_written_is_said_and_the_lesson_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(record.VARIABLE, str(tmp_path / "file" / "progress.json"))
    course.check("mla.1", find("mla.1").solution)
    out = capsys.readouterr().out
    assert out.startswith("Right") and "Your progress could not be kept" in out


def test_a_failed_write_leaves_the_former_file(progress_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record.learner().update("exercises", "mla.1", state="right")
    before = progress_file.read_bytes()

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record.os, "fsync", full)
    assert "No space left" in record.learner().update("exercises", "mla.1", state="wrong")
    assert progress_file.read_bytes() == before
    assert [path.name for path in progress_file.parent.iterdir()] == [progress_file.name]


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {"HOME": "/h"}, "/h/.local/state/dsv3lib/progress.json"),
        ("linux", {"HOME": "/h", "XDG_STATE_HOME": "/s"}, "/s/dsv3lib/progress.json"),
        ("darwin", {"HOME": "/h"}, "/h/Library/Application Support/dsv3lib/progress.json"),
        ("win32", {"USERPROFILE": "/h", "LOCALAPPDATA": "/l"}, "/l/dsv3lib/progress.json"),
        ("linux", {"HOME": "/h", "DSV3_PROGRESS": "/x/p.json"}, "/x/p.json"),
    ],
)
def test_where_progress_is_kept(platform: str, environment: dict, expected: str) -> None:
    assert record.progress_path(environment, platform) == Path(expected)


# --- set-up, cards, waiting ----------------------------------------------------------------------------------


def test_setup_seeds_everything_and_prints_the_same_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    def draw() -> tuple:
        session = course.setup(seed=11, notebook="01_mla_latent_cache", device="cpu")
        own = torch.rand(1, generator=session.generator).item()
        return random.random(), numpy.random.rand(), torch.rand(1).item(), own, session.device

    assert draw() == draw()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "01_mla_latent_cache · seed 11"
    assert all(line.startswith("measured | ") for line in lines[1:2])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"seed": 1, "notebook": "99_none"}, "no lesson '99_none'"),
        ({"seed": 1, "device": "abacus"}, "device: 'abacus' cannot be used"),
    ],
)
def test_setup_refuses(given: dict, expected: str) -> None:
    with pytest.raises(CourseError, match=expected):
        course.setup(**given)


def test_setup_without_the_gpu_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CourseError, match="there is no CUDA GPU here"):
        course.setup(seed=1, device="cuda")


def test_what_is_measured_is_replaced_before_the_notebook_tests_compare(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[tuple[str, str]] = []
    monkeypatch.setattr(card, "show", lambda html_text, plain, view=None: shown.append((html_text, plain)))
    card.measured("12.3 ms\na second line")
    card.measured("a <b> & `99.9` ms")
    for html_text, plain in shown:
        assert clean(html_text) == "MEASURED"
        assert clean(plain) == "MEASURED", "however many lines a measurement has"
    assert clean("the loss is 3.2") == "the loss is 3.2"


def test_progress_is_replaced_too(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[str, str]] = []
    monkeypatch.setattr(card, "show", lambda html_text, plain, view=None: shown.append((html_text, plain)))
    course.progress()
    course.check("start.1", find("start.1").solution)
    course.progress()
    (html_before, before), _, (html_after, after) = shown
    assert before != after and clean(before) == clean(after) == "PROGRESS"
    assert html_before != html_after and clean(html_before) == clean(html_after)


def clean(text: str) -> str:
    """A text as nbval sees it."""
    for pattern, replacement in get_sanitize_patterns(SANITIZE.read_text()):
        text = re.sub(pattern, replacement, text)
    return text


@given(st.text())
def test_no_text_breaks_out_of_a_card(text: str) -> None:
    bare = re.sub(
        r"</?(?:p|code|div|strong)\b[^>]*>", "", card.card("bad", text, card.words(text), card.code(text))
    )
    assert "<" not in bare


def test_bar_counts_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with course.bar("training", total=3) as step:
        for _ in range(3):
            step(note="loss 2.0")
    err = capsys.readouterr().err
    assert "3/3" in err and err.endswith("done\n")
    with pytest.raises(RuntimeError), course.bar("training", total=3) as step:
        step()
        raise RuntimeError
    assert capsys.readouterr().err.endswith("stopped\n")
    with pytest.raises(CourseError, match="0 steps"), course.bar("nothing", total=0):
        pass


def test_public_names_load_when_asked_for() -> None:
    assert all(callable(getattr(course, name)) for name in course.__all__)
    with pytest.raises(AttributeError, match="no attribute 'teach'"):
        course.teach  # noqa: B018


# --- the idea is the learner's; what goes on is right ---------------------------------------------------------


def test_check_returns_what_later_cells_use(capsys: pytest.CaptureFixture[str]) -> None:
    reference = find("mla.1").solution

    def own(h, W_DKV, W_KR, norm, rope):
        return torch.hstack([norm(h @ W_DKV.T), rope(h @ W_KR.T)])

    assert course.check("mla.1", own) is own
    assert "reference meanwhile" not in capsys.readouterr().out
    for not_yet in (None, lambda *a: 1, lambda *a: 1 / 0):
        assert course.check("mla.1", not_yet) is reference
        assert "The cells below go on with the reference meanwhile." in capsys.readouterr().out


def test_a_right_answer_stands_beside_the_reference_and_an_open_one_folds_it(tmp_path: Path) -> None:
    from dsv3lib.course import answer

    module = lesson_module(tmp_path, "def compress(h, a, b, n, r):\n    return n(h @ a.T)  # mine\n")
    beside = answer._beside(find("mla.1"), module.compress)
    assert beside.index("# mine") < beside.index("the reference") < beside.index("def compress(h, W_DKV")
    assert "<details" not in beside
    assert "<details style" in answer._reference(find("mla.1"), is_open=False), "folded on the page"


def test_exercise_shows_specification_and_picture(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from dsv3lib.course import answer
    from dsv3lib.viz.layer_map import layer_map

    one = replace(find("mla.1"), spec=(("kv_rank", "int", "width of the latent"),), picture=layer_map)
    monkeypatch.setattr(answer, "find", lambda key: one)
    course.exercise("mla.1")
    out = capsys.readouterr().out
    assert "  kv_rank: int: width of the latent" in out and "Figure: A row of boxes" in out


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
