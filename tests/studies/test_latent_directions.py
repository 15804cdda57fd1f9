"""Directions of keys and values, against models whose rank is known."""

from __future__ import annotations

import pytest
import torch

from dsv3lib.studies import latent_directions as see
from dsv3lib.studies import latent_width as small

IDS = torch.arange(256).view(4, 64)


def test_a_latent_of_four_makes_four_directions_and_a_cut_to_four_changes_nothing() -> None:
    model = small.reader(4, seed=1).eval()
    rows = see.keys_and_values(model, 1, IDS)
    assert torch.linalg.matrix_rank(rows, rtol=1e-5) == 4
    whole = see.loss_of(model, IDS)
    assert see.loss_with_directions(model, 4, IDS, IDS) == pytest.approx(whole, abs=1e-4)
    assert see.loss_of(model, IDS) == whole, "the model itself is not cut"
    assert see.variance_kept(rows)[-1] == pytest.approx(1)


def test_a_full_latent_tells_all_and_a_narrow_one_does_not() -> None:
    assert see.told_by_latent(small.reader(64, seed=1), 0, IDS) == pytest.approx(1, abs=1e-4)
    assert see.told_by_latent(small.reader(2, seed=1), 0, IDS) < 0.9


def test_an_even_start_makes_keys_and_values_as_large_as_with_eight() -> None:
    sizes = [see.keys_and_values(small.reader(64, 1, even), 0, IDS).std() for even in (False, True)]
    assert float(sizes[0] / sizes[1]) == pytest.approx(8**0.5, rel=1e-3)
