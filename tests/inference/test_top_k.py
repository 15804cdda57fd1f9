"""top_k: the likeliest tokens alone are sampled, and speculation keeps to them as plain sampling does."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3lib import DeepSeekV3, ModelConfig
from dsv3lib.errors import InputError
from dsv3lib.inference.sampling import Sampler, probabilities


def by_loop(logits: list[float], temperature: float, top_p: float, top_k: int) -> list[float]:
    """Sorted, cut to k, softmax, cut to the nucleus, normalised: token by token."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:top_k]
    weights = (
        torch.tensor([logits[i] for i in order], dtype=torch.float64).div(temperature).softmax(0).tolist()
    )
    kept, held = [], 0.0
    for i, w in zip(order, weights, strict=True):
        if held >= top_p:
            break
        kept.append((i, w))
        held += w
    found = [0.0] * len(logits)
    for i, w in kept:
        found[i] = w / held
    return found


LOGITS = st.lists(st.integers(-9, 9).map(float), min_size=2, max_size=12)


@given(logits=LOGITS, temperature=st.sampled_from([0.5, 1.0, 2.0]), top_p=st.sampled_from([0.37, 0.83, 1.0]),
       top_k=st.integers(1, 14))  # fmt: skip
def test_top_k_is_the_loop(logits, temperature, top_p, top_k):
    got = probabilities(torch.tensor([logits]), temperature, top_p, top_k)[0]
    expected = torch.tensor(by_loop(logits, temperature, top_p, top_k))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert int((got > 0).sum()) <= top_k


def test_one_token_is_the_greedy_choice_and_none_keeps_all():
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(probabilities(logits, 0.7, 1.0, 1).argmax(-1), logits.argmax(-1))
    assert torch.equal(probabilities(logits, 0.7), probabilities(logits, 0.7, 1.0, 9))


@pytest.mark.parametrize("top_k", [0, -3])
def test_a_top_k_below_one_is_refused(top_k):
    with pytest.raises(InputError, match=rf"top_k: {top_k}, expected at least 1"):
        Sampler(1.0, top_k=top_k)


@pytest.mark.parametrize("speculative", [False, True])
def test_generation_with_top_k_of_one_is_greedy(speculative):
    config = ModelConfig.preset("nano").replace(vocab_size=24, initializer_range=0.3)
    model = DeepSeekV3(config, torch.Generator().manual_seed(0)).double().eval()
    ids = torch.randint(24, (3, 5), generator=torch.Generator().manual_seed(1))
    settings = {"max_new_tokens": 6, "speculative": speculative, "stop_tokens": ()}
    greedy = model.generate(ids, **settings)
    assert torch.equal(greedy, model.generate(ids, temperature=1.0, top_k=1, **settings))
    assert not torch.equal(greedy, model.generate(ids, temperature=3.0, **settings)), "the check can fail"
