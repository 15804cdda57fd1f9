"""The needle map draws what was measured, and marks the depths that training never saw."""

import pytest

from dsv3lib.viz import needle, style

MAP = {"128": [1.0, 0.5], "1024": [0.25, 0.0]}


def test_means_are_over_seeds_cell_by_cell() -> None:
    other = {"128": [0.0, 0.5], "1024": [0.75, 1.0]}
    assert needle.mean_map([MAP, other]) == {"128": [0.5, 0.5], "1024": [0.5, 0.5]}
    assert needle.mean_map([MAP]) == MAP


def test_cells_lie_at_their_depth_and_length_and_unseen_depths_are_marked() -> None:
    methods = ("yarn", "interpolation", "ntk", "none")
    dark = {"128": [0.0, 0.0], "1024": [0.0, 0.0]}
    maps = dict.fromkeys(methods, dark), {name: MAP if name == "yarn" else dark for name in methods}
    fig, alt, caption = needle.needle_maps(*maps, depths=[0.05, 0.25], unseen=[False, True])
    panels = fig.axes[:8]
    assert [ax.get_title(loc="left") or ax.get_title() for ax in panels][4] == "YaRN, after"
    assert panels[4].images[0].get_array().tolist() == [[100, 25], [50, 0]]
    assert panels[0].images[0].get_array().tolist() == [[0, 0], [0, 0]]
    marks = [line.get_ydata() for line in panels[4].lines]
    assert len(marks) == 1 and list(marks[0]) == pytest.approx([0.55, 1.45])
    assert alt and caption and style.png(fig).startswith(b"\x89PNG")


def test_the_loss_s_band_spans_the_seeds() -> None:
    fig, alt, caption = needle.loss_by_position({"yarn": [[2.0, 3.0], [1.0, 2.0]]}, 128, 1024, "before")
    line = fig.axes[0].lines[0]
    assert list(line.get_xdata()) == [256, 768] and list(line.get_ydata()) == [1.5, 2.5]
    assert fig.axes[0].lines[1].get_xdata()[0] == 128
    assert "before" in fig.axes[0].get_title(loc="left") and alt and caption
