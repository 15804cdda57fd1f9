"""A slow clock for schedules, written without the library's walk: time advances by one, ranks look about."""

from __future__ import annotations

from dsv3lib.pipeline import Schedule


def clockwork(schedule: Schedule, times: dict[str, int]) -> tuple[int, list[int], dict]:
    """Simulate with whole-numbered times, tick by tick.

    Returns:
        (makespan, idle time of each rank, (rank, text of the action) → start).
    """
    where = {p: (n, d) for n, route in enumerate(schedule.routes) for d, p in enumerate(route.places)}
    length = [len(route.places) for route in schedule.routes]
    scale = {p: schedule.stages / len(r.places) for r in schedule.routes for p in r.places}
    done: dict[tuple, int] = {}  # (kind, route, depth, micro) → time from which it is there
    todo = [list(row) for row in schedule.actions]
    free, busy, starts, now = [0] * len(todo), [0] * len(todo), {}, 0
    while any(todo):
        assert now < 100_000, "no rank moves any more"
        for rank, row in enumerate(todo):
            if not row or free[rank] > now:
                continue
            action = row[0]
            if not all(_ready(s, *where[rank, s.direction], length, done, now) for s in action.singles()):
                continue
            row.pop(0)
            took = int(times[action.kind] * scale[rank, action.singles()[0].direction])
            starts[rank, str(action)] = now
            free[rank], busy[rank] = now + took, busy[rank] + took
            for single in action.singles():
                route, depth = where[rank, single.direction]
                for kind in {"F": "F", "I": "I", "W": "W", "B": "IW"}[single.kind]:
                    done[kind, route, depth, single.microbatch] = now + took
        now += 1
    end = max(free)
    return end, [end - b for b in busy], starts


def _ready(single, route, depth, length, done, now) -> bool:
    def there(kind: str, d: int) -> bool:
        return done.get((kind, route, d, single.microbatch), now + 1) <= now

    if single.kind == "F":
        return depth == 0 or there("F", depth - 1)
    if single.kind == "W":
        return there("I", depth)
    return there("F", depth) and (depth == length[route] - 1 or there("I", depth + 1))
