"""A study's log: what is in it is not run again, and the project's own records are whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv3lib.errors import CourseError
from dsv3lib.studies import balance_ways, latent_width, log


def test_a_stopped_study_goes_on_where_it_stood(tmp_path: Path) -> None:
    ran, settings = [], [{"seed": 1}, {"seed": 2}, {"seed": 3}]

    def run(seed: int) -> dict[str, int]:
        if seed == 3 and len(ran) == 2:
            ran.append("stop")
            raise KeyboardInterrupt
        ran.append(seed)
        return {"out": 10 * seed}

    with pytest.raises(KeyboardInterrupt):
        log.record("it", settings, run, tmp_path, tell=lambda _: None)
    log.record("it", settings, run, tmp_path, tell=lambda _: None)
    assert ran == [1, 2, "stop", 3]
    assert log.read("it", tmp_path) == [{"seed": s, "out": 10 * s} for s in (1, 2, 3)]


def test_a_missing_or_damaged_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(CourseError, match=r"python -m dsv3lib\.studies\.it"):
        log.read("it", tmp_path)
    (tmp_path / "it.jsonl").write_text("{")
    with pytest.raises(CourseError, match="not JSON"):
        log.read("it", tmp_path)


def test_the_project_s_records_hold_every_setting_and_seed() -> None:
    rows = log.read("balance_ways")
    for one in balance_ways.SETTINGS:
        seeds = {r["seed"] for r in rows if all(r.get(k) == v for k, v in one.items())}
        assert seeds == set(balance_ways.SEEDS), one
    widths = log.read("latent_width")
    assert all(any(all(r[k] == v for k, v in one.items()) for r in widths) for one in latent_width.settings())


def test_summaries_compare_within_a_seed() -> None:
    rows = [
        {"way": w, "seed": s, "alpha": a, "frozen_violation": [v, v], "bits": [0.1, 0.3],
         "settled_validation_loss": 5 + 0.1 * s + d}
        for w, a, v, d in (("none", None, 2.0, 0.0), ("batch", 0.5, 0.2, -0.25)) for s in (1, 2)
    ]  # fmt: skip
    found = balance_ways.summary(rows)
    assert found["batch, α = 0.5"]["loss"] == pytest.approx([-0.25, -0.25])
    assert found["none"]["loss"] == [0, 0] and found["none"]["bits"] == pytest.approx([0.2, 0.2])
