"""Exercises of 06_dualpipe: the bubble of 1F1B, the backward pass split, DualPipe's first steps, and PP + 1."""

from __future__ import annotations

from dsv3lib.course.exercises import dualpipe_answers as answers
from dsv3lib.course.exercises import dualpipe_checks as checks
from dsv3lib.course.task import Exercise, RightAnswer, WrongAnswer

EXERCISES = (
    Exercise(
        id="dualpipe.1", title="The bubble of 1F1B, from the picture", dots=1, minutes=6,
        prompt=(
            "Write `bubble_1f1b(stages, forward, backward)`: how long a rank is idle in one step, from time 0 "
            "to the end of the last box, less what it computes. Read it off the picture: it is the same on "
            "every row, and for any number of micro-batches. Then write it for any number of ranks and any "
            "times."
        ),
        spec=(
            ("stages", "int", "ranks of the pipeline, PP"),
            ("forward", "number", "F, time of a forward pass on one rank"),
            ("backward", "number", "B, time of a whole backward pass"),
            ("returns", "number", "idle time of one rank"),
        ),
        picture=checks.bubble_picture, solution=checks.bubble_1f1b, checker=checks.check_bubble,
        hints=(
            "Look at the last rank: it never waits once it has begun. When does it begin, and when does it end?",
            "Before it lie the forward passes of all other ranks, behind it their backward passes.",
            "There are PP − 1 other ranks.",
        ),
        praise="(PP − 1)(F + B): the way down and back of one micro-batch, without the rank itself. More "
        "micro-batches do not "
        "shorten it, they only make it a smaller share.",
        also_right=(
            RightAnswer("multiplied out", lambda n, f, b: n * f + n * b - f - b),
            RightAnswer("as a sum over the other ranks", lambda n, f, b: sum(f + b for _ in range(n - 1))),
            RightAnswer("fill and drain apart", lambda n, f, b: (n - 1) * f + (n - 1) * b),
            RightAnswer("makespan less work, of one micro-batch", lambda n, f, b: n * (f + b) - (f + b)),
        ),
        wrong=(
            WrongAnswer("the rank waits for itself too", lambda n, f, b: n * (f + b), says="wait for itself"),
            WrongAnswer("only the way down", lambda n, f, b: (n - 1) * f, says="come back up"),
            WrongAnswer("only the way up", lambda n, f, b: (n - 1) * b, says="go down first"),
            WrongAnswer("filling and draining counted twice", lambda n, f, b: 2 * (n - 1) * (f + b), says="not both"),
            WrongAnswer("all ranks together", lambda n, f, b: n * (n - 1) * (f + b), says="idle time of one"),
            WrongAnswer("gaps without their length", lambda n, f, b: n - 1, says="not their length"),
        ),
    ),
    Exercise(
        id="dualpipe.2", title="Split the backward pass", dots=2, minutes=9,
        prompt=(
            "A backward pass has two parts. `I` makes the gradient of the inputs, for which the rank before is "
            "waiting. `W` makes the gradient of the weights, for which nobody waits before the end of the step.\n\n"
            "Write `split_backward(row, wait)`: take a rank's row of 1F1B and split every B. I stands where B "
            "stood; W waits until more than `wait` of them are waiting, then the oldest runs; what is left "
            "comes at the end.\n\n"
            "The check gives rank r the number `wait = r`, runs all ranks together, and measures idle time and "
            "memory."
        ),
        spec=(
            ("row", "list of str", "a rank's actions in 1F1B, as ['F0.0', 'B0.0', …]"),
            ("wait", "int", "how many W this rank may hold back"),
            ("returns", "list of str", "the row with I and W for every B"),
        ),
        solution=checks.split_backward, checker=checks.check_split,
        hints=(
            "Keep a second list: the W that wait, oldest first.",
            "After each I, append its W to that list; if it is longer than `wait`, take the first one out and do it.",
            "At the end, do what still waits.",
        ),
        praise="This is ZB1P. One W fills the gap that each rank would have had at the end, and PP "
        "micro-batches are alive on "
        "every rank: the price of waiting.",
        also_right=(
            RightAnswer("with a deque and Actions", answers.with_deque),
            RightAnswer("by counting", answers.by_counting),
            RightAnswer("a generator", answers.with_generator),
            RightAnswer("what is left newest first", answers.newest_first_at_the_end),
        ),
        wrong=(
            WrongAnswer("nothing split", lambda row, wait: row, says="still a whole backward"),
            WrongAnswer("W right after its I", lambda row, w: checks.split_backward(row, 0), says="right after its I"),
            WrongAnswer("all W at the end", lambda row, wait: checks.split_backward(row, 10**6), says="alive"),
            WrongAnswer("one W held back too many", lambda row, w: checks.split_backward(row, w + 1), says="alive"),
            WrongAnswer("W before I", answers.w_before_i, says="stands before"),
            WrongAnswer("the last W forgotten", answers.last_lost, says="is missing"),
            WrongAnswer("all forward passes first", answers.gradients_first, says="order of 1F1B"),
        ),
    ),
    Exercise(
        id="dualpipe.3", title="DualPipe's warm-up", dots=3, minutes=12,
        prompt=(
            "Write `warm_up(rank, stages)`, the first three of DualPipe's eight steps for one rank. `N = stages "
            "/ 2` ranks lie between an end and the middle; `h` is the rank's distance from its own end (0 for "
            "ranks 0 and PP − 1). The near direction enters at that end: 0 in the first half, 1 in the second; "
            "far is the other one.\n\n"
            "Step 1: `2(N − h − 1)` forward passes, near.\n\n"
            "Step 2: `h + 1` times a forward near, then a forward far.\n\n"
            "Step 3: `N − h − 1` times I far, W far, F far.\n\n"
            "Micro-batches count from 0 in each direction."
        ),
        spec=(
            ("rank", "int", "from 0 to stages − 1"),
            ("stages", "int", "ranks, PP, even"),
            ("returns", "list of str", "the actions before the first pair, as ['F0.0', …]"),
        ),
        solution=checks.warm_up, checker=checks.check_warm_up,
        hints=(
            "`h = min(rank, stages - 1 - rank)`, and near is 0 where rank < stages / 2.",
            "Three loops, one for each step. The near direction counts on from step 1 to step 2.",
            "In step 3 the far direction's gradients count from 0, its forward passes from h + 1.",
        ),
        praise="On every rank PP forward passes are under way when these steps end: the pipeline is full from "
        "both sides.",
        also_right=(
            RightAnswer("with counters and Actions", answers.warm_up_by_counters),
            RightAnswer("the second half mirrored", answers.warm_up_by_mirror),
            RightAnswer("a generator", answers.warm_up_generated),
            RightAnswer("cut off the library's schedule", answers.warm_up_from_library),
        ),
        wrong=(
            WrongAnswer("the second half like the first", answers.not_mirrored, says="exchanged"),
            WrongAnswer("whole backward passes in step 3", answers.whole_backwards, says="step 3 splits"),
            WrongAnswer("one forward pass too few in step 1", answers.one_fill_less, says="distance from the rank's "
            "own end"),
            WrongAnswer("forward passes alone", answers.no_gradients, says="gradients of step 3 are missing"),
            WrongAnswer("stops after step 2", answers.stops_after_step_2, says="comes next"),
            WrongAnswer("far before near in step 2", answers.far_first, says="another order"),
            WrongAnswer("all W after the forward passes", answers.weights_late, says="another order"),
        ),
    ),
    Exercise(
        id="dualpipe.4", title="Why PP + 1", dots=2, minutes=7,
        prompt=(
            "Write `peak_live(row)`: the most micro-batches that are alive at once on a rank, from its row of "
            "actions alone. One is alive from the start of its forward pass until its backward pass has ended: "
            "B, or W where it is split. A pair `[F0.7 & B1.3]` is a forward and a backward pass that run at the "
            "same time."
        ),
        spec=(
            ("row", "list of str", "a rank's actions in order"),
            ("returns", "int", "the peak of live micro-batches"),
        ),
        solution=checks.peak_live, checker=checks.check_peak,
        hints=(
            "Walk through the row with a counter: up at a forward pass, down after B or W.",
            "`action.strip('[]').split(' & ')` gives the one or two parts of an action.",
            "When you come to a pair, count its forward pass, look at the peak, and only then let its backward "
            "pass go.",
        ),
        praise="DualPipe fills to PP, then each pair adds one before it takes one away: PP + 1, on every rank.",
        also_right=(
            RightAnswer("with Actions", answers.peak_by_actions),
            RightAnswer("as a set of names", answers.peak_by_sets),
            RightAnswer("by accumulating letters", answers.peak_accumulated),
            RightAnswer("as a float", answers.peak_as_float),
        ),
        wrong=(
            WrongAnswer("a pair changes nothing", checks.net_of_pairs, says="both are alive"),
            WrongAnswer("I lets go", lambda row: checks.count_live(row, "BI"), says="W still needs"),
            WrongAnswer("all that pass", lambda row: sum("F" in action for action in row), says="pass in all"),
            WrongAnswer("one direction alone", checks.one_direction, says="Both directions"),
            WrongAnswer("what is left at the end", lambda row: 0, says="At the end all are gone"),
        ),
    ),
)  # fmt: skip
