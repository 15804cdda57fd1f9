"""The palette is told apart by eyes of every kind, in grey too; figures keep the grammar."""

from __future__ import annotations

import base64
import io
import re
from itertools import combinations

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dsv3lib.errors import CourseError
from dsv3lib.viz import style
from dsv3lib.viz.live import live

# Linear RGB → linear RGB as a reader without the cone sees it (Machado, Oliveira, Fernandes 2009, severity 1).
EYES = {
    "all cones": np.eye(3),
    "no green cone": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "no red cone": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
}
LEAST_DIFFERENCE = 12.0  # CIE 1976; about 2.3 is just noticeable side by side
LEAST_LIGHTNESS_STEP = 6.0  # L*, for a grey print
FAMILIES = (
    ("content", "rope", "latent", "bias"),
    ("forward", "backward-input", "backward-weight", "communication"),
)
LEAST_FAMILY_STEP = 12.0  # meanings that share a figure


def linear(colour: str) -> np.ndarray:
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    to_xyz = np.array(
        [
            [0.4124564, 0.3575761, 0.1804375],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339, 0.1191920, 0.9503041],
        ]
    )
    xyz = to_xyz @ np.clip(rgb, 0, 1) / np.array([0.95047, 1.0, 1.08883])
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(a: str, b: str) -> float:
    light = sorted((float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (a, b)), reverse=True)
    return (light[0] + 0.05) / (light[1] + 0.05)


def closest(colours: dict[str, str], eye: np.ndarray) -> tuple[float, str, str]:
    seen = {name: lab(eye @ linear(colour)) for name, colour in colours.items()}
    return min((float(np.linalg.norm(seen[a] - seen[b])), a, b) for a, b in combinations(seen, 2))


@pytest.mark.parametrize("eye", EYES)
def test_meanings_are_told_apart_by(eye: str) -> None:
    difference, first, second = closest(dict(style.PALETTE), EYES[eye])
    assert difference >= LEAST_DIFFERENCE, f"{first} and {second} are {difference:.1f} apart"


def test_the_measure_rejects_red_and_green_of_one_lightness() -> None:
    assert closest({"a": "#c44e52", "b": "#7b7d3e"}, EYES["no green cone"])[0] < LEAST_DIFFERENCE


def test_grey_print_keeps_meanings_apart_in_the_order_of_the_palette() -> None:
    lightness = {name: lab(linear(colour))[0] for name, colour in style.PALETTE.items() if name != "neutral"}
    values = list(lightness.values())
    assert values == sorted(values)
    assert min(b - a for a, b in zip(values, values[1:], strict=False)) >= LEAST_LIGHTNESS_STEP
    for family in FAMILIES:
        within = sorted(lightness[name] for name in family)
        assert min(b - a for a, b in zip(within, within[1:], strict=False)) >= LEAST_FAMILY_STEP


def test_every_meaning_has_a_hatch_a_dash_and_a_marker_of_its_own() -> None:
    assert set(style.HATCHES) == set(style.STROKES) == set(style.PALETTE)
    assert len(set(style.HATCHES.values())) == len(style.PALETTE)
    assert len({str(dash) for dash, _ in style.STROKES.values()}) == len(style.PALETTE)
    assert len({marker for _, marker in style.STROKES.values()}) == len(style.PALETTE)


@pytest.mark.parametrize("meaning", style.meanings())
def test_text_on_a_meaning_is_legible(meaning: str) -> None:
    assert contrast(style.ink_on(meaning), style.colour(meaning)) >= 3.5
    assert contrast(style.INK, style.PAPER) >= 12


def test_unknown_meaning_is_refused_with_the_list() -> None:
    for function in (style.colour, style.line, style.bar, style.ink_on):
        with pytest.raises(CourseError, match="'leather'.*latent"):
            function("leather")


def test_figure_keeps_the_grammar() -> None:
    fig, ax = style.figure("Cache grows", "context (tokens)", "cache (MiB)")
    assert ax.get_title(loc="left") == "Cache grows"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("context (tokens)", "cache (MiB)")
    fig, axes = style.figure("Two panels", None, "loss (nats)", columns=2, sharey=True)
    assert axes.shape == (2,) and fig.get_suptitle() == "Two panels"
    with pytest.raises(CourseError, match="title"):
        style.figure("  ", "x", "y")


def test_figures_do_not_pile_up_in_pyplot() -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    style.figure("One", "x", "y")
    assert plt.get_fignums() == before


def test_use_sets_fonts_that_exist() -> None:
    with matplotlib.rc_context():
        style.use()
        assert matplotlib.rcParams["font.sans-serif"] == ["DejaVu Sans"]
        matplotlib.font_manager.findfont("DejaVu Sans", fallback_to_default=False)


def test_picture_is_opaque_paper_to_its_edge() -> None:
    fig, _ = style.figure("One", "x", "y")
    picture = Image.open(io.BytesIO(style.png(fig)))
    assert picture.mode == "RGB"
    assert "#{:02x}{:02x}{:02x}".format(*picture.getpixel((0, 0))) == style.PAPER


@given(st.text(min_size=1).filter(str.strip))
def test_any_alt_text_stays_inside_its_attribute(alt: str) -> None:
    tag = style.image_tag(_tiny(), alt)
    assert tag.count("<") == tag.count(">") == 1 and tag.count('"') == 8


def _tiny() -> object:
    fig, ax = style.figure("t", None, None, size=(0.3, 0.3))
    ax.set_axis_off()
    fig.set_layout_engine("none")
    return fig


def test_bundle_holds_picture_and_alt_text() -> None:
    fig, _ = style.figure("One", "x", "y")
    data = style.bundle(fig, "An empty frame.", 'Nothing is drawn: "empty" & <small>.')
    picture = re.search(r'src="data:image/png;base64,([^"]+)"', data["text/html"])
    assert picture and base64.b64decode(picture.group(1)).startswith(b"\x89PNG")
    assert data["text/plain"] == 'Figure: An empty frame.\nNothing is drawn: "empty" & <small>.'
    assert 'alt="An empty frame."' in data["text/html"] and "&lt;small&gt;.</figcaption>" in data["text/html"]


@pytest.mark.parametrize("function", [style.bundle, style.image_tag, style.show])
def test_a_figure_without_alt_text_is_refused(function: object) -> None:
    fig, _ = style.figure("One", "x", "y")
    with pytest.raises(CourseError, match="alt text"):
        function(fig, "  ")


def test_live_refuses_a_start_that_is_no_choice() -> None:
    def draw(n: int) -> tuple[object, str]:
        return style.figure(f"{n}", "x", "y")[0], "An empty frame."

    with pytest.raises(CourseError, match="starts at 5"):
        live(draw, n=[1, 2], start={"n": 5})
    with pytest.raises(CourseError, match="no values"):
        live(draw, n=[])
