"""Exercises: the bias update, and the loss that balances a sequence."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsv3lib.course.task import (
    Exercise,
    Rejected,
    RightAnswer,
    WrongAnswer,
    expect_number,
    expect_same,
    expect_tensor,
)


def update(b, load, gamma):
    """Against the load: down where an expert had more than the mean, up where it had less (§2.1.2)."""
    return b + gamma * torch.sign(load.double().mean() - load).to(b.dtype)


def _check_update(answer: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    draw = torch.Generator().manual_seed(12)
    cases = [
        (torch.zeros(4), torch.tensor([9, 6, 6, 3]), 0.25),
        (torch.zeros(4), torch.tensor([7, 2, 1, 1]), 0.5),
    ]
    for experts in (8, 16):
        load = torch.randint(0, 50, (experts,), generator=draw)
        cases.append((torch.randn(experts, generator=draw), load, 0.01))
    for b, load, gamma in cases:
        given = b.clone()
        got = answer(given, load.clone(), gamma)
        if got is None and not torch.equal(given, b):
            raise Rejected("the bias was changed in place, which is fine, but it must be returned too.")
        right, mean = update(b, load, gamma), load.double().mean()

        def moved(way: Tensor, start: Tensor = b, speed: float = gamma) -> Tensor:
            return start + speed * way.to(start.dtype)

        share = (mean - load) / mean
        slips = {
            "the sign is wrong: an overloaded expert must become *less* attractive.": 2 * b - right,
            "a step is γ or nothing, whatever the size of the violation: only its sign counts.": moved(
                mean - load
            ),
            "a step is γ or nothing; yours grows with the relative violation. Only the sign counts.": moved(
                share
            ),
            "loads are compared with the median; it is the mean.": moved(
                torch.sign(load.double().median() - load)
            ),
            "that is only the step: add it to the bias that was there.": (right - b)
            if b.any()
            else load + 0.5,
            "an expert exactly at the mean should keep its bias.": moved(torch.where(load > mean, -1.0, 1.0)),
            "an expert exactly at the mean keeps its bias.": moved(torch.where(load < mean, 1.0, -1.0)),
            "only overloaded experts moved: those with too few tokens must rise.": moved(
                -(load > mean).double()
            ),
            "only idle experts moved: those with too many tokens must fall.": moved((load < mean).double()),
            "the mean was rounded to a whole number before it was compared.": moved(
                torch.sign(load.sum() // len(load) - load).double()
            ),
        }
        expect_same(
            got, {text: slip for text, slip in slips.items() if not torch.equal(slip, right)}, atol=1e-7
        )
        expect_tensor(got, right, f"the new bias for the loads {load.tolist()[:4]}…", atol=1e-7)


def _update_in_place(b, load, gamma):
    b.add_((load.sum() - load * load.numel()).sign(), alpha=gamma)
    return b


def _update_by_loop(b, load, gamma):
    mean = sum(load.tolist()) / len(load)
    for i, n in enumerate(load.tolist()):
        b[i] += gamma if n < mean else -gamma if n > mean else 0.0
    return b


def sequence_loss(s, k, alpha):
    """α Σ f_i P_i over one sequence (Eqs. 17 to 20)."""
    tokens, experts = s.shape
    chosen = torch.zeros_like(s).scatter(-1, s.topk(k, dim=-1).indices, 1.0)
    f = chosen.sum(0) * experts / (k * tokens)
    P = (s / s.sum(-1, keepdim=True)).mean(0)
    return alpha * (f * P).sum()


def _check_loss(answer: Callable[[Tensor, int, float], Tensor]) -> None:
    draw = torch.Generator().manual_seed(14)
    for tokens, experts, k, alpha in ((9, 8, 2, 0.02), (5, 16, 4, 1.0), (1, 4, 1, 0.1)):
        s = torch.rand(tokens, experts, generator=draw, dtype=torch.float64)
        got = answer(s.clone(), k, alpha)
        chosen = torch.zeros_like(s).scatter(-1, s.topk(k, dim=-1).indices, 1.0)
        count, share = chosen.sum(0), s / s.sum(-1, keepdim=True)
        f, P = count * experts / (k * tokens), share.mean(0)
        right = float(alpha * (f * P).sum())
        slips = {
            right / alpha: "α is missing.",
            float(
                alpha * (count / tokens * P).sum()
            ): "f has no factor N_r / K_r: balanced, every f should be 1.",
            float(
                alpha * (count * P).sum()
            ): "f is a plain count: divide by the tokens and multiply by N_r / K_r.",
            float(
                alpha * (f * s.mean(0)).sum()
            ): "P takes the affinities as they are; each token's sum to 1 first.",
            float(alpha * (f * share.sum(0)).sum()): "P is the mean over the tokens, not the sum.",
            float(
                alpha * (f * s.softmax(-1).mean(0)).sum()
            ): "the affinities are normalised by their sum, no softmax.",
            float(alpha * (f * P).mean()): "the products are summed over the experts, not averaged.",
            float(alpha * (f * f).sum()): "that is f times f; the second factor is P.",
            float(alpha * (P * P).sum()): "that is P times P; the first factor is f.",
        }
        expect_number(got, right, f"the loss of {tokens} tokens, {experts} experts, {k} chosen", slips=slips)
    s = torch.rand(9, 8, generator=draw, dtype=torch.float64).requires_grad_()
    got = answer(s, 2, 0.5)
    if not isinstance(got, Tensor) or not got.requires_grad:
        raise Rejected(
            "the value is right, but no gradient reaches the affinities: a loss must be a tensor that "
            "keeps it."
        )
    (own,) = torch.autograd.grad(got, s)
    (right,) = torch.autograd.grad(sequence_loss(s, 2, 0.5), s)
    expect_tensor(own, right, "the gradient of the loss (it flows through P alone)")


def _loss_with(weigh: Callable[..., Tensor]) -> Callable[[Tensor, int, float], Tensor]:
    """The loss with one thing changed: weigh(count, share, s, tokens, experts, k)."""

    def answer(s, k, alpha):
        chosen = torch.zeros_like(s).scatter(-1, s.topk(k, dim=-1).indices, 1.0)
        share = s / s.sum(-1, keepdim=True)
        return alpha * weigh(chosen.sum(0), share, s, *s.shape, k)

    return answer


EXERCISES = (
    Exercise(
        id="routing.3",
        title="the update",
        dots=1,
        minutes=4,
        prompt=(
            "Write `update`: the bias after a step in which the experts received `load` tokens. A step is "
            "γ down for an expert with more than the mean, γ up for one with less, and nothing for one "
            "exactly at the mean."
        ),
        spec=(
            ("b", "[experts]", "biases before the step"),
            ("load", "[experts]", "tokens per expert, whole numbers (int64)"),
            ("gamma", "number", "γ, the bias update speed"),
            ("returns", "[experts]", "biases after the step"),
        ),
        solution=update,
        checker=_check_update,
        hints=(
            "Compare each load with the mean load.",
            "Too many tokens: γ less. Too few: γ more. How many too many does not matter.",
            "`load` holds whole numbers: `load.double().mean()`, then `torch.sign`.",
        ),
        also_right=(
            RightAnswer("in whole numbers, in place", _update_in_place),
            RightAnswer("expert after expert", _update_by_loop),
            RightAnswer("float loads", lambda b, n, g: b - g * (n.float() - n.float().mean()).sign()),
            RightAnswer(
                "two comparisons",
                lambda b, n, g: b + g * ((n < n.double().mean()).float() - (n > n.double().mean()).float()),
            ),
            RightAnswer(
                "nested where",
                lambda b, n, g: torch.where(
                    n > n.sum() / len(n), b - g, torch.where(n < n.sum() / len(n), b + g, b)
                ),
            ),
        ),
        wrong=(
            WrongAnswer(
                "the sign the other way round",
                lambda b, n, g: b - g * torch.sign(n.double().mean() - n).float(),
                says="sign is wrong",
            ),
            WrongAnswer(
                "steps as large as the violation",
                lambda b, n, g: b + g * (n.double().mean() - n).float(),
                says="only its sign",
            ),
            WrongAnswer(
                "relative steps", lambda b, n, g: b + g * (1 - n / n.double().mean()).float(), says="relative"
            ),
            WrongAnswer(
                "against the median",
                lambda b, n, g: b + g * torch.sign(n.double().median() - n).float(),
                says="median",
            ),
            WrongAnswer(
                "the step alone",
                lambda b, n, g: g * torch.sign(n.double().mean() - n).float(),
                says="only the step",
            ),
            WrongAnswer(
                "no rest at the mean",
                lambda b, n, g: torch.where(n > n.double().mean(), b - g, b + g),
                says="exactly at the mean",
            ),
            WrongAnswer(
                "the mean in whole numbers",
                lambda b, n, g: b + g * torch.sign(n.sum() // len(n) - n),
                says="rounded",
            ),
            WrongAnswer(
                "only the overloaded",
                lambda b, n, g: b - g * (n > n.double().mean()),
                says="overloaded experts moved",
            ),
        ),
        praise="One line, no gradient, no loss. V3 was balanced by this for 14.3 trillion tokens.",
    ),
    Exercise(
        id="routing.5",
        title="the other way: a loss over a sequence",
        dots=3,
        minutes=12,
        prompt=(
            "V3 keeps a weak balance loss beside the bias. For one sequence of T tokens it is $α Σ_i f_i "
            "P_i$. Here `f_i = N_r / (K_r · T)` times the number of tokens that have expert i among the "
            "`k` best of their plain affinities, and `P_i` is the mean over the tokens of the affinity to "
            "i, after each token's affinities are divided by their sum. Write `sequence_loss`; a gradient "
            "must flow back to the affinities."
        ),
        spec=(
            ("s", "[T, N_r]", "affinities of one sequence"),
            ("k", "number", "K_r, experts per token"),
            ("alpha", "number", "α"),
            ("returns", "one number", "the loss, as a tensor"),
        ),
        solution=sequence_loss,
        checker=_check_loss,
        hints=(
            "Two vectors with a number per expert, f and P; then their product, summed.",
            "f: a one-hot of `s.topk(k).indices`, summed over the tokens, times N_r / (k · T).",
            "P: `(s / s.sum(-1, keepdim=True)).mean(0)`.",
        ),
        also_right=(
            RightAnswer(
                "bincount and a dot product",
                lambda s, k, a: (
                    a
                    * torch.dot(
                        torch.bincount(s.topk(k).indices.flatten(), minlength=s.shape[1]).to(s.dtype)
                        * s.shape[1]
                        / (k * s.shape[0]),
                        torch.nn.functional.normalize(s, p=1, dim=-1).mean(0),
                    )
                ),
            ),
            RightAnswer(
                "one-hot, einsum",
                lambda s, k, a: (
                    a
                    * s.shape[1]
                    / k
                    / s.shape[0] ** 2
                    * torch.einsum(
                        "e,te->",
                        torch.nn.functional.one_hot(s.topk(k).indices, s.shape[1]).sum((0, 1)).to(s.dtype),
                        s / s.sum(1, keepdim=True),
                    )
                ),
            ),
            RightAnswer(
                "f detached",
                _loss_with(lambda n, p, s, t, e, k: (n.detach() * e / (k * t) * p.mean(0)).sum()),
            ),
            RightAnswer(
                "expert after expert",
                lambda s, k, a: sum(
                    a
                    * (s.topk(k).indices == i).sum()
                    * s.shape[1]
                    / (k * s.shape[0])
                    * (s[:, i] / s.sum(1)).mean()
                    for i in range(s.shape[1])
                ),
            ),
            RightAnswer("a tensor of one number", lambda s, k, a: sequence_loss(s, k, a).reshape(1)),
        ),
        wrong=(
            WrongAnswer("no α", lambda s, k, a: sequence_loss(s, k, 1.0), says="α is missing"),
            WrongAnswer(
                "no factor N_r / K_r",
                _loss_with(lambda n, p, s, t, e, k: (n / t * p.mean(0)).sum()),
                says="N_r / K_r",
            ),
            WrongAnswer(
                "P not normalised",
                _loss_with(lambda n, p, s, t, e, k: (n * e / (k * t) * s.mean(0)).sum()),
                says="sum to 1 first",
            ),
            WrongAnswer(
                "P summed over the tokens",
                _loss_with(lambda n, p, s, t, e, k: (n * e / (k * t) * p.sum(0)).sum()),
                says="not the sum",
            ),
            WrongAnswer(
                "averaged over the experts",
                _loss_with(lambda n, p, s, t, e, k: (n * e / (k * t) * p.mean(0)).mean()),
                says="not averaged",
            ),
            WrongAnswer(
                "P by a softmax",
                _loss_with(lambda n, p, s, t, e, k: (n * e / (k * t) * s.softmax(-1).mean(0)).sum()),
                says="no softmax",
            ),
            WrongAnswer(
                "cut off from the gradient",
                lambda s, k, a: sequence_loss(s.detach(), k, a),
                says="no gradient",
            ),
        ),
        praise=(
            "Its minimum is α, reached when both f and P are level. Through P it pulls on the router and "
            "on all below it."
        ),
    ),
)
