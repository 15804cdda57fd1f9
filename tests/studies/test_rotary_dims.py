"""The study of rotary dimensions: what it asks is what its rows hold, and its command goes on where it stopped."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS

from dsv3lib.errors import CheckpointError
from dsv3lib.studies import rotary_dims as study
from dsv3lib.studies.small_models import UNSEEN_BYTES, manual, rows_of, train


@given(which=st.lists(st.integers(0, len(study.DISTANCES) - 1), min_size=1, max_size=6), seed=SEEDS)
def test_every_scored_letter_equals_the_one_a_distance_before(which: list[int], seed: int) -> None:
    rows, scored = study.copying_rows(torch.tensor(which), torch.Generator().manual_seed(seed))
    for row, places, index in zip(rows, scored, which, strict=True):
        distance = study.DISTANCES[index]
        assert row[0] == study.FIRST_NAME + index
        assert places.sum() == study.LENGTH - 1 - distance
        at = places.nonzero().flatten()
        assert torch.equal(row[at], row[at - distance])


def test_copies_cannot_be_told_from_another_distance() -> None:
    """Otherwise a model that looks one fixed way back would score at every distance."""
    rows, scored = study.copying_rows(torch.full((50,), 1), torch.Generator().manual_seed(0))
    at = scored[0].nonzero().flatten()
    for other in study.DISTANCES[:1] + study.DISTANCES[2:]:
        seen = at[at > other]
        right = (rows[:, seen] == rows[:, seen - other]).double().mean().item()
        multiple = other % study.DISTANCES[1] == 0
        assert right == 1.0 if multiple else right < 0.2


def test_the_unseen_text_is_no_part_of_what_is_trained_on() -> None:
    text, unseen = manual()
    assert len(unseen) == UNSEEN_BYTES and len(text) > len(unseen)
    seen = bytes(text.tolist())
    pieces = [bytes(unseen[start : start + 80].tolist()) for start in range(0, len(unseen) - 80, 4096)]
    assert sum(piece in seen for piece in pieces) == 0


def test_a_model_without_positions_reads_a_bag_of_words() -> None:
    model = study.model_with(0, seed=0).eval()
    ids = torch.randint(256, (1, 20), generator=torch.Generator().manual_seed(1))
    shuffled = torch.cat([ids[:, torch.randperm(19)], ids[:, -1:]], 1)
    with torch.no_grad():
        first = model.model.layers[0].self_attn
        kept = []
        hook = first.register_forward_hook(lambda module, given, out: kept.append(out[0, -1]))
        model(ids), model(shuffled)
        hook.remove()
    torch.testing.assert_close(kept[0], kept[1], rtol=0, atol=1e-6)
    assert study.model_with(8, seed=0).config.qk_rope_head_dim == 8


def test_a_model_without_positions_is_never_saved(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="without positions is not saved"):
        study.model_with(0, seed=0).save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_training_lowers_the_loss_and_the_rate_falls() -> None:
    text, _ = manual()
    model = study.model_with(8, seed=0)
    losses = list(train(model, 12, study.training_loss(text, torch.Generator().manual_seed(0))))
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.5


def test_measures_are_of_every_distance_and_place() -> None:
    _, unseen = manual()
    model = study.model_with(8, seed=0).eval()
    found = study.measure(model, unseen, rows=2)
    assert list(found["copy_loss"]) == [str(distance) for distance in study.DISTANCES]
    assert len(found["loss_by_position"]) == study.POSITION_BINS
    assert found["text_loss"] == pytest.approx(sum(found["loss_by_position"]) / study.POSITION_BINS, rel=0.02)
    with torch.no_grad():
        rows = rows_of(unseen, 2, study.LENGTH, torch.Generator().manual_seed(99))
        assert model(rows, labels=rows).loss.item() == pytest.approx(found["text_loss"], abs=1e-4)


def test_the_command_goes_on_and_refuses_other_settings(tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "study.json"
    made = []

    def quick(dims: int, seed: int, steps: int) -> study.Measured:
        made.append((dims, seed))
        return study.Measured(dims, seed, 2.0, [2.0], {"8": 2.0}, {"8": 0.5}, 0.1)

    monkeypatch.setattr(study, "run_one", quick)
    study.main(["--out", str(out), "--steps", "5", "--seeds", "0", "--dims", "0", "8"])
    study.main(["--out", str(out), "--steps", "5", "--seeds", "0", "1", "--dims", "0", "8"])
    assert made == [(0, 0), (8, 0), (0, 1), (8, 1)]
    assert [run["seed"] for run in json.loads(out.read_text())["runs"]] == [0, 0, 1, 1]
    with pytest.raises(SystemExit):
        study.main(["--out", str(out), "--steps", "6"])
    assert "holds runs of 5" in capsys.readouterr().err
