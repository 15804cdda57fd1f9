"""The reference answers of 06_dualpipe's exercises, and the checks that hold an answer to them by what it does."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from dsv3lib.course.task import Rejected, describe, expect_number
from dsv3lib.errors import ScheduleError
from dsv3lib.pipeline import Action, Schedule, schedule, simulate, validate
from dsv3lib.pipeline.actions import straight


def texts(got: Any, what: str) -> list[str]:
    """An answer as a list of actions' texts; tuples, generators and Actions are welcome.

    Raises:
        Rejected: it is no list of actions.
    """
    if got is None or isinstance(got, str) or not hasattr(got, "__iter__"):
        raise Rejected(f"{what} should be a list of actions, such as ['F0.0', 'B0.0']; you returned {describe(got)}.")
    found = []
    for one in got:
        try:
            found.append(str(one if isinstance(one, Action) else Action.parse(one)))
        except (ScheduleError, TypeError):
            raise Rejected(f"{what}: {describe(one)} is no action; write F0.3, B0.3, I0.3 or W0.3.") from None
    return found


def bubble_1f1b(stages: int, forward: float | int, backward: float | int) -> float | int:
    """Rank 0 waits for its first micro-batch to go down all other ranks and come back."""
    return (stages - 1) * (forward + backward)


def check_bubble(answer: Callable[[int, float, float], float]) -> None:
    for stages, forward, backward in ((8, 3, 5), (4, 1, 2), (8, 1, 2), (2, 2, 3), (1, 1, 2)):
        right = max(simulate(schedule("1f1b", stages, 2 * stages), F=forward, B=backward, W=0).bubble)
        one = forward + backward
        slips = {
            stages * one: "A rank does not wait for itself: only the others' work lies on the way.",
            (stages - 1) * forward: "That is the way down; the gradient has to come back up, too.",
            (stages - 1) * backward: "That is the way up; the activation has to go down first.",
            2 * (stages - 1) * one: "Filling and draining do not both cost a whole way: count on one row of the "
            "picture.",
            (stages - 1) / stages * one: "That is a share of a micro-batch's time; asked is the idle time of "
            "one rank.",
            stages * (stages - 1) * one: "That is all ranks together; asked is the idle time of one.",
            stages - 1: "You counted the gaps and not their length.",
            (stages - 1) * one / 2: "Half of it: that is what a rank in the middle waits before its first "
            "action and after.",
        }  # fmt: skip
        slips.pop(right, None)
        what = f"the idle time with {stages} ranks, F = {forward}, B = {backward}"
        expect_number(answer(stages, forward, backward), right, what, slips=slips)


def bubble_picture() -> tuple[Any, ...]:
    from dsv3lib.viz.pipeline import gantt

    fig, _, _ = gantt(simulate(schedule("1f1b", 4, 6)), "1F1B, 4 ranks, 6 micro-batches: how much is white?")
    for ax in fig.axes[1:]:  # the bars beside the chart are the answer
        ax.remove()
    alt = (
        "A chart of time with four rows of boxes. The first row begins with four forward boxes, then a long "
        "white gap, "
        "then backward and forward in turn; the last row has no gap once it has begun."
    )
    return fig, alt, "F takes 1, B takes 2. Count what is white on any one row, from time 0 to the end of the "
    "last box."


def split_backward(row: list[str], wait: int) -> list[str]:
    """Each B as I, and its W once `wait` younger ones are waiting; what is left comes at the end."""
    out, waiting = [], []
    for action in row:
        if not action.startswith("B"):
            out.append(action)
            continue
        out.append("I" + action[1:])
        waiting.append("W" + action[1:])
        if len(waiting) > wait:
            out.append(waiting.pop(0))
    return out + waiting


def check_split(answer: Callable[[list[str], int], list[str]]) -> None:
    for stages, microbatches in ((2, 4), (4, 8), (8, 16)):
        before = [row.split() for row in schedule("1f1b", stages, microbatches).rows()]
        rows = [texts(answer(list(row), rank), f"rank {rank}'s actions") for rank, row in enumerate(before)]
        left = [action for row in rows for action in row if action.startswith("B")]
        if left:
            raise Rejected(f"{left[0]} is still a whole backward pass: each B becomes an I and a W.")
        for rank, (old, new) in enumerate(zip(before, rows, strict=True)):
            kept = [action for action in new if not action.startswith("W")]
            if kept != [action.replace("B", "I") for action in old] and sorted(kept) == sorted(
                action.replace("B", "I") for action in old
            ):
                raise Rejected(f"rank {rank}: forward passes and I should stay in the order of 1F1B; only W moves.")
        made = Schedule.by_hand(rows, straight(stages, microbatches), "yours")
        try:
            validate(made)
        except ScheduleError as error:
            raise Rejected(f"this cannot run: {error}") from None
        simulated, aim = simulate(made), simulate(schedule("zb1p", stages, microbatches))
        peak, allowed = max(simulated.peak_activations), max(aim.peak_activations)
        if peak > allowed:
            raise Rejected(
                f"with {stages} ranks {peak} micro-batches are alive at once, {allowed} are enough: weights "
                f"that wait too "
                "long keep their activations alive. At most `wait` of them may wait while the next one comes."
            )
        if max(simulated.bubble) > max(aim.bubble):
            at_once = all(
                row.index("W" + one[1:]) == row.index(one) + 1 for row in rows for one in row if one.startswith("I")
            )
            why = (
                "every W comes right after its I, so nothing is left to fill the waiting at the end"
                if at_once
                else "the weights' parts do not lie where this rank would wait"
            )
            raise Rejected(
                f"it runs, but {max(simulated.bubble):g} is idle with {stages} ranks instead of "
                f"{max(aim.bubble):g}: {why}. "
                "`wait` says how many W a rank holds back."
            )


def warm_up(rank: int, stages: int) -> list[str]:
    """Steps 1 to 3: fill in the near direction, both directions in turn, then the first gradients of the far one."""
    middle = stages // 2
    near, far = (0, 1) if rank < middle else (1, 0)
    h = min(rank, stages - 1 - rank)  # distance from the rank's own end
    inner = middle - h - 1  # distance from the middle
    row = [f"F{near}.{i}" for i in range(2 * inner)]
    for i in range(h + 1):
        row += [f"F{near}.{2 * inner + i}", f"F{far}.{i}"]
    for i in range(inner):
        row += [f"I{far}.{i}", f"W{far}.{i}", f"F{far}.{h + 1 + i}"]
    return row


def warm_up_length(rank: int, stages: int) -> int:
    """How many actions steps 1 to 3 have on a rank."""
    h = min(rank, stages - 1 - rank)
    inner = stages // 2 - h - 1
    return 2 * inner + 2 * (h + 1) + 3 * inner


def check_warm_up(answer: Callable[[int, int], list[str]]) -> None:
    for stages in (4, 8, 2):
        for rank in range(stages):
            got = texts(answer(rank, stages), f"rank {rank}'s warm-up")
            whole = schedule("dualpipe", stages, 4 * stages).rows()[rank]
            right = warm_up(rank, stages)
            assert whole.startswith(" ".join(right))  # the solution is the library's own order
            if got != right:
                raise Rejected(_warm_up_slip(got, right, rank, stages))


def _warm_up_slip(got: list[str], right: list[str], rank: int, stages: int) -> str:
    where = f"rank {rank} of {stages}"
    flipped = [action[0] + str(1 - int(action[1])) + action[2:] if action[1] in "01" else action for action in got]
    if flipped == right:
        return f"{where}: the directions are exchanged. In the second half its own end is the last rank: near is 1."
    if any(action.startswith("B") for action in got):
        return f"{where}: {next(a for a in got if a[0] == 'B')} is a whole backward pass; step 3 splits it, I then W."
    if any(action.startswith("[") for action in got):
        return f"{where}: no pair belongs to the warm-up; pairs begin with step 4."
    forwards = [[action for action in row if action[0] == "F"] for row in (got, right)]
    if got == forwards[1] or (forwards[0] == forwards[1] and len(got) < len(right)):
        return f"{where}: the gradients of step 3 are missing, an I and a W before each further forward pass."
    if got == right[: len(got)]:
        return f"{where}: right so far, but {len(got)} of {len(right)} actions: {right[len(got)]} comes next."
    if right == got[: len(right)]:
        return f"{where}: right up to {right[-1]}, then {got[len(right)]} is too many; that belongs to step 4."
    if sorted(got) == sorted(right):
        at = next(i for i, (mine, its) in enumerate(zip(got, right, strict=True)) if mine != its)
        return f"{where}: the right actions in another order; place {at} is {got[at]}, expected {right[at]}."
    fill, aim = (leading(row) for row in (got, right))
    if fill != aim:
        return (
            f"{where}: {fill} forward passes come before the other direction's first, expected {aim}: step 1 has "
            "2(N − h − 1) and step 2 begins with one more. h is the distance from the rank's own end."
        )
    at = next((i for i, (mine, its) in enumerate(zip(got, right, strict=False)) if mine != its), len(right))
    return f"{where}: place {at} is {got[at] if at < len(got) else 'missing'}, expected {right[at]}."


def leading(row: Sequence[str]) -> int:
    """Forward passes in the direction of the first, before any other action."""
    return next((i for i, one in enumerate(row) if one[:2] != row[0][:2]), len(row)) if row else 0


def peak_live(row: list[str]) -> int:
    """A forward counts from the start of its action; B and W let go at the end of theirs."""
    alive = peak = 0
    for action in row:
        parts = action.strip("[]").split(" & ")
        alive += sum(part[0] == "F" for part in parts)
        peak = max(peak, alive)
        alive -= sum(part[0] in "BW" for part in parts)
    return peak


def check_peak(answer: Callable[[list[str]], int]) -> None:
    draw = random.Random(3)
    cases = [(name, stages) for name in ("dualpipe", "zb1p", "1f1b", "gpipe") for stages in (2, 4, 8)]
    for name, stages in cases:
        made = schedule(name, stages, 2 * stages + 2 * draw.randint(0, 3))
        simulated = simulate(made)
        at_inputs = simulated.peak_live("I")
        for rank, row in enumerate(made.rows()):
            actions = [str(action) for action in made.actions[rank]]
            right = simulated.peak_activations[rank]
            slips = {
                one_direction(actions): "Both directions live on this rank; you counted one of them.",
                at_inputs[rank]: "An I does not let go: W still needs the activations.",
                sum("F" in a for a in actions): "That is how many pass in all; asked is how many are alive at once.",
                net_of_pairs(actions): "A pair is a forward and a backward pass at once: the forward pass has "
                "begun while "
                "the backward pass still needs its activations, so both are alive until the pair ends.",
                0: "At the end all are gone; asked is the most that were alive on the way.",
            }  # fmt: skip
            slips.pop(right, None)
            expect_number(answer(list(actions)), right, f"the peak of rank {rank} of {made.name} ({row[:34]} "
            f"…)", slips=slips)


def count_live(row: list[str], lets_go: str, backward_first: bool = False) -> int:
    alive = peak = 0
    for action in row:
        parts = action.strip("[]").split(" & ")
        begun, ended = sum(p[0] == "F" for p in parts), sum(p[0] in lets_go for p in parts)
        alive += begun
        peak = max(peak, alive - (ended if backward_first and len(parts) == 2 else 0))
        alive -= ended
    return peak


def net_of_pairs(row: list[str]) -> int:
    return count_live(row, "BW", backward_first=True)


def one_direction(row: list[str]) -> int:
    alive = peak = 0
    for action in row:
        parts = [part for part in action.strip("[]").split(" & ") if part[1] == "0"]
        alive += sum(part[0] == "F" for part in parts)
        peak = max(peak, alive)
        alive -= sum(part[0] in "BW" for part in parts)
    return peak
