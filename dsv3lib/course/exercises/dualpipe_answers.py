"""Natural answers to 06_dualpipe's exercises: other ways to be right, and ways to be wrong that must be named."""

from __future__ import annotations

from typing import Any

from dsv3lib.course.exercises.dualpipe_checks import (
    leading,
    peak_live,
    split_backward,
    warm_up,
    warm_up_length,
)
from dsv3lib.pipeline import Action, schedule


def with_deque(row: list[str], wait: int) -> list[Action]:
    from collections import deque

    out, held = [], deque()
    for one in map(Action.parse, row):
        if one.kind == "B":
            out.append(Action("I", one.direction, one.microbatch))
            held.append(Action("W", one.direction, one.microbatch))
            while len(held) > wait:
                out.append(held.popleft())
        else:
            out.append(one)
    return [*out, *held]


def by_counting(row: list[str], wait: int) -> tuple[str, ...]:
    out, done, given = [], 0, 0
    for action in row:
        out.append(action.replace("B", "I"))
        if action[0] == "B":
            done += 1
            if done > wait:
                out.append(f"W0.{given}")
                given += 1
    return (*out, *(f"W0.{i}" for i in range(given, done)))


def with_generator(row: list[str], wait: int) -> Any:
    held: list[str] = []
    for action in row:
        yield action.replace("B", "I")
        if action[0] == "B":
            held.append("W" + action[1:])
        if len(held) > wait:
            yield held.pop(0)
    yield from held


def newest_first_at_the_end(row: list[str], wait: int) -> list[str]:
    done = split_backward(row, wait)
    return done[: len(done) - wait] + done[len(done) - wait :][::-1] if wait else done


def w_before_i(row: list[str], wait: int) -> list[str]:
    return [half for one in row for half in (["W" + one[1:], "I" + one[1:]] if one[0] == "B" else [one])]


def last_lost(row: list[str], wait: int) -> list[str]:
    whole = split_backward(row, wait)
    return whole[: len(whole) - wait]


def gradients_first(row: list[str], wait: int) -> list[str]:
    changed = split_backward(row, wait)
    return [one for one in changed if one[0] == "F"] + [one for one in changed if one[0] != "F"]


def warm_up_by_counters(rank: int, stages: int) -> list[Action]:
    from itertools import count

    near, far = (0, 1) if 2 * rank < stages else (1, 0)
    h = min(rank, stages - 1 - rank)
    n, f, b = count(), count(), count()
    row = [Action("F", near, next(n)) for _ in range(stages - 2 * h - 2)]
    for _ in range(h + 1):
        row += [Action("F", near, next(n)), Action("F", far, next(f))]
    for _ in range(stages // 2 - h - 1):
        done = next(b)
        row += [Action("I", far, done), Action("W", far, done), Action("F", far, next(f))]
    return row


def warm_up_by_mirror(rank: int, stages: int) -> list[str]:
    if rank < stages // 2:
        return warm_up(rank, stages)
    return [a[0] + {"0": "1", "1": "0"}[a[1]] + a[2:] for a in warm_up(stages - 1 - rank, stages)]


def warm_up_generated(rank: int, stages: int) -> Any:
    yield from warm_up(rank, stages)


def warm_up_from_library(rank: int, stages: int) -> list[Action]:
    return schedule("dualpipe", stages, 2 * stages).actions[rank][: warm_up_length(rank, stages)]


def not_mirrored(rank: int, stages: int) -> list[str]:
    return warm_up(min(rank, stages - 1 - rank), stages)


def whole_backwards(rank: int, stages: int) -> list[str]:
    return [a.replace("I", "B") for a in warm_up(rank, stages) if a[0] != "W"]


def one_fill_less(rank: int, stages: int) -> list[str]:
    row = warm_up(rank, stages)
    return row[1:] if leading(row) > 1 else row


def no_gradients(rank: int, stages: int) -> list[str]:
    return [action for action in warm_up(rank, stages) if action[0] == "F"]


def stops_after_step_2(rank: int, stages: int) -> list[str]:
    h = min(rank, stages - 1 - rank)
    return warm_up(rank, stages)[: 2 * (stages // 2 - h - 1) + 2 * (h + 1)]


def far_first(rank: int, stages: int) -> list[str]:
    row, h = warm_up(rank, stages), min(rank, stages - 1 - rank)
    at = 2 * (stages // 2 - h - 1)
    for i in range(at, at + 2 * (h + 1), 2):
        row[i], row[i + 1] = row[i + 1], row[i]
    return row


def weights_late(rank: int, stages: int) -> list[str]:
    row = warm_up(rank, stages)
    return [a for a in row if a[0] != "W"] + [a for a in row if a[0] == "W"]


def peak_by_actions(row: list[str]) -> int:
    curve, now = [0], 0
    for action in map(Action.parse, row):
        for single in action.singles():
            now += single.kind == "F"
            curve.append(now)
        now -= sum(single.kind in ("B", "W") for single in action.singles())
    return max(curve)


def peak_by_sets(row: list[str]) -> int:
    alive: set[str] = set()
    most = 0
    for action in row:
        parts = action.strip("[]").split(" & ")
        alive |= {part[1:] for part in parts if part[0] == "F"}
        most = max(most, len(alive))
        alive -= {part[1:] for part in parts if part[0] in "BW"}
    return most


def peak_accumulated(row: list[str]) -> int:
    from itertools import accumulate

    steps = [change for action in row for change in (action.count("F"), -action.count("B") - action.count("W"))]
    return max(accumulate(steps))


def peak_as_float(row: list[str]) -> float:
    return float(peak_live(row))
