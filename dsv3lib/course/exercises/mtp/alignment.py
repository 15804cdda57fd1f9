"""Exercises: which token a depth sees and which it predicts, the loss of all depths, and documents' borders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3lib.course.task import (
    Exercise,
    Rejected,
    RightAnswer,
    WrongAnswer,
    describe,
    expect_number,
    expect_tensor,
)


def aligned(tokens, k):
    """What depth k sees at each position beside the hidden state, and what it is to predict there (Eqs. 21, 24)."""
    return tokens[k:-1], tokens[k + 1 :]


def _check_aligned(answer: Callable[[Tensor, int], Any]) -> None:
    for length, k in ((8, 2), (8, 1), (12, 3), (6, 4)):  # at k = 1 two slips are one
        tokens = torch.arange(10, 10 + length) * 7 % 101
        got = answer(tokens.clone(), k)
        if not isinstance(got, (tuple, list)) or len(got) != 2:
            raise Rejected(f"return two things, (seen, target); you returned {describe(got)}.")
        seen, target = (torch.as_tensor(one) for one in got)
        right_seen, right_target = aligned(tokens, k)

        def same(a: Tensor, b: Tensor) -> bool:
            return a.shape == b.shape and bool((a == b).all())

        if same(seen, right_seen) and same(target, right_target):
            continue
        if same(seen, right_target) and same(target, right_seen):
            raise Rejected("the two are swapped: first what is seen, then what is predicted.")
        if same(seen, target):
            raise Rejected("seen and target are the same token: a module that is shown its target copies it.")
        if same(target, tokens[1 : 1 + len(target)]):
            raise Rejected(
                "those targets are the main model's, token i + 1; depth k predicts token i + k + 1."
            )
        if same(seen, tokens[: len(seen)]):
            raise Rejected(
                "seen holds token i itself, which the main model has read; depth k is shown token i + k."
            )
        if len(seen) == length or len(target) == length:
            raise Rejected(
                "near the end nothing lies so far ahead: a roll brings the text's beginning there."
            )
        if len(seen) != len(target):
            raise Rejected(
                f"seen has {len(seen)} tokens and target {len(target)}: a position counts only where both exist."
            )
        raise Rejected(
            f"k = {k}, {length} tokens: at position 0 the module should see token {k} and predict token {k + 1}, at "
            f"{len(right_seen)} positions in all; yours has {len(seen)} positions."
        )


def chain_loss(logits, tokens, weight):
    """λ/D Σ_k CE_k, each depth's mean over its own targets (Eqs. 24 and 25)."""
    total = 0.0
    for k, one in enumerate(logits, start=1):
        target = tokens[k + 1 :]
        total = total + F.cross_entropy(one[: len(target)], target)
    return weight / len(logits) * total


def _cross_entropy(logits: list[Tensor], tokens: Tensor, ahead: int = 1) -> list[Tensor]:
    pairs = [(one, tokens[k + ahead :]) for k, one in enumerate(logits, start=1)]
    return [F.cross_entropy(one[: len(t)], t[: len(one)]) for one, t in pairs]


def _pooled(logits, tokens, weight):
    each = [
        F.cross_entropy(one[: len(tokens) - k - 1], tokens[k + 1 :], reduction="none")
        for k, one in enumerate(logits, start=1)
    ]
    return weight * torch.cat(each).mean()


def _check_loss(answer: Callable[[list[Tensor], Tensor, float], Any]) -> None:
    draw = torch.Generator().manual_seed(42)
    for length, depths, weight in ((9, 1, 0.3), (9, 2, 0.3), (14, 3, 0.1)):
        tokens = torch.randint(11, (length,), generator=draw)
        logits = [2.0 * torch.randn(length - k, 11, generator=draw) for k in range(1, depths + 1)]
        right = float(chain_loss(logits, tokens, weight))
        mean, off, behind = (sum(_cross_entropy(logits, tokens, ahead)) for ahead in (1, 0, 2))
        summed = sum(x * (length - k - 1) for k, x in enumerate(_cross_entropy(logits, tokens), 1))
        slips = {
            float(weight * mean): "The depths are summed; λ is shared by them, so divide by D.",
            float(mean / depths): "λ is missing.",
            float(weight / depths * off): "Depth k is scored on token i + k, which it was shown.",
            float(weight / depths * behind): "The targets lie one place too far ahead.",
            float(_pooled(logits, tokens, weight)): (
                "All targets are pooled in one mean: each depth has its own, since deeper ones have fewer targets."
            ),
            float(weight / depths * summed): "Each depth's targets are summed; take their mean.",
        }
        slips = {value: text for value, text in slips.items() if abs(value - right) > 1e-4 * right}
        got = answer([one.clone() for one in logits], tokens.clone(), weight)
        expect_number(got, right, f"the loss of D = {depths}, λ = {weight}", rel=1e-4, slips=slips)


def targets_within(documents, k):
    """Where depth k has a target in the position's own document: True or False for each position but the last k + 1."""
    return documents[: len(documents) - k - 1] == documents[k + 1 :]


