"""The map shows what the code counts, and the README's picture is the one that the code draws."""

from pathlib import Path

from dsv3lib import ModelConfig
from dsv3lib.viz.model_map import PARTS, model_map, parts, save_readme_picture

README_PICTURE = Path(__file__).parents[2] / "data" / "figures" / "v3_map.svg"


def test_parts_are_those_of_the_published_model():
    parameters, flops = parts(ModelConfig.preset("v3-671b"), context=4096)
    assert round(sum(parameters.values()) / 1e9, 2) == 671.03 - 0.00  # norms, 0.001B, are not on the map
    assert round(100 * parameters["routed_experts"] / sum(parameters.values())) == 97
    assert set(parameters) | set(flops) == set(PARTS)


def test_a_part_that_is_not_there_has_no_bar():
    dense = ModelConfig.preset("nano").replace(first_k_dense_replace=3)
    parameters, _ = parts(dense, context=16)
    assert "routed_experts" not in parameters
    figure, alt, _ = model_map({"dense": dense}, context=16)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "routed experts" not in names and "dense networks" in names
    assert "hold 0 % of the first" in alt


def test_bars_fill_the_axis():
    figure, *_ = model_map({"nano": ModelConfig.preset("nano")}, context=16)
    bars = figure.axes[0].patches
    for y in {round(b.get_y(), 3) for b in bars}:
        assert abs(sum(b.get_width() for b in bars if round(b.get_y(), 3) == y) - 100) < 1e-6


def test_the_readme_shows_what_the_code_draws(tmp_path):
    save_readme_picture(tmp_path / "map.svg")
    assert (tmp_path / "map.svg").read_bytes() == README_PICTURE.read_bytes()
