"""A figure that moves with sliders: the static picture first, then the widget around it.

    from dsv3lib.viz.live import live

    def draw(tokens):                       # returns (figure, alt text) or (figure, alt text, caption)
        fig, ax = style.figure(...)
        return fig, f"...", f"..."

    live(draw, tokens=range(0, 4097, 256), start={"tokens": 1024})

A page without a kernel keeps the picture at its start; with a kernel the slider redraws it. Sliders are
moved with the arrow keys once they have the focus (Tab).
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets
from matplotlib.figure import Figure

from dsv3lib.errors import CourseError
from dsv3lib.viz import style


def live(
    draw: Callable[..., tuple[Figure, str] | tuple[Figure, str, str]],
    /,
    *,
    start: Mapping[str, Any] | None = None,
    labels: Mapping[str, str] | None = None,
    **choices: Sequence[Any],
) -> None:
    """Display ``draw(...)`` as a static figure and, where there is a kernel, with one slider a choice.

    Args:
        draw: takes one keyword argument a choice and returns the figure, its alt text and, if it has one, its
            caption; in under 200 ms.
        start: the value of each choice in the static figure (by default its first).
        labels: what stands beside each slider (by default the choice's name).
        choices: name → the values that the slider steps through, in order.

    Raises:
        CourseError: a choice has no value, or its start is not one of its values.
    """
    from IPython.display import display

    values = {name: list(options) for name, options in choices.items()}
    first = {name: _start(name, options, start or {}) for name, options in values.items()}
    fig, alt, *said = draw(**first)
    data = style.bundle(fig, alt, *said)
    sliders = {
        name: ipywidgets.SelectionSlider(
            options=[(str(option), i) for i, option in enumerate(options)],
            index=options.index(first[name]),
            description=(labels or {}).get(name, name),
            continuous_update=True,
            style={"description_width": "initial"},
            layout=ipywidgets.Layout(width="32em", max_width="95%"),
        )
        for name, options in values.items()
    }
    picture = ipywidgets.HTML(style.image_tag(fig, alt))
    sentence = ipywidgets.HTML(_sentence(*said or [alt]))

    def redraw(_change: Any) -> None:
        now = {name: values[name][slider.value] for name, slider in sliders.items()}
        try:
            new_fig, new_alt, *new_said = draw(**now)
            picture.value, sentence.value = (
                style.image_tag(new_fig, new_alt),
                _sentence(*new_said or [new_alt]),
            )
        except Exception as error:  # a slider must say what went wrong, not fall silent
            sentence.value = _sentence(f"This setting cannot be drawn: {type(error).__name__}: {error}")

    for slider in sliders.values():
        slider.observe(redraw, names="value")
    box = ipywidgets.VBox([*sliders.values(), picture, sentence])
    box.add_class("dsv3-live")
    view = box._repr_mimebundle_()["application/vnd.jupyter.widget-view+json"]
    display({**data, "application/vnd.jupyter.widget-view+json": view}, raw=True)


def _sentence(words: str) -> str:
    return f'<div class="dsv3-caption" role="status" style="max-width:46em">{html.escape(words)}</div>'


def _start(name: str, options: list[Any], start: Mapping[str, Any]) -> Any:
    if not options:
        raise CourseError(f"the choice {name!r} of a live figure has no values")
    value = start.get(name, options[0])
    if value not in options:
        raise CourseError(f"the choice {name!r} starts at {value!r}, not one of its {len(options)} values")
    return value