def _check_within(answer: Callable[[Tensor, int], Any]) -> None:
    packed = (torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), torch.tensor([3, 3, 5, 5, 5, 5, 9, 9, 9, 9, 9]))
    for documents in (*packed, torch.zeros(7, dtype=torch.int64)):
        for k in (2, 1, 0):  # at 2 all slips differ
            right = targets_within(documents, k)
            got = torch.as_tensor(answer(documents.clone(), k))
            if got.shape == documents.shape:
                if torch.equal(got.bool(), F.pad(right, (0, k + 1))):
                    continue  # False where nothing lies so far ahead: as good
                if torch.equal(got.bool(), documents == documents.roll(-k - 1)):
                    raise Rejected("the row's end wraps round: the last k + 1 positions have no target.")
            _name_slip(got, documents, k, right)
            expect_tensor(
                got.double(), right.double(), f"the targets of k = {k} for documents {documents.tolist()}"
            )


def _name_slip(got: Tensor, documents: Tensor, k: int, right: Tensor) -> None:
    """Name the rule that the answer follows instead, if it is a known one."""
    n = len(right)
    if got.ndim != 1 or not n <= len(got) <= len(documents) or torch.equal(got.bool(), right):
        return
    slips = {
        "no border is seen: positions whose target lies in another document must be False.": right | True,
        "it is the other way round: True where the target is in the same document.": ~right,
        "that asks for the document of the token that is *seen*, i + k; the target is token i + k + 1.": (
            documents[:-k] == documents[k:] if k else right
        ),
        "that is the main model's rule, whatever k is; the target lies k + 1 places on.": (
            documents[:-1] == documents[1:]
        ),
    }
    for sentence, slip in slips.items():
        if torch.equal(got[:n].bool(), slip[:n]) and not torch.equal(slip[:n], right):
            raise Rejected(sentence)


FIRST = (
    Exercise(
        id="mtp.1",
        title="what depth k sees and predicts",
        dots=1,
        minutes=4,
        prompt=(
            "Write `aligned`: for depth `k`, the tokens that the module is shown at positions 0, 1, 2, … beside the "
            "hidden state, and the tokens that it is to predict there. At position i it is shown token i + k and "
            "predicts token i + k + 1; only positions that have both count. Return `(seen, target)`."
        ),
        spec=(
            ("tokens", "[T]", "token ids of one text"),
            ("k", "number", "depth, 1 or more"),
            ("returns", "[T − k − 1] twice", "what is seen, what is predicted"),
        ),
        solution=aligned,
        checker=_check_aligned,
        hints=(
            "Write down T = 6 and k = 2 by hand: which positions have a target?",
            "The two are slices of the same length, one place apart.",
            "`tokens[k:-1]` is what is seen.",
        ),
        also_right=(
            RightAnswer("lengths counted", lambda t, k: (t[k : len(t) - 1], t[k + 1 : len(t)])),
            RightAnswer(
                "narrow", lambda t, k: (t.narrow(0, k, len(t) - k - 1), t.narrow(0, k + 1, len(t) - k - 1))
            ),
            RightAnswer("lists", lambda t, k: [t[k:].tolist()[:-1], t.tolist()[k + 1 :]]),
            RightAnswer(
                "place after place",
                lambda t, k: (
                    torch.stack([t[i + k] for i in range(len(t) - k - 1)]),
                    torch.stack([t[i + k + 1] for i in range(len(t) - k - 1)]),
                ),
            ),
            RightAnswer(
                "rolled and cut", lambda t, k: tuple(t.roll(-k - d)[: len(t) - k - 1] for d in (0, 1))
            ),
        ),
        wrong=(
            WrongAnswer("sees its target", lambda t, k: (t[k + 1 :], t[k + 1 :]), says="copies"),
            WrongAnswer("swapped", lambda t, k: (t[k + 1 :], t[k:-1]), says="swapped"),
            WrongAnswer(
                "the main model's target", lambda t, k: (t[k:-1], t[1 : len(t) - k]), says="main model's"
            ),
            WrongAnswer("the token itself", lambda t, k: (t[: -k - 1], t[k + 1 :]), says="token i itself"),
            WrongAnswer("of unequal lengths", lambda t, k: (t[k:], t[k + 1 :]), says="both exist"),
            WrongAnswer("rolled round", lambda t, k: (t.roll(-k), t.roll(-k - 1)), says="roll"),
            WrongAnswer("one too far", lambda t, k: (t[k + 1 : -1], t[k + 2 :]), says="position 0"),
        ),
        praise="One more token in, one more token out: that is all that moves from depth to depth.",
    ),
)

