"""Do experts specialise by text domain, or does it only look so? Mutual information and a permutation test.

A heat map of domains by experts always shows *some* pattern: loads are counts, and counts differ by chance.
What chance alone does is seen by handing the domains' names out at random. The units that are shuffled are
whole documents: a document's tokens resemble each other, so tokens are no independent draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import InputError


@dataclass(frozen=True)
class Specialisation:
    """The outcome of the test, by layer.

    Attributes:
        bits: mutual information of domain and expert, Float [layers].
        by_chance: the same with the names shuffled, Float [permutations, layers].
        p_value: how often chance came to as much or more, counting the real order as one of the shuffles.
    """

    bits: Float[Tensor, " layers"]
    by_chance: Float[Tensor, "permutations layers"]
    p_value: Float[Tensor, " layers"]


def mutual_information(load: Int[Tensor, "*layers domains E"]) -> Float[Tensor, "*layers"]:
    """What the domain tells of the expert, in bits: Σ p(d, e) log2 (p(d, e) / p(d) p(e)).

    0 if every domain spreads its tokens alike; at most log2 of the number of domains.
    """
    joint = load.double() / load.sum((-2, -1), keepdim=True).clamp(min=1)
    apart = joint.sum(-1, keepdim=True) * joint.sum(-2, keepdim=True)
    return torch.where(joint > 0, joint * torch.log2(joint / apart), 0.0).sum((-2, -1))


def specialisation_test(
    load: Int[Tensor, "units layers E"],
    domain: Int[Tensor, " units"],
    permutations: int = 999,
    generator: torch.Generator | None = None,
) -> Specialisation:
    """Hold the real domains against shuffled ones.

    Args:
        load: visits of each unit (document) to each expert. domain: the unit's domain, from 0.
        permutations: how many shuffles; p is no finer than 1 / (permutations + 1).
        generator: of the shuffles.

    Raises:
        InputError: fewer than two domains or no permutation, where there is nothing to test.
    """
    domains = int(domain.max()) + 1 if domain.numel() else 0
    if domains < 2 or permutations < 1:
        raise InputError(
            f"domain, permutations: {domains} domains, {permutations}; expected at least 2 and 1"
        )
    rows = load.double().transpose(0, 1)

    def bits(labels: Tensor) -> Tensor:
        members = torch.nn.functional.one_hot(labels, domains).double().T
        return mutual_information((members @ rows).round().long())

    real = bits(domain)
    chance = torch.stack(
        [bits(domain[torch.randperm(len(domain), generator=generator)]) for _ in range(permutations)]
    )
    p_value = (1 + (chance >= real - 1e-12).sum(0)) / (1 + permutations)
    return Specialisation(real, chance, p_value)
