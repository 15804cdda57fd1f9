"""Each row its own temperature and its own seed: what a row draws hangs on no other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from speculating import NEVER, chain_model, prompts

from dsv3lib.errors import InputError
from dsv3lib.inference.generate import stream
from dsv3lib.inference.sampling import Sampler


@settings(max_examples=8)
@given(
    seeds=st.lists(st.integers(0, 50), min_size=1, max_size=4),
    temperatures=st.lists(st.sampled_from([0.0, 0.7, 1.3]), min_size=4, max_size=4),
    drafts=st.sampled_from([None, 1, 3]),
)
def test_a_row_is_the_same_alone_and_in_any_batch(seeds, temperatures, drafts):
    model, ids = chain_model(1, 0.5), prompts(len(seeds), 4)
    temperatures = temperatures[: len(seeds)]
    asked = {"stop_tokens": NEVER, "speculative": drafts is not None, "draft_tokens": drafts}
    together = model.generate(ids, 8, temperatures, seeds=seeds, **asked)
    for b, (seed, temperature) in enumerate(zip(seeds, temperatures, strict=True)):
        alone = model.generate(ids[b : b + 1], 8, temperature, seeds=[seed], **asked)
        assert torch.equal(alone[0], together[b])


def test_without_seeds_of_their_own_rows_do_hang_on_each_other():
    """The control: one generator for all gives a row other numbers once a row stands beside it."""
    model, ids = chain_model(0), prompts(2, 4)
    draw = [model.generate(ids[i:], 12, 1.0, stop_tokens=NEVER, generator=torch.Generator().manual_seed(0))
            for i in (0, 1)]  # fmt: skip
    assert not torch.equal(draw[0][1], draw[1][0])


def test_equal_seeds_give_equal_rows_and_a_row_at_temperature_zero_is_greedy():
    model, ids = chain_model(0), prompts(1, 4).expand(3, -1)
    out = model.generate(ids, 12, [1.0, 1.0, 0.0], seeds=[3, 3, 4], stop_tokens=NEVER)
    assert torch.equal(out[0], out[1]) and not torch.equal(out[0], out[2])
    assert torch.equal(out[2], model.generate(ids[:1], 12, stop_tokens=NEVER)[0])
    streamed = torch.stack(list(stream(model, ids, 12, [1.0, 1.0, 0.0], seeds=[3, 3, 4], stop_tokens=NEVER)), 1)
    assert torch.equal(out[:, 4:], streamed)


def test_a_row_s_distribution_is_that_of_its_temperature():
    logits = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0))
    got = Sampler((0.0, 0.5, 2.0)).probabilities(logits)
    for row, temperature, p in zip(logits, (0.0, 0.5, 2.0), got, strict=True):
        assert torch.equal(p, Sampler(temperature).probabilities(row))


@pytest.mark.parametrize(
    "asked, says",
    [
        ({"temperature": [1.0]}, "temperature: 1 given, expected one for each of the 2 prompts"),
        ({"temperature": 1.0, "seeds": [1, 2, 3]}, "seeds: 3 given, expected one for each of the 2 prompts"),
        ({"temperature": [1.0, -0.5]}, "temperature: -0.5, expected a finite number"),
        ({"temperature": 1.0, "seeds": [1, 2], "generator": torch.Generator()}, "seeds: given beside generator"),
    ],
)
def test_what_does_not_fit_is_refused(asked, says):
    with pytest.raises(InputError, match=says):
        chain_model(0).generate(prompts(2, 3), 4, **asked)