LATER = (
    Exercise(
        id="mtp.3",
        title="the loss of all depths",
        dots=2,
        minutes=6,
        prompt=(
            "Write `chain_loss` (Eqs. 24 and 25): each depth's mean cross-entropy over its own targets, the mean of "
            "these over the depths, times `weight` (λ). Position i of `logits[k − 1]` scores token i + k + 1; the last "
            "position of each has no target."
        ),
        spec=(
            ("logits", "list of [T − k, V]", "of depth k = 1, 2, …"),
            ("tokens", "[T]", "token ids"),
            ("weight", "number", "λ"),
            ("returns", "scalar", "what is added to the main loss, in nats"),
        ),
        solution=chain_loss,
        checker=_check_loss,
        hints=(
            "Depth k has T − k − 1 targets.",
            "`F.cross_entropy` takes the mean by itself.",
            "`enumerate(logits, start=1)` gives k.",
        ),
        also_right=(
            RightAnswer("a sum", lambda x, t, w: w * sum(_cross_entropy(x, t)) / len(x)),
            RightAnswer("stacked", lambda x, t, w: w * torch.stack(_cross_entropy(x, t)).mean()),
            RightAnswer(
                "by log_softmax",
                lambda x, t, w: sum(
                    -w / len(x) * y[:-1].log_softmax(-1).gather(-1, t[k + 2 :, None]).mean()
                    for k, y in enumerate(x)
                ),
            ),
            RightAnswer(
                "float64, a number", lambda x, t, w: float(chain_loss([y.double() for y in x], t, w))
            ),
            RightAnswer(
                "targets ignored at the end",
                lambda x, t, w: (
                    w
                    * sum(
                        F.cross_entropy(y, F.pad(t[k + 1 :], (0, 1), value=-100)) for k, y in enumerate(x, 1)
                    )
                    / len(x)
                ),
            ),
        ),
        wrong=(
            WrongAnswer(
                "not divided by D", lambda x, t, w: w * sum(_cross_entropy(x, t)), says="divide by D"
            ),
            WrongAnswer("without λ", lambda x, t, w: sum(_cross_entropy(x, t)) / len(x), says="λ is missing"),
            WrongAnswer(
                "on what it was shown",
                lambda x, t, w: w / len(x) * sum(_cross_entropy(x, t, 0)),
                says="shown",
            ),
            WrongAnswer(
                "one too far", lambda x, t, w: w / len(x) * sum(_cross_entropy(x, t, 2)), says="too far"
            ),
            WrongAnswer("one mean over all", _pooled, says="pooled"),
            WrongAnswer(
                "summed over targets",
                lambda x, t, w: (
                    w / len(x) * sum(c * (len(t) - k - 1) for k, c in enumerate(_cross_entropy(x, t), 1))
                ),
                says="take their mean",
            ),
        ),
        praise="λ is shared, so that a deeper chain does not drown the main loss.",
    ),
    Exercise(
        id="mtp.4",
        title="no target over a document's border",
        dots=2,
        minutes=6,
        prompt=(
            "Training rows are packed: several documents in one row. Write `targets_within`: for depth `k`, at which "
            "positions does the target lie in the same document? `k` = 0 is the main model. The last k + 1 positions "
            "have no target: leave them out, or say False."
        ),
        spec=(
            ("documents", "[T]", "which document each token is of; documents lie one after the other"),
            ("k", "number", "depth, 0 or more"),
            ("returns", "[T − k − 1] or [T]", "True where there is a target"),
        ),
        solution=targets_within,
        checker=_check_within,
        hints=(
            "Two documents of four tokens, k = 1: which positions predict into the second from the first?",
            "Compare the row with itself, moved.",
            "The target of position i is token i + k + 1.",
        ),
        also_right=(
            RightAnswer("unequal, negated", lambda d, k: ~(d[: -k - 1] != d[k + 1 :])),
            RightAnswer(
                "place after place", lambda d, k: [bool(d[i] == d[i + k + 1]) for i in range(len(d) - k - 1)]
            ),
            RightAnswer("padded with False", lambda d, k: F.pad(d[: -k - 1] == d[k + 1 :], (0, k + 1))),
            RightAnswer("by a difference", lambda d, k: (d[k + 1 :] - d[: len(d) - k - 1]) == 0),
            RightAnswer("unfolded", lambda d, k: (lambda w: w[:, 0] == w[:, -1])(d.unfold(0, k + 2, 1))),
        ),
        wrong=(
            WrongAnswer("the seen token's document", lambda d, k: d[: len(d) - k] == d[k:], says="seen"),
            WrongAnswer(
                "the main model's rule", lambda d, k: (d[:-1] == d[1:])[: len(d) - k - 1], says="main model's"
            ),
            WrongAnswer("wraps round", lambda d, k: d == d.roll(-k - 1), says="wraps round"),
            WrongAnswer(
                "the other way round", lambda d, k: d[: -k - 1] != d[k + 1 :], says="other way round"
            ),
            WrongAnswer("no border", lambda d, k: torch.ones(len(d) - k - 1).bool(), says="border is seen"),
            WrongAnswer(
                "one too far", lambda d, k: d[: len(d) - k - 2] == d[k + 2 :], says="should have shape"
            ),
        ),
        praise="At depth k a border costs k + 1 targets, and attention may still look across it, as V3's does.",
    ),
)
