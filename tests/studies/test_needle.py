"""The needle task asks what it says it asks: by the key, at the depth, and nothing else scores."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS

from dsv3lib import DeepSeekV3
from dsv3lib.errors import InputError
from dsv3lib.layers.rope import rope_frequencies
from dsv3lib.rope_settings import LinearScaling
from dsv3lib.studies import needle, needle_study
from dsv3lib.studies.log import read
from dsv3lib.training.loop.context_extension import METHODS, extended_config

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
        key = int(row[-1]) - needle.ASK_LINKED
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
    ids, is_answer = needle.training_rows(TEXT, 8, length, torch.Generator().manual_seed(seed))
    body, two = length - 2 * needle.NEEDLES, needle.needs_two(ids)
    assert not (two & ~is_answer).any()
    for row, places, hops in zip(ids, is_answer, two, strict=True):
        found = facts(row)
        assert len(found) == places.sum() == (needle.NEEDLES if len(found) else 0)
        assert len(found) or (row < needle.BYTES).all()  # plain text to its end
        assert not any(needle.unseen(place / body) for _, place in found.values())
        for at in places.nonzero().flatten().tolist():
            question, answer = int(row[at - 1]), int(row[at]) - needle._ANSWER
            assert (question >= needle.ASK_LINKED) == bool(hops[at])
            if hops[at]:
                assert found[links(row)[question - needle.ASK_LINKED]][0] == answer
            else:
                assert found[question - needle._ASK][0] == answer


def test_training_rows_are_of_all_kinds() -> None:
    ids, is_answer = needle.training_rows(TEXT, 400, 60, torch.Generator().manual_seed(4))
    plain, linked = (~is_answer.any(1)).sum(), needle.needs_two(ids).any(1).sum()
    assert 60 < plain < 140 and 60 < linked < 140


def test_training_rows_are_of_the_kinds_that_are_asked_for() -> None:
    ids, is_answer = needle.training_rows(TEXT, 40, 60, torch.Generator().manual_seed(4), ("two",))
    assert (needle.needs_two(ids).sum(1) == 1).all() and (is_answer.sum(1) == needle.NEEDLES).all()
    ids, is_answer = needle.training_rows(TEXT, 40, 60, torch.Generator().manual_seed(4), ("plain",))
    assert (ids < needle.BYTES).all() and not is_answer.any()


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


def test_the_score_counts_right_answers_and_the_last_value_scores_nothing() -> None:
    asked = needle.prompts(TEXT, 10, 60, 0.3, torch.Generator().manual_seed(1))
    said = asked.answers.clone()
    said[7:] = needle._ANSWER + (said[7:] - needle._ANSWER + 1) % needle.VALUES
    scored = needle.score(Scripted(said), asked, 4)
    sure = math.log(math.e + needle.VOCABULARY - 1)  # the losses of one logit of 1 among zeros
    assert scored.right == pytest.approx(0.7) and scored.loss == pytest.approx(sure - 0.7, abs=1e-5)
    assert needle.score(Scripted(asked.last), asked, 4).right == 0.0


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


def base() -> DeepSeekV3:
    return DeepSeekV3(needle_study.base_config(), torch.Generator().manual_seed(0)).eval()


def extended(model: DeepSeekV3, method: str) -> DeepSeekV3:
    return needle_study.with_config(model, extended_config(model.config, method, 128, 1024, needle_study.FACTOR))


def test_the_study_s_methods_begin_with_the_same_weights_and_differ_in_frequencies() -> None:
    model, ids = base(), needle.rows_of(TEXT, 1, 100, torch.Generator().manual_seed(3))
    with torch.no_grad():
        said = {name: extended(model, name)(ids).logits for name in METHODS}
        torch.testing.assert_close(said["none"], model(ids).logits)
    for name in ("yarn", "interpolation", "ntk"):
        assert not torch.allclose(said[name], said["none"], atol=1e-5)


@pytest.mark.parametrize("stretch", [8.0, 40.0])
def test_each_mistake_is_the_one_that_its_name_says(stretch: float) -> None:
    """Frequencies, the factor on cos and sin, and the softmax scale, against YaRN's own."""
    yarn = extended_config(needle_study.base_config(), "yarn", 128, 1024, stretch)
    once = 0.1 * math.log(stretch) + 1
    plain, slow = yarn.qk_head_dim**-0.5, yarn.replace(rope_scaling=LinearScaling(stretch))
    expected = {
        "not_squared": (yarn, 1.0, once * plain),
        "no_temperature": (yarn, 1.0, plain),
        "on_the_rotary_part_alone": (yarn, once, plain),
        "interpolation": (slow, 1.0, plain),
        "not_stretched": (yarn.replace(rope_scaling=None), 1.0, plain),
    }
    assert set(expected) == set(needle_study.MISTAKES)
    assert yarn.softmax_scale == pytest.approx(once**2 * plain)
    for name, (like, factor, scale) in expected.items():
        port = yarn.replace(rope_scaling=needle_study.MISTAKES[name](yarn.rope_scaling))
        frequencies, magnitude = rope_frequencies(port)
        torch.testing.assert_close(frequencies, rope_frequencies(like)[0])
        assert (magnitude, port.softmax_scale) == pytest.approx((factor, scale))


