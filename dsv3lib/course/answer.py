"""The learner's side of an exercise: its task, the check, hints one at a time, the folded solution."""

from __future__ import annotations

from typing import Any

from dsv3lib.course import card
from dsv3lib.course.exercises import find
from dsv3lib.course.judge import Verdict, judge
from dsv3lib.course.record import learner
from dsv3lib.course.task import Exercise

_TITLES = {"right": "Right", "wrong": "Not yet", "open": "Open"}
_TONES = {"right": "good", "wrong": "bad", "open": "open"}


def exercise(key: str) -> None:
    """Display the task of an exercise: title, difficulty in dots, minutes, what to write."""
    asked = find(key)
    title = f"Exercise {asked.id} · {asked.title}"
    effort = f"{asked.rating} · {asked.minutes} minutes"
    body = card.card("plain", title, card.words(effort), card.words(asked.prompt))
    card.show(body, f"{title} | {effort}\n{asked.prompt}")


def check(key: str, answer: Any = None) -> None:
    """Judge an answer by what it does, say in words what is wrong, and offer a hint and the solution.

    Never raises for anything the answer does. An answer that is not there yet (None, ``...``, an empty
    body) is shown as open.

    Args:
        key: the exercise, as in ``"mla.1"``.
        answer: the learner's function, not called.

    Raises:
        CourseError: there is no such exercise.
    """
    asked = find(key)
    verdict = judge(asked, answer)
    trouble = _keep(asked, verdict)
    html_text, plain = _verdict_card(asked, verdict, trouble)
    card.show(html_text, plain, _widget(asked, html_text, verdict.state))


def hint(key: str) -> None:
    """Display the next hint of an exercise; when all have been given, display them all."""
    asked = find(key)
    given = _next_hint(asked)
    plain = "\n".join(_hint_line(asked, number) for number in range(given))
    card.show(_hint_card(asked, given), plain)


def solution(key: str) -> None:
    """Display the solution of an exercise, folded: Tab to it, Enter unfolds it."""
    asked = find(key)
    _mark_shown(asked)
    title = f"Exercise {asked.id}, solution"
    card.show(_solution_card(asked, is_open=False), f"{title}\n{asked.solution_source()}")


def _verdict_card(asked: Exercise, verdict: Verdict, trouble: str) -> tuple[str, str]:
    title = f"{_TITLES[verdict.state]} · exercise {asked.id} · {asked.title}"
    blocks = [card.words(verdict.text)]
    plain = [f"{title} | {verdict.text}"]
    if verdict.line:
        blocks.append(card.words("It happened here:") + card.code(verdict.line))
        plain.append(f"It happened here: {verdict.line}")
    if verdict.printed:
        blocks.append(card.words("Your function printed:") + card.code(verdict.printed))
        plain.append(f"Your function printed: {verdict.printed}")
    if trouble:
        blocks.append(card.words(trouble))
        plain.append(trouble)
    return card.card(_TONES[verdict.state], title, *blocks), "\n".join(plain)


def _keep(asked: Exercise, verdict: Verdict) -> str:
    """Keep the outcome; a right answer stays right, whatever is tried after it."""
    record = learner()
    entry = record.entry("exercises", asked.id)
    if verdict.state == "open":
        return ""
    solved = verdict.state == "right" or entry.get("state") == "right"
    return record.update(
        "exercises", asked.id, state="right" if solved else "wrong", tries=int(entry.get("tries", 0)) + 1
    )


def _next_hint(asked: Exercise) -> int:
    record = learner()
    given = min(int(record.entry("exercises", asked.id).get("hints", 0)) + 1, len(asked.hints))
    record.update("exercises", asked.id, hints=given)
    return given


def _mark_shown(asked: Exercise) -> None:
    learner().update("exercises", asked.id, solution_shown=True)


def _hint_line(asked: Exercise, number: int) -> str:
    return f"Hint {number + 1} of {len(asked.hints)} | {asked.hints[number]}"


def _hint_card(asked: Exercise, given: int) -> str:
    lines = "".join(card.words(_hint_line(asked, number).replace(" | ", ": ")) for number in range(given))
    return card.card("plain", f"Exercise {asked.id}", lines)


def _solution_card(asked: Exercise, is_open: bool) -> str:
    folded = card.fold("Solution (yours may differ)", card.code(asked.solution_source()), is_open=is_open)
    return card.card("plain", f"Exercise {asked.id}", folded)


def _widget(asked: Exercise, verdict_html: str, state: str) -> dict[str, Any]:
    import ipywidgets

    hint_button = ipywidgets.Button(description="Hint", tooltip=f"Show the next hint for exercise {asked.id}")
    solution_button = ipywidgets.Button(
        description="Solution", tooltip=f"Show a solution of exercise {asked.id}"
    )
    hints, solved = ipywidgets.HTML(), ipywidgets.HTML()

    def on_hint(_button: Any) -> None:
        given = _next_hint(asked)
        hints.value = _hint_card(asked, given)
        if given == len(asked.hints):
            hint_button.description, hint_button.disabled = "No more hints", True

    def on_solution(_button: Any) -> None:
        _mark_shown(asked)
        solved.value = _solution_card(asked, is_open=True)

    hint_button.on_click(on_hint)
    solution_button.on_click(on_solution)
    buttons = [solution_button] if state == "right" else [hint_button, solution_button]
    box = ipywidgets.VBox([ipywidgets.HTML(verdict_html), ipywidgets.HBox(buttons), hints, solved])
    box.add_class("dsv3-check")
    return card.view_of(box)
