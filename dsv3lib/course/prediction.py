"""Predict, then run: the learner commits to an answer before the cell that shows it.

Neither function ever waits: *Run All* passes through, and a prediction that was not made is said so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dsv3lib.course import card
from dsv3lib.course.record import learner
from dsv3lib.errors import CourseError

Number = int | float


@dataclass(frozen=True)
class Question:
    """What :func:`predict` asks: options to choose from, or a number within bounds with its unit."""

    key: str
    text: str
    options: tuple[str, ...] = ()
    low: Number = 0
    high: Number = 0
    unit: str = ""

    def say(self, answer: Any) -> str:
        """Return an answer in words."""
        return str(answer) if self.options else f"{_number(answer)} {self.unit}".strip()


def predict(
    key: str,
    question: str,
    *,
    options: Sequence[str] | None = None,
    number: tuple[Number, Number] | tuple[Number, Number, str] | None = None,
) -> None:
    """Ask for a prediction: a button for each option, or a bounded number and a button that commits it.

    Args:
        key: ``"<lesson>.p<number>"``, as in ``"mla.p1"``; :func:`reveal` takes the same.
        question: one or two sentences.
        options: the answers to choose from (at least two, all different), or
        number: lowest and highest answer, and the unit.

    Raises:
        CourseError: the key is malformed, or neither or both kinds of answer are given.
    """
    asked = _question(key, question, options, number)
    kept = learner().entry("predictions", key).get("answer")
    choices = [f"  ( ) {option}" for option in asked.options] or [f"  a number: {_range(asked)}"]
    plain = "\n".join([f"Predict | {question}", *choices])
    lines = "".join(f"<li>{card.inline(option)}</li>" for option in asked.options)
    listed = f'<ul style="margin:.3em 0">{lines}</ul>' if lines else card.words(f"A number: {_range(asked)}.")
    static = card.card("plain", "Predict", card.words(question), listed)
    card.show(static, plain, _widget(asked, kept))


def reveal(
    key: str,
    actual: Any,
    *,
    because: str = "",
    unit: str = "",
    close: float = 0.1,
    varies: bool = False,
) -> None:
    """Compare what was predicted with what happened, in words.

    Args:
        key: that of the :func:`predict` before.
        actual: the right option (its text), or the number that came out.
        because: one sentence of why, shown whether the prediction was right or not.
        unit: the number's unit, for a learner who made no prediction.
        close: a number counts as right within this relative distance.
        varies: True if ``actual`` is a time or another figure that differs between runs.
    """
    entry = learner().entry("predictions", key)
    outcome = _number(actual) if _is_number(actual) else str(actual)
    if "answer" not in entry:
        tone, title = "open", "No prediction made"
        sentence = f"What happened: {f'{outcome} {unit}'.strip()}."
    else:
        tone, title, sentence = _compare(entry, actual, outcome, close)
    text = f"{sentence} {because}".strip()
    if varies:
        card.measured(f"{title}. {text}")
    else:
        card.show(card.card(tone, title, card.words(text)), f"{title} | {text}")


def _compare(entry: dict[str, Any], actual: Any, outcome: str, close: float) -> tuple[str, str, str]:
    answer, unit = entry["answer"], _unit(entry)
    both_numbers = _is_number(answer) and _is_number(actual)
    said = _number(answer) if _is_number(answer) else str(answer)
    start = f"You predicted: {said}{unit if both_numbers else ''}."
    end = f"What happened: {outcome}{unit if both_numbers else ''}."
    if not both_numbers:
        if said.strip() == outcome.strip():
            return "good", "As you predicted", end
        return "bad", "Not as you predicted", f"{start} {end}"
    if math.isclose(answer, actual, rel_tol=close):
        return "good", "As you predicted", f"{start} {end}"
    return "bad", "Not as you predicted", f"{start} {end} {_distance(answer, actual)}"


def _distance(answer: Number, actual: Number) -> str:
    if answer > 0 and actual > 0:
        ratio = answer / actual
        return (
            f"Yours was {ratio:.3g} times too high."
            if ratio > 1
            else f"Yours was {1 / ratio:.3g} times too low."
        )
    return f"The difference is {_number(abs(answer - actual))}."


def _question(key: str, text: str, options: Sequence[str] | None, number: Any) -> Question:
    lesson, _, rest = key.partition(".p")
    if not lesson.isidentifier() or not rest.isdigit():
        raise CourseError(f"prediction key {key!r} must look like 'mla.p1': a lesson, '.p', a number")
    if (options is None) == (number is None):
        raise CourseError(f"prediction {key}: give either options=[…] or number=(low, high, unit)")
    if options is not None:
        if len(set(options)) != len(options) or len(options) < 2:
            raise CourseError(
                f"prediction {key}: options must be at least two, all different; got {options!r}"
            )
        return Question(key, text, options=tuple(options))
    low, high, *rest_of = number
    if not low < high:
        raise CourseError(f"prediction {key}: number goes from {low} to {high}, expected low < high")
    return Question(key, text, low=low, high=high, unit=rest_of[0] if rest_of else "")


def _widget(asked: Question, kept: Any) -> dict[str, Any]:
    import ipywidgets

    head = ipywidgets.HTML(card.card("plain", "Predict", card.words(asked.text)))
    said = ipywidgets.HTML(_committed(asked, kept) if kept is not None else "")

    def commit(answer: Any) -> None:
        trouble = learner().update(
            "predictions", asked.key, answer=answer, unit=asked.unit, question=asked.text
        )
        said.value = card.words(trouble) if trouble else _committed(asked, answer)

    entry = _option_buttons(asked, kept, commit) if asked.options else _number_entry(asked, kept, commit)
    box = ipywidgets.VBox([head, entry, said])
    box.add_class("dsv3-predict")
    return card.view_of(box)


def _option_buttons(asked: Question, kept: Any, commit: Callable[[Any], None]) -> Any:
    """One button an option. Radio buttons would need the arrow keys, which JupyterLab keeps for itself."""
    import ipywidgets

    wide = {"width": "auto", "max_width": "46em", "min_width": "16em", "height": "auto"}
    buttons = {
        option: ipywidgets.Button(
            description=option, tooltip=f"Predict: {option}", layout=ipywidgets.Layout(**wide)
        )
        for option in asked.options
    }

    def mark(chosen: Any) -> None:
        for option, button in buttons.items():
            button.icon = "check" if option == chosen else ""
            button.button_style = "primary" if option == chosen else ""

    def choose(button: Any) -> None:
        mark(button.description)
        commit(button.description)

    for button in buttons.values():
        button.on_click(choose)
    mark(kept)
    return ipywidgets.VBox(list(buttons.values()), layout=ipywidgets.Layout(align_items="flex-start"))


def _number_entry(asked: Question, kept: Any, commit: Callable[[Any], None]) -> Any:
    import ipywidgets

    kind = ipywidgets.BoundedIntText if isinstance(asked.low, int) else ipywidgets.BoundedFloatText
    number = kind(
        value=kept if _is_number(kept) and asked.low <= kept <= asked.high else asked.low,
        min=asked.low,
        max=asked.high,
        description=asked.unit or "answer",
        style={"description_width": "initial"},
        layout=ipywidgets.Layout(width="16em"),
    )
    button = ipywidgets.Button(
        description="Commit", tooltip="Keep this prediction, then go on", button_style="primary"
    )
    button.on_click(lambda _button: commit(number.value))
    return ipywidgets.HBox([number, button])


def _committed(asked: Question, answer: Any) -> str:
    sentence = card.inline(f"Your prediction: {asked.say(answer)}. Now run the next cell.")
    return f'<span role="status">{sentence}</span>'


def _range(asked: Question) -> str:
    return f"{_number(asked.low)} to {_number(asked.high)} {asked.unit}".strip()


def _unit(entry: dict[str, Any]) -> str:
    return f" {entry['unit']}" if entry.get("unit") else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: Number) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