def test_a_measurement_says_what_its_docstring_says() -> None:
    found = needle_study.measure(extended(base(), "yarn"), TEXT, 1, (64, 128))
    assert set(found) == {"map", "answer_loss", "shuffled", "linked", "loss_by_position"}
    assert {length: len(row) for length, row in found["map"].items()} == {"64": 10, "128": 10}
    assert len(found["loss_by_position"]) == needle_study.POSITION_BINS
    again = needle_study.measure(extended(base(), "yarn"), TEXT, 1, (128,), controls=False)
    assert set(again) == {"map", "answer_loss", "loss_by_position"}
    for name in again:  # every model is asked the same
        assert again[name] == ({"128": found[name]["128"]} if name != "loss_by_position" else found[name])


def test_the_loss_of_a_step_weighs_answers_and_keeps_the_curve() -> None:
    curve: list[list[float]] = []
    losses = needle_study.training_loss(TEXT, lambda step: 64, torch.Generator().manual_seed(1), curve)
    model, rows = base(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        got = losses(model, needle_study.CURVE_EVERY - 1).item()
        ids, is_answer = needle.training_rows(TEXT, needle_study.TOKENS_A_STEP // 64, 64, rows)
        each = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].mT, ids[:, 1:], reduction="none")
    answers = each[is_answer[:, 1:]]
    assert got == pytest.approx((each.mean() + needle_study.ANSWER_WEIGHT * answers.mean()).item(), rel=1e-4)
    assert len(curve) == 1 and curve[0][0] == needle_study.CURVE_EVERY and all(0 <= x <= 1 for x in curve[0][1:])


def test_the_command_runs_what_is_missing(tmp_path, monkeypatch) -> None:
    made = []

    def quick(**settings: int) -> dict:
        made.append(settings["seed"])
        return {"methods": {}}

    monkeypatch.setattr(needle_study, "run", quick)
    needle_study.main(["--out", str(tmp_path), "--steps", "5", "--seeds", "0"])
    needle_study.main(["--out", str(tmp_path), "--steps", "5", "--seeds", "0", "1"])
    needle_study.main(["--out", str(tmp_path), "--steps", "6", "--seeds", "0"])
    assert made == [0, 1, 0]
    assert [(row["seed"], row["steps"]) for row in read("needle_study", tmp_path)] == [(0, 5), (1, 5), (0, 6)]


def test_practice_has_a_log_of_its_own(tmp_path) -> None:
    needle_study.main(["--practice", "--out", str(tmp_path), "--steps", "2", "--rows", "1", "--seeds", "3"])
    (row,) = read("needle_practice", tmp_path)
    assert (row["seed"], row["steps"]) == (3, 2) and set(row["trained"]["linked"]) == {"128"}
    assert not (tmp_path / "needle_study.jsonl").exists()
