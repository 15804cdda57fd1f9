"""Diagrams and the small map: what is lit is in colour, and everything stays on the paper."""

from __future__ import annotations

import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import FancyBboxPatch

from dsv3lib.course.syllabus import LESSONS
from dsv3lib.errors import CourseError
from dsv3lib.viz import style
from dsv3lib.viz.diagram import Box, diagram
from dsv3lib.viz.layer_map import PARTS, layer_map


def colours(figure: object) -> set[str]:
    patches = [p for p in figure.axes[0].patches if isinstance(p, FancyBboxPatch)]
    return {to_hex(p.get_facecolor()) for p in patches} - {style.PAPER, "#000000"}


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda one: one.stem)
def test_each_lessons_map_lights_its_parts_and_stays_on_the_paper(lesson: object) -> None:
    figure, alt, caption = layer_map(lesson.lit)
    for name in lesson.lit:
        assert PARTS[name] in alt and PARTS[name] in caption
    style.png(figure)
    ax = figure.axes[0]
    frame = ax.get_window_extent()
    for text in ax.texts:
        box = text.get_window_extent()
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1 + 1 and frame.y0 - 1 <= box.y0, text.get_text()


def test_the_map_lights_what_it_is_told_and_nothing_else() -> None:
    assert colours(layer_map(["router"])[0]) == {style.colour("bias")}
    assert colours(layer_map([])[0]) == set()


def test_an_unknown_part_is_named() -> None:
    with pytest.raises(CourseError, match="no part 'rooter'; it has embedding"):
        layer_map(["rooter"])


def test_an_arrow_leaves_a_box_at_its_edge() -> None:
    box = Box(0, 0, 2, 1)
    assert box.edge((5, 0.5)) == (2, 0.5)
    assert box.edge((1, 9)) == (1, 1)
    x, y = box.edge((3, 1.5))
    assert (round(x, 6), round(y, 6)) == (2, 1), "through the corner"


def test_a_drawing_returns_what_show_takes() -> None:
    d = diagram("A way", 5, 2)
    with pytest.raises(CourseError, match="nothing was drawn"):
        d.done("x")
    a = d.box(0.2, 1, "h_t", "[7168]")
    b = d.box(3, 1, "c_t^{KV}", "[512]", meaning="latent", kept=True)
    d.arrow(a, b, "W^{DKV}", meaning="latent")
    strip = d.numbers(0.2, 0.2, [0.5, -1.25], meaning="latent", more=True)
    assert strip.width == pytest.approx(0.92)
    figure, alt, caption = d.done("Two boxes.", "Less is kept.")
    assert (alt, caption) == ("Two boxes.", "Less is kept.")
    words = [text.get_text() for text in figure.axes[0].texts]
    assert "$h_t$" in words and "[7168]" in words and "−1.25" in words
    style.png(figure)
