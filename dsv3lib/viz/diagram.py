"""Diagrams of data flow: boxes, arrows and strips of real numbers, in the palette's fixed meanings.

    d = diagram("From the stream to the cache", width=9, height=3)
    h = d.box(0.2, 1, "h_t", "[7168]")
    c = d.box(3, 1, "c_t^{KV}", "[512]", meaning="latent", kept=True)
    d.arrow(h, c, "W^{DKV}")
    d.numbers(3, 0.3, [0.12, -0.4, 0.9], meaning="latent")
    style.show(*d.done(alt="…", caption="…"))

One unit is one inch of the picture, y goes upwards. A box with a doubled edge is kept from token to token. A word
with `_`, `^` or `\\` in it is set as mathematics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from dsv3lib.errors import CourseError
from dsv3lib.viz import style

Number = int | float

_BOX = (1.3, 0.62)
_ROUNDING = 0.06
_KEPT_GAP = 0.05
_STRIP_CELL = (0.46, 0.3)


@dataclass(frozen=True)
class Box:
    """Where a box lies: its lower left corner, its width and height."""

    x: Number
    y: Number
    width: Number
    height: Number

    @property
    def centre(self) -> tuple[Number, Number]:
        """The middle of the box."""
        return self.x + self.width / 2, self.y + self.height / 2

    def edge(self, towards: tuple[Number, Number]) -> tuple[Number, Number]:
        """The point where a line from the centre towards another point leaves the box."""
        (cx, cy), (tx, ty) = self.centre, towards
        dx, dy = tx - cx, ty - cy
        reach = [abs(half / d) for half, d in ((self.width / 2, dx), (self.height / 2, dy)) if d]
        share = min([*reach, 1.0])
        return cx + share * dx, cy + share * dy


@dataclass
class Diagram:
    """A drawing under way; :func:`diagram` begins it, :meth:`done` ends it."""

    figure: Figure
    axes: Axes
    _boxes: list[Box] = field(default_factory=list)

    def box(
        self,
        x: Number,
        y: Number,
        text: str,
        size: str = "",
        *,
        meaning: str | None = None,
        kept: bool = False,
        lit: bool = True,
        w: Number = _BOX[0],
        h: Number = _BOX[1],
    ) -> Box:
        """Draw a box and return it, for arrows.

        Args:
            x, y: its lower left corner, in inches.
            text: what it is. size: a second, smaller line, such as its shape.
            meaning: the palette's name for what it holds, or None for a plain box.
            kept: True for what is kept from token to token (the cache): a doubled edge.
            lit: False draws it faint, as context.
            w, h: its width and height, in inches.
        """
        fill = style.colour(meaning) if meaning and lit else style.PAPER
        ink = style.ink_on(meaning) if meaning and lit else (style.INK if lit else _FAINT)
        edge = style.INK if lit else _FAINT
        outer = f"round,pad=0,rounding_size={_ROUNDING}"
        self.axes.add_patch(
            FancyBboxPatch((x, y), w, h, outer, facecolor=fill, edgecolor=edge, linewidth=1.1)
        )
        if kept:
            gap = _KEPT_GAP
            around = (x - gap, y - gap), w + 2 * gap, h + 2 * gap
            self.axes.add_patch(
                FancyBboxPatch(*around, outer, facecolor="none", edgecolor=edge, linewidth=1.1)
            )
        cx, cy = x + w / 2, y + h / 2
        raised = 0.13 if size else 0.0
        self.axes.text(cx, cy + raised, _set(text), ha="center", va="center", color=ink, fontsize=11)
        if size:
            self.axes.text(cx, cy - 0.15, _set(size), ha="center", va="center", color=ink, fontsize=8.5)
        made = Box(x, y, w, h)
        self._boxes.append(made)
        return made

    def frame(
        self,
        x: Number,
        y: Number,
        w: Number,
        h: Number,
        title: str,
        *,
        meaning: str | None = None,
        lit: bool = True,
    ) -> Box:
        """Draw a frame around other boxes, with its title inside at the top; draw it before they are drawn."""
        ink = style.colour(meaning) if meaning else (style.INK if lit else _FAINT)
        outer = f"round,pad=0,rounding_size={_ROUNDING}"
        wide = 2.4 if meaning else 0.9
        self.axes.add_patch(
            FancyBboxPatch((x, y), w, h, outer, facecolor="none", edgecolor=ink, linewidth=wide)
        )
        weight = "bold" if meaning else "normal"
        self.axes.text(x + 0.1, y + h - 0.16, title, va="center", color=ink, fontsize=9, fontweight=weight)
        made = Box(x, y, w, h)
        self._boxes.append(made)
        return made

    def arrow(
        self,
        start: Box | tuple[Number, Number],
        end: Box | tuple[Number, Number],
        label: str = "",
        *,
        meaning: str | None = None,
        bend: Number = 0.0,
        lit: bool = True,
        at: tuple[Number, Number] | None = None,
    ) -> None:
        """Draw an arrow between boxes or points.

        Args:
            start, end: boxes, or points in inches.
            label: words beside its middle. at: where they go instead, in inches.
            meaning: the palette's name for what travels. bend: 0 is straight; the sign gives the side.
            lit: False draws it faint.
        """
        first = start.centre if isinstance(start, Box) else start
        last = end.centre if isinstance(end, Box) else end
        a = start.edge(last) if isinstance(start, Box) else start
        b = end.edge(first) if isinstance(end, Box) else end
        ink = (style.colour(meaning) if meaning else style.INK) if lit else _FAINT
        self.axes.add_patch(
            FancyArrowPatch(
                a, b, arrowstyle="-|>", mutation_scale=11, shrinkA=1, shrinkB=2, color=ink,
                linewidth=1.6 if meaning else 1.1, connectionstyle=f"arc3,rad={bend}",
            )
        )  # fmt: skip
        if label:
            x, y = at or ((a[0] + b[0]) / 2, (a[1] + b[1]) / 2 + 0.13)
            paper = {"facecolor": style.PAPER, "edgecolor": "none", "pad": 1}
            self.axes.text(x, y, _set(label), ha="center", va="center", color=ink, fontsize=9, bbox=paper)

    def numbers(
        self,
        x: Number,
        y: Number,
        values: Sequence[Number],
        *,
        meaning: str | None = None,
        lit: Sequence[bool] | None = None,
        form: str = "{:.2f}",
        more: bool = False,
    ) -> Box:
        """Draw a strip of cells with the real values of one worked token; return its place.

        Args:
            x, y: lower left corner. values: what stands in the cells.
            meaning: the palette's name for what they are. lit: which cells are coloured (all, by default).
            form: how a value is written. more: True draws dots behind the last cell: there are further ones.
        """
        wide, high = _STRIP_CELL
        for number, value in enumerate(values):
            on = meaning is not None and (lit is None or lit[number])
            fill, ink = (style.colour(meaning), style.ink_on(meaning)) if on else (style.PAPER, style.INK)
            left = x + number * wide
            self.axes.add_patch(
                Rectangle((left, y), wide, high, facecolor=fill, edgecolor=style.INK, linewidth=0.6)
            )
            words = form.format(value).replace("-", "−")
            self.axes.text(
                left + wide / 2, y + high / 2, words, ha="center", va="center", color=ink, fontsize=8
            )
        if more:
            self.axes.text(x + len(values) * wide + 0.08, y + high / 2, "…", va="center", fontsize=10)
        return Box(x, y, len(values) * wide, high)

    def note(
        self,
        x: Number,
        y: Number,
        text: str,
        *,
        size: Number = 9.5,
        centred: bool = False,
        meaning: str | None = None,
    ) -> None:
        """Write words, from a point to the right or around it; a meaning underlays them with its colour."""
        where = "center" if centred else "left"
        ink = style.ink_on(meaning) if meaning else style.INK
        under = {"facecolor": style.colour(meaning), "edgecolor": "none", "pad": 2.5} if meaning else None
        self.axes.text(x, y, _set(text), ha=where, va="center", color=ink, fontsize=size, bbox=under)

    def done(self, alt: str, caption: str = "") -> tuple[Figure, str, str]:
        """Return the figure, its alt text and its caption, as ``style.show`` takes them.

        Raises:
            CourseError: nothing was drawn.
        """
        if not self._boxes:
            raise CourseError("the diagram has no box: nothing was drawn")
        return self.figure, alt, caption


_FAINT = "#8b887f"
"""Context: legible, and plainly not what is meant."""


def diagram(title: str, width: Number = 9.0, height: Number = 3.0) -> Diagram:
    """Begin a drawing.

    Args:
        title: what the reader should see. width, height: of the drawing, in inches.

    Raises:
        CourseError: the title is empty.
    """
    fig, ax = style.figure(title, None, None, size=(float(width), height + 0.4))
    with matplotlib.rc_context(style.rc()):
        ax.set(xlim=(0, width), ylim=(0, height), aspect="equal")
        ax.axis("off")
    return Diagram(fig, ax)


def _set(text: str) -> str:
    """Words as matplotlib sets them: mathematics where there is an index, a power or a command."""
    mathematical = any(mark in text for mark in "_^\\") and "$" not in text
    return f"${text}$" if mathematical else text
