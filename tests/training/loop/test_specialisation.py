"""The permutation test: it finds what is there, and does not find what is not."""

import math

import pytest
import torch

from dsv3lib.errors import InputError
from dsv3lib.training.loop.specialisation import mutual_information, specialisation_test


def units(strength, n=30, experts=8, domains=3, seed=0):
    """Documents whose tokens prefer an expert of the document's own, and (by strength) of its domain."""
    draw = torch.Generator().manual_seed(seed)
    domain = torch.arange(n) % domains
    taste = torch.randn(domains, experts, generator=draw) * strength
    own = torch.randn(n, experts, generator=draw)
    shares = (taste[domain] + own).softmax(-1)
    counts = torch.stack(
        [torch.bincount(torch.multinomial(s, 200, True, generator=draw), minlength=experts) for s in shares]
    )
    return counts[:, None], domain


def test_mutual_information_by_hand():
    apart = torch.tensor([[10, 0], [0, 10]])
    alike = torch.tensor([[5, 5], [5, 5]])
    torch.testing.assert_close(
        mutual_information(torch.stack([apart, alike])), torch.tensor([1.0, 0.0], dtype=torch.float64)
    )
    four = torch.eye(4, dtype=torch.int64) * 7
    assert mutual_information(four).item() == pytest.approx(math.log2(4))


def test_real_specialisation_is_found():
    found = specialisation_test(*units(strength=2.0), generator=torch.Generator().manual_seed(1))
    assert found.p_value.item() == pytest.approx(1 / 1000)
    assert found.bits.item() > found.by_chance.max()


def test_documents_that_differ_are_no_domains_that_differ():
    """Tokens cluster by document, so a test on tokens would cry wolf; p over many draws is about uniform."""
    p = torch.stack(
        [
            specialisation_test(*units(0.0, seed=s), 99, torch.Generator().manual_seed(s)).p_value
            for s in range(40)
        ]
    )
    assert 0.3 < p.mean() < 0.7 and (p < 0.05).double().mean() < 0.2


def test_layers_are_tested_apart():
    (strong, domain), (none, _) = units(2.0), units(0.0, seed=5)
    found = specialisation_test(torch.cat([strong, none], 1), domain, 199, torch.Generator().manual_seed(0))
    assert found.p_value[0] < 0.01 < found.p_value[1]


def test_nothing_to_test_is_refused():
    load, domain = units(1.0)
    with pytest.raises(InputError, match="1 domains"):
        specialisation_test(load, domain * 0)
    with pytest.raises(InputError, match="expected at least 2 and 1"):
        specialisation_test(load, domain, permutations=0)
