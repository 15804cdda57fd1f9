"""One palette and one grammar for every figure of the course.

A colour always means the same thing, in every notebook::

    content              the part of a query, key or value that carries no position
    rope                 the part that carries the position (64 dims in V3)
    latent               what is cached: the joint compression of keys and values
    bias                 the routing bias and everything that balances
    forward              a forward pass
    backward-input       the part of a backward pass that makes the gradient of the input
    backward-weight      the part that makes the gradient of the weights
    communication        data on its way between devices
    neutral              anything else: a rival, a reference, a grid

The colours are told apart by readers who see no red or no green, and they are spaced in lightness so that
a grey print keeps them apart. Where two bars touch, the hatch of the meaning helps; where two lines
cross, its dash and marker do.

How a figure is made and shown::

    from dsv3lib.viz import style

    fig, ax = style.figure(title="Cache per token", xlabel="context (tokens)", ylabel="cache (MiB)")
    ax.plot(x, y, **style.line("latent"), label="MLA")
    ax.bar(names, sizes, **style.bar("rope"))
    style.show(
        fig,
        alt="Two straight lines that start at 0; the one labelled MLA stays close to the axis.",
        caption="Both grow with the context. What differs is the slope: one latent a token, or all heads' keys.",
    )

The caption is for eyes: what to look at, and what follows from it. The alt text is for readers who do not see the
picture: what is where. Each does its own work, so neither repeats the other.
"""

from __future__ import annotations

import base64
import html
import io
from types import MappingProxyType
from typing import Any

import matplotlib
import numpy
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from dsv3lib.errors import CourseError

PALETTE = MappingProxyType(
    {
        "latent": "#27297d",
        "backward-weight": "#871f22",
        "content": "#0362a0",
        "backward-input": "#cc3b1b",
        "bias": "#cb589b",
        "forward": "#15a987",
        "rope": "#f1971b",
        "communication": "#bac5ce",
        "neutral": "#6b6b6b",
    }
)
"""Meaning → colour, from dark to light (neutral apart)."""

HATCHES = MappingProxyType(
    {
        "latent": "",
        "backward-weight": "xx",
        "content": "//",
        "backward-input": "\\\\",
        "bias": "..",
        "forward": "--",
        "rope": "||",
        "communication": "oo",
        "neutral": "++",
    }
)
"""Meaning → hatch, for areas that touch."""

STROKES = MappingProxyType(
    {
        "latent": ("-", "o"),
        "backward-weight": ((0, (5, 1, 1, 1, 1, 1)), "X"),
        "content": ((0, (6, 2)), "s"),
        "backward-input": ((0, (3, 1, 1, 1)), "v"),
        "bias": ((0, (1, 1)), "D"),
        "forward": ((0, (8, 2, 2, 2)), "^"),
        "rope": ((0, (4, 1)), "P"),
        "communication": ((0, (2, 2)), "h"),
        "neutral": ((0, (1, 2)), "."),
    }
)
"""Meaning → (dash, marker), for lines."""

PAPER = "#fdfcf8"
"""Background of every figure: opaque, so that a dark theme does not show through."""

INK = "#1d1d1f"
"""Text, axes and edges: 16:1 on PAPER."""

SEQUENTIAL = "cividis"
"""Colour map for amounts: monotone in lightness, and made for colour-blind readers."""

DIVERGING = "RdBu_r"
"""Colour map for signed values around zero; use with a symmetric range."""

_WIDTH_INCHES = 7.2
_HEIGHT_INCHES = 4.0
_SCREEN_DPI = 100
"""Pixels of the page an inch of figure takes."""
_PIXEL_DPI = 150
"""Pixels of the picture an inch holds: more, so that it stays sharp on a fine screen."""
_PNG_EFFORT = 6
"""zlib's level: a widget that redraws gains nothing from less, the committed notebooks lose."""


def meanings() -> tuple[str, ...]:
    """Return the names of the palette, dark to light."""
    return tuple(PALETTE)


def colour(meaning: str) -> str:
    """Return the colour of a meaning as ``#rrggbb``.

    Raises:
        CourseError: the palette has no such meaning.
    """
    if meaning not in PALETTE:
        raise CourseError(f"the palette has no meaning {meaning!r}; it has {', '.join(PALETTE)}")
    return PALETTE[meaning]


def line(meaning: str) -> dict[str, Any]:
    """Return the keyword arguments that ``Axes.plot`` needs to draw a line of this meaning."""
    ink, (dash, marker) = colour(meaning), STROKES[meaning]
    return {"color": ink, "linestyle": dash, "marker": marker}


def bar(meaning: str) -> dict[str, Any]:
    """Return the keyword arguments that ``Axes.bar`` (or a patch) needs to fill an area of this meaning."""
    fill, hatch = colour(meaning), HATCHES[meaning]
    return {"facecolor": fill, "hatch": hatch, "edgecolor": INK, "linewidth": 0.6}


