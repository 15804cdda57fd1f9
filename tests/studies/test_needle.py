"""The needle task asks what it says it asks: by the key, at the depth, and nothing else scores."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS

from dsv3lib import DeepSeekV3
from dsv3lib.errors import InputError
from dsv3lib.studies import needle, needle_study

TEXT = torch.randint(32, 127, (5000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
DRAWN = {"length": st.integers(40, 200), "depth": st.floats(0, 0.99), "seed": SEEDS}


def facts(row: torch.Tensor) -> dict[int, tuple[int, int]]:
    """key → (value, place) of a row's needles, read from its tokens."""
    found = {}
    for place, token in enumerate(row.tolist()):
        if needle._NEEDLE <= token < needle._LINK:
            key, value = divmod(token - needle._NEEDLE, needle.VALUES)
            found[key] = (value, place)
    return found


def links(row: torch.Tensor) -> dict[int, int]:
    return dict(divmod(t - needle._LINK, needle.KEYS) for t in row.tolist() if needle._LINK <= t < needle._ASK)


@settings(max_examples=25)
@given(**DRAWN)
def test_a_prompt_asks_for_the_needle_at_its_depth(length: int, depth: float, seed: int) -> None:
    asked = needle.prompts(TEXT, 3, length, depth, torch.Generator().manual_seed(seed))
    assert asked.ids.shape == (3, length)
    for row, answer, last in zip(asked.ids, asked.answers.tolist(), asked.last.tolist(), strict=True):
        found = facts(row)
        assert len(found) == needle.NEEDLES and len({value for value, _ in found.values()}) == needle.NEEDLES
        value, place = found[int(row[-1]) - needle._ASK]
        assert answer == needle._ANSWER + value and place == min(int(depth * (length - 1)), length - 3)
        latest = max(place for _, place in found.values())
        assert last == next(needle._ANSWER + v for v, p in found.values() if p == latest)
        assert last != answer  # who takes the last value scores nothing


@settings(max_examples=25)
@given(**DRAWN)
def test_a_linked_prompt_needs_two_needles(length: int, depth: float, seed: int) -> None:
    asked = needle.prompts(TEXT, 3, length, depth, torch.Generator().manual_seed(seed), linked=True)
    for row, answer in zip(asked.ids, asked.answers.tolist(), strict=True):
        key = int(row[-1]) - needle._ASK_LINKED
        assert key not in facts(row)
        assert answer == needle._ANSWER + facts(row)[links(row)[key]][0]


@settings(max_examples=25)
@given(**DRAWN)
def test_with_shuffled_keys_the_former_answer_is_wrong(length: int, depth: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    asked = needle.prompts(TEXT, 3, length, depth, generator)
    control = needle.shuffled_keys(asked, generator)
    for before, row, answer in zip(asked.ids, control.ids, control.answers.tolist(), strict=True):
        value, _ = facts(row)[int(row[-1]) - needle._ASK]
        assert needle._ANSWER + value != answer
        assert sorted(v for v, _ in facts(row).values()) == sorted(v for v, _ in facts(before).values())


@settings(max_examples=25)
@given(length=st.integers(60, 200), seed=SEEDS)
def test_training_has_no_needle_in_the_unseen_bands_and_right_answers(length: int, seed: int) -> None:
    ids, is_answer = needle.training_rows(TEXT, 3, length, torch.Generator().manual_seed(seed))
    body = length - 2 * needle.NEEDLES
    assert (is_answer.sum(1) == needle.NEEDLES).all()
    for row, places in zip(ids, is_answer, strict=True):
        found = facts(row)
        assert not any(needle.unseen(place / body) for _, place in found.values())
        for at in places.nonzero().flatten().tolist():
            question, answer = int(row[at - 1]), int(row[at]) - needle._ANSWER
            if question >= needle._ASK_LINKED:
                assert found[links(row)[question - needle._ASK_LINKED]][0] == answer
            else:
                assert found[question - needle._ASK][0] == answer
    assert any((ids[2] >= needle._ASK_LINKED) & (ids[2] < needle._ANSWER))


def test_depths_that_are_measured_are_in_and_outside_the_bands() -> None:
    assert sum(needle.unseen(depth) for depth in needle_study.DEPTHS) == len(needle.UNSEEN_BANDS)


class Scripted(torch.nn.Module):
    """Stands in for a model: says whatever it is given for each row."""

    def __init__(self, said: torch.Tensor) -> None:
        super().__init__()
        self.said = list(said)

    def forward(self, ids: torch.Tensor):
        now, self.said = self.said[: len(ids)], self.said[len(ids) :]
        logits = torch.zeros(len(ids), ids.shape[1], needle.VOCABULARY)
        logits[torch.arange(len(ids)), -1, torch.stack(now)] = 1.0
        return type("Out", (), {"logits": logits})


def test_accuracy_counts_right_answers_and_the_last_value_scores_nothing() -> None:
    asked = needle.prompts(TEXT, 10, 60, 0.3, torch.Generator().manual_seed(1))
    said = asked.answers.clone()
    said[7:] = needle._ANSWER + (said[7:] - needle._ANSWER + 1) % needle.VALUES
    assert needle.accuracy(Scripted(said), asked, 4) == pytest.approx(0.7)
    assert needle.accuracy(Scripted(asked.last), asked, 4) == 0.0


@pytest.mark.parametrize(("length", "depth"), [(60, 1.0), (60, -0.1), (24, 0.5)])
def test_a_prompt_that_cannot_be_is_refused(length: int, depth: float) -> None:
    with pytest.raises(InputError, match="depth, length"):
        needle.prompts(TEXT, 1, length, depth, torch.Generator())


def test_the_loss_by_position_is_the_model_s_loss_in_pieces() -> None:
    model = DeepSeekV3(needle_study.base_config(), torch.Generator().manual_seed(0)).eval()
    rows = needle.rows_of(TEXT, 3, 65, torch.Generator().manual_seed(2))
    pieces = needle.loss_by_position(model, rows, bins=4)
    with torch.no_grad():
        assert sum(pieces) / 4 == pytest.approx(model(rows, labels=rows).loss.item(), abs=1e-4)


def test_the_study_s_methods_begin_with_the_same_weights_and_differ_in_frequencies() -> None:
    base = DeepSeekV3(needle_study.base_config(), torch.Generator().manual_seed(0)).eval()
    ids = needle.rows_of(TEXT, 1, 100, torch.Generator().manual_seed(3))
    with torch.no_grad():
        said = {name: needle_study.with_config(base, name)(ids).logits for name in needle_study.METHODS}
        torch.testing.assert_close(said["none"], base(ids).logits)
    for name in ("yarn", "interpolation", "ntk"):
        assert not torch.allclose(said[name], said["none"], atol=1e-5)


def test_the_command_goes_on_and_refuses_other_settings(tmp_path, monkeypatch, capsys) -> None:
    made = []

    def quick(seed: int, steps: int, extension_steps: int, rows: int) -> dict:
        made.append(seed)
        return {"seed": seed, "methods": {}}

    monkeypatch.setattr(needle_study, "run_seed", quick)
    out = str(tmp_path / "needle.json")
    needle_study.main(["--out", out, "--steps", "5", "--seeds", "0"])
    needle_study.main(["--out", out, "--steps", "5", "--seeds", "0", "1"])
    assert made == [0, 1] and [s["seed"] for s in json.loads((tmp_path / "needle.json").read_text())["seeds"]] == [0, 1]
    with pytest.raises(SystemExit):
        needle_study.main(["--out", out, "--steps", "6"])
    assert "other settings" in capsys.readouterr().err
