"""The study of what multi-token prediction buys: equal weights, paired seeds, and what its record says."""

import math
from statistics import mean

import pytest
import torch

from dsv3lib.model import next_token_loss
from dsv3lib.studies import mtp_ways as study
from dsv3lib.studies.log import read


def sure(differences: list[float]) -> bool:
    """Every seed points the same way: by chance once in 16 for five."""
    return min(differences) > 0 or max(differences) < 0


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return read("mtp_ways")


def second_next(row: dict) -> float:
    return row["probe"]["2"]


def test_every_kind_was_run_from_every_seed(rows: list[dict]) -> None:
    assert {(r["kind"], r["seed"]) for r in rows} == {(k, s) for k in study.KINDS for s in study.SEEDS}
    assert len(rows) == len(study.KINDS) * len(study.SEEDS)


def test_differences_are_taken_seed_by_seed() -> None:
    made = [{"kind": "none", "seed": s, "x": 10.0 * s} for s in (1, 0)]
    made += [{"kind": "chain", "seed": s, "x": 10.0 * s + s} for s in (0, 1)]
    assert study.difference(made, "chain", lambda r: r["x"]) == [0.0, 1.0]


def test_the_chain_drafts_better_than_independent_heads_from_every_seed(rows: list[dict]) -> None:
    for depth in range(study.DEPTHS):
        gain = study.difference(rows, "chain", lambda r, d=depth: r["greedy"][d], "heads")
        assert sure(gain) and min(gain) > 0.2


def test_the_state_holds_more_of_the_token_after_next(rows: list[dict]) -> None:
    """The planning claim in the form that a probe can ask; three places on it is no longer to be seen."""
    assert sure(study.difference(rows, "chain", second_next)), "two places on"
    assert mean(study.difference(rows, "chain", second_next)) < 0
    assert not sure(study.difference(rows, "chain", lambda r: r["probe"]["3"])), "three places on"


def test_neither_the_loss_nor_the_sums_gain_for_sure(rows: list[dict]) -> None:
    assert not sure(study.difference(rows, "chain", lambda r: r["text_loss"]))
    assert not sure(study.difference(rows, "chain", lambda r: r["digits"][0]))


def test_the_time_buys_more_when_it_is_spent_on_text(rows: list[dict]) -> None:
    assert max(study.difference(rows, "longer", lambda r: r["text_loss"], "chain")) < 0


def test_which_side_of_the_norm_is_handed_on_decides_nothing_here(rows: list[dict]) -> None:
    for key in ("greedy", "sampled"):
        assert not sure(study.difference(rows, "before_norm", lambda r, k=key: r[k][0], "chain"))
    for row in rows:
        if "handed_wrongly" in row:
            assert abs(row["handed_wrongly"]["sampled"][1] - row["sampled"][1]) < 0.01


def test_all_kinds_of_a_seed_start_from_the_same_weights_and_the_three_ways_are_of_one_size() -> None:
    one, other = (study.model_of(3).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    sizes = {kind: study.parameters(kind) for kind in study.KINDS}
    assert sizes["chain"] == sizes["before_norm"] == sizes["heads"] > sizes["none"] == sizes["longer"]


def test_a_module_that_is_shown_its_target_learns_to_copy_and_drafts_worse() -> None:
    found = {}
    for kind in ("chain", "own_target"):
        for model, _ in study.train_one(kind, 0, steps=40):  # noqa: B007
            pass
        ids = study.rows_of(study.manual()[1], 8, 64, torch.Generator().manual_seed(1))
        with torch.no_grad():
            shown, used = (study.depth_logits(model, ids, k)[0][1] for k in (kind, "chain"))
        found[kind] = tuple(next_token_loss(one, ids, 2).item() for one in (shown, used))
    assert found["own_target"][0] < 0.7 * found["chain"][0], "its training loss looks splendid"
    assert found["own_target"][1] > found["chain"][1], "and what it says in use is worse"
    assert math.isfinite(found["own_target"][1])