def ink_on(meaning: str) -> str:
    """Return the colour of text that is legible on an area of this meaning."""
    red, green, blue = (int(colour(meaning)[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return "#ffffff" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.45 else INK


def rc() -> dict[str, Any]:
    """Return the matplotlib settings of the course: sizes, fonts that every installation has, colours."""
    return {
        "figure.figsize": (_WIDTH_INCHES, _HEIGHT_INCHES),
        "figure.dpi": _SCREEN_DPI,
        "savefig.dpi": _PIXEL_DPI,
        "figure.facecolor": PAPER,
        "savefig.facecolor": PAPER,
        "axes.facecolor": PAPER,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.monospace": ["DejaVu Sans Mono"],
        "mathtext.fontset": "dejavusans",
        "font.size": 11,
        "axes.titlesize": 13,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 10,
        "axes.labelsize": 11,
        "legend.fontsize": 10,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#d9d6cd",
        "grid.linewidth": 0.7,
        "lines.linewidth": 2.0,
        "lines.markersize": 6,
        "hatch.linewidth": 0.6,
        "image.cmap": SEQUENTIAL,
        "axes.prop_cycle": matplotlib.cycler(color=list(PALETTE.values())),
    }


def use() -> None:
    """Make the course's settings matplotlib's own, for figures that are drawn without :func:`figure`."""
    matplotlib.rcParams.update(rc())


def figure(
    title: str,
    xlabel: str | None,
    ylabel: str | None,
    *,
    rows: int = 1,
    columns: int = 1,
    size: tuple[float, float] | None = None,
    **subplot_options: Any,
) -> tuple[Figure, Any]:
    """Return a figure that keeps the grammar: a title, and a label with its unit on each axis.

    The figure belongs to nobody but the caller: pyplot does not know it, so nothing is shown twice and
    nothing leaks when a slider draws a thousand of them.

    Args:
        title: what the reader should see, as a short sentence.
        xlabel, ylabel: quantity and unit, as in ``"context (tokens)"``; None only where the axis has no
            quantity (names of things), and where each panel gets its own label.
        rows, columns: panels; with more than one, the axes come as a numpy array and the title is above all.
        size: width and height in inches.
        subplot_options: handed to ``Figure.subplots`` (``sharex``, ``width_ratios``, …).

    Returns:
        The figure and its axes.

    Raises:
        CourseError: the title is empty.
    """
    if not title.strip():
        raise CourseError("a figure needs a title: say in a short sentence what the reader should see")
    with matplotlib.rc_context(rc()):
        fig = Figure(figsize=size or (_WIDTH_INCHES, _HEIGHT_INCHES), layout="constrained")
        FigureCanvasAgg(fig)
        axes = fig.subplots(rows, columns, **subplot_options)
        panels = [axes] if isinstance(axes, Axes) else list(axes.flat)
        for ax in panels:
            ax.set(xlabel=xlabel or "", ylabel=ylabel or "")
        if len(panels) == 1:
            panels[0].set_title(title)
        else:
            fig.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    return fig, axes


def png(fig: Figure, dpi: int = _PIXEL_DPI) -> bytes:
    """Return the figure as PNG bytes, opaque, drawn with the course's settings.

    Drawing the canvas once and encoding it is a fifth faster than ``savefig``, which lays out twice.
    """
    with matplotlib.rc_context(rc()):
        fig.set_dpi(dpi)
        canvas = FigureCanvasAgg(fig)
        canvas.draw()
    buffer = io.BytesIO()
    pixels = numpy.asarray(canvas.buffer_rgba())[..., :3]
    Image.fromarray(numpy.ascontiguousarray(pixels)).save(buffer, "PNG", compress_level=_PNG_EFFORT)
    return buffer.getvalue()


def image_tag(fig: Figure, alt: str, dpi: int = _SCREEN_DPI) -> str:
    """Return the figure as an HTML ``<img>`` with its alt text."""
    data = base64.b64encode(png(fig, dpi)).decode("ascii")
    return (
        f'<img alt="{html.escape(_stated(alt), quote=True)}" src="data:image/png;base64,{data}" '
        f'width="{_shown_width(fig)}" style="max-width:100%;height:auto">'
    )


def caption_tag(caption: str) -> str:
    """Return a caption as HTML: the sentence under a picture."""
    return (
        '<figcaption class="dsv3-caption" style="margin:.2em 0 .6em 0;max-width:46em;text-align:left">'
        f"{html.escape(caption, quote=False)}</figcaption>"
    )


def bundle(fig: Figure, alt: str, caption: str = "") -> dict[str, str]:
    """Return the figure as Jupyter's data: HTML with the picture, its alt text and its caption, and the words.

    The picture goes as HTML and not as ``image/png`` because JupyterLab and the export to HTML drop the alt text
    of the latter, whatever its metadata say.
    """
    under = caption_tag(caption) if caption else ""
    picture = image_tag(fig, alt, _PIXEL_DPI)
    words = f"Figure: {alt}" + (f"\n{caption}" if caption else "")
    return {
        "text/html": f'<figure class="dsv3-figure" style="margin:0">{picture}{under}</figure>',
        "text/plain": words,
    }


def show(fig: Figure, alt: str, caption: str = "") -> None:
    """Display the figure with its alt text and its caption, on a page without a kernel too.

    What a function of ``viz`` returns is handed on with a star: ``style.show(*layer_map(lit))``.

    Args:
        fig: from :func:`figure`.
        alt: what the picture shows, in one or two sentences that a reader who cannot see it can use. Name
            shapes and order, not measured values: the sentence is compared when the notebook is tested.
        caption: for eyes: what to look at, and what follows from it.

    Raises:
        CourseError: the alt text is empty, or the caption only repeats it.
    """
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.display import display

    if caption and caption.strip() == alt.strip():
        raise CourseError("the caption repeats the alt text: say in it what to look at and what follows")
    if not InteractiveShell.initialized():  # a plain Python session shows no pictures
        print("\n".join(part for part in (f"Figure: {_stated(alt)}", caption) if part))
        return
    display(bundle(fig, alt, caption), raw=True)


def _shown_width(fig: Figure) -> int:
    return round(fig.get_figwidth() * _SCREEN_DPI)


def _stated(alt: str) -> str:
    if not alt.strip():
        raise CourseError("a figure needs an alt text: say what it shows to a reader who cannot see it")
    return alt
