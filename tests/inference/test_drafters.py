"""Whoever drafts, the text is the model's: prompt lookup, a draft model, one of your own; and what each is asked."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from speculating import (
    NEVER,
    SMALL,
    VOCAB,
    chain_model,
    deviation,
    forgets_the_residual,
    joint_distribution,
    prompts,
    sampled,
    tiny_vocabulary,
)

from dsv3lib.errors import ContextLengthError, InputError
from dsv3lib.inference.acceptance import SpeculationStatistics
from dsv3lib.inference.drafters import Drafts
from dsv3lib.inference.drafters.draft_model import DraftModel
from dsv3lib.inference.drafters.lookup import PromptLookup, lookup
from dsv3lib.inference.drafters.mtp_chain import MTPChain
from dsv3lib.inference.drafters.windows import take
from dsv3lib.inference.request import Request
from dsv3lib.inference.speculative import Speculation, Verdict, speculate


class Schedule:
    """Numbers of drafts written down beforehand: rounds without any among them, as the adaptive count makes them."""

    def __init__(self, numbers):
        self.numbers, self.round, self.most = numbers, 0, max(*numbers, 1)

    def next(self):
        self.round += 1
        return self.numbers[(self.round - 1) % len(self.numbers)]

    def saw(self, round_):
        pass


def drafter(name, noise, seed):
    return {
        "mtp": MTPChain(), "short memory": MTPChain(remembers=3), "lookup": PromptLookup(3, 1),
        "model": chain_model(0, noise / 2, seed, num_hidden_layers=1),
    }[name]  # fmt: skip


def joined(rounds, batch):
    return [sum((r.tokens[b] for r in rounds), []) for b in range(batch)]


@settings(max_examples=40)
@given(
    name=st.sampled_from(["mtp", "short memory", "lookup", "model"]),
    seed=st.integers(0, 999),
    numbers=st.lists(st.integers(0, 4), min_size=1, max_size=12),
    noise=st.sampled_from([0.0, 0.1, 1.0]),
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=3),
    new=st.integers(1, 14),
    stops=st.lists(st.integers(0, VOCAB - 1), max_size=2),
)
def test_greedy_text_is_that_of_plain_generation_whoever_drafts_and_however_many(
    name, seed, numbers, noise, lengths, new, stops
):
    model = chain_model(2, noise, seed)
    ids, given_lengths = prompts(len(lengths), max(lengths), seed), {"lengths": torch.tensor(lengths)}
    request = Request.of(model, ids, new, stop_tokens=stops, **given_lengths)
    rows = request.rows()
    for round_ in speculate(model, request, Schedule(numbers), drafter=drafter(name, noise, seed)):
        for row, tokens in zip(rows, round_.tokens, strict=True):
            row.extend(tokens)
    assert torch.equal(request.pad(rows), model.generate(ids, new, stop_tokens=stops, **given_lengths))


@pytest.mark.parametrize("remembers", [2, 64])
def test_after_rounds_without_drafts_the_chain_drafts_as_if_it_had_never_paused(remembers):
    """With a memory that is long enough; a short one drafts from what it has, and the text stays right."""
    model, ids = chain_model(2, 0.15), prompts(1, 4)
    request = Request.of(model, ids, 24, stop_tokens=NEVER)
    always = list(speculate(model, request, 2, drafter=MTPChain()))
    paused = list(speculate(model, request, Schedule([0, 0, 0, 0, 0, 2]), drafter=MTPChain(remembers)))
    assert joined(always, 1) == joined(paused, 1)
    at = {}
    position = 0
    for round_ in always:
        at[position] = round_.drafts[0]
        position += len(round_.tokens[0])
    position, same, compared = 0, 0, 0
    for round_ in paused:
        if round_.drafts[0] and position in at:
            compared += 1
            same += round_.drafts[0][:1] == at[position][:1]
        position += len(round_.tokens[0])
    assert compared >= 3
    if remembers > 24:  # than the whole text: nothing is forgotten
        assert same == compared


@pytest.mark.parametrize("rows", [1, 3])
def test_of_a_long_prompt_the_chain_reads_what_it_remembers_where_rounds_without_drafts_came_first(rows):
    model, ids = chain_model(2, 0.15), prompts(rows, 20)
    lengths = torch.tensor([20, 3, 12][:rows])
    request = Request.of(model, ids, 12, stop_tokens=NEVER, lengths=lengths)
    for numbers, read in (([2], range(20, 30)), ([0, 0, 0, 2], range(1, 10))):
        state = Speculation(model, request, Schedule(numbers), drafter=MTPChain(6))
        rounds = [state.begin()] + [state.step() for _ in range(3)]
        assert (len(state.drafting.cache) == 0) == (len(numbers) > 1)  # no draft was made yet
        rounds.append(state.step())
        assert len(state.drafting.cache) in read
        assert max(len(d) for d in rounds[-1].drafts) == 2
        while not state.ended.all():
            rounds.append(state.step())
        text = request.rows()
        for round_ in rounds:
            for row, tokens in zip(text, round_.tokens, strict=True):
                row.extend(tokens)
        assert torch.equal(request.pad(text), model.generate(ids, 12, stop_tokens=NEVER, lengths=lengths))


@given(
    starts=st.lists(st.integers(-2, 9), min_size=1, max_size=3), width=st.integers(0, 6), wide=st.booleans(),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_a_window_is_the_loop(starts, width, wide, seed):
    shape = (len(starts), 8, 3) if wide else (len(starts), 8)
    values = torch.randint(100, shape, generator=torch.Generator().manual_seed(seed))
    found = take(values, np.array(starts), width)
    assert found.shape == (len(starts), width, *shape[2:])
    for row, start in enumerate(starts):
        for i in range(width):
            assert torch.equal(found[row, i], values[row, min(max(start + i, 0), 7)])


# ---- prompt lookup ----------------------------------------------------------------------------------------


@given(
    text=st.lists(st.integers(0, 3), min_size=1, max_size=24), most=st.integers(1, 5),
    longest=st.integers(1, 5), shortest=st.integers(1, 5),
)  # fmt: skip
def test_lookup_is_the_loop(text, most, longest, shortest):
    shortest = min(shortest, longest)

    def by_loop():
        for n in range(longest, shortest - 1, -1):
            for start in range(len(text) - n - 1, -1, -1):
                if text[start : start + n] == text[-n:]:
                    return text[start + n : start + n + most]
        return []

    assert lookup(np.array(text), most, longest, shortest) == by_loop()


def test_of_copied_text_nearly_every_draft_stands():
    """A model whose next token hangs on the newest alone soon goes round in a circle: the plain twin's best case."""
    model, statistics = chain_model(0, 0.0, spread=1.0), SpeculationStatistics()
    model.generate(
        prompts(4, 6), 80, speculative=True, stop_tokens=NEVER, drafter="lookup", statistics=statistics
    )
    assert statistics.acceptance > 0.8 and statistics.tokens_per_pass > 2


def test_lookup_needs_no_mtp_module_and_drafts_nothing_of_new_text():
    model, statistics = chain_model(0, 1.0), SpeculationStatistics()
    ids = torch.arange(9)[None]
    model.generate(ids, 1, speculative=True, stop_tokens=NEVER, drafter="lookup", statistics=statistics)
    assert lookup(np.arange(9), 4) == [] and statistics.drafted == []


# ---- a draft model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_drafts_for_itself_is_always_right(temperature):
    model, statistics = chain_model(0, 1.0), SpeculationStatistics()
    model.generate(
        prompts(4, 5), 1 + 5 * 6, temperature, speculative=True, stop_tokens=NEVER, drafter=model,
        statistics=statistics, generator=torch.Generator().manual_seed(2),
    )  # fmt: skip
    assert statistics.acceptance == 1.0 and statistics.tokens_per_pass == 5
    other = SpeculationStatistics()
    model.generate(
        prompts(4, 5), 31, temperature, speculative=True, stop_tokens=NEVER, statistics=other,
        drafter=chain_model(0, 1.0, seed=9), generator=torch.Generator().manual_seed(2),
    )  # fmt: skip
    assert other.acceptance < 0.5


# ---- the distribution -------------------------------------------------------------------------------------


def threshold(drafts, q, logits, sizes, sampler):
    """Wrong: a draft stands where the model finds it likely enough."""
    p = sampler.probabilities(logits)
    likely = p[:, :-1].gather(-1, drafts[..., None]).squeeze(-1) > 0.3
    accepted = (likely & (torch.arange(drafts.shape[1]) < sizes[:, None])).long().cumprod(-1).sum(-1)
    return Verdict(accepted, sampler.draw(p[torch.arange(len(drafts)), accepted]))


PROMPT = torch.tensor([[1, 2, 0, 1, 2]])
"""Its last two tokens have stood before, so that something is looked up from the first round on."""


@pytest.mark.parametrize("name", ["mtp", "lookup", "model"])
def test_the_joint_distribution_of_several_tokens_is_the_model_s(name):
    model = tiny_vocabulary(2)
    p, statistics = joint_distribution(model, PROMPT, 1.0, 1.0), SpeculationStatistics()
    small = tiny_vocabulary(0) if name == "model" else drafter(name, 0.0, 0)
    counts = sampled(model, PROMPT, 1.0, 1.0, statistics=statistics, drafter=small)
    assert 0.15 < statistics.acceptance < 0.95
    assert abs(deviation(counts, p)) < 4


@pytest.mark.parametrize("name", ["mtp", "lookup", "model"])
@pytest.mark.parametrize("verifier", [threshold, forgets_the_residual])
def test_both_wrong_samplers_are_seen_whoever_drafts(name, verifier):
    model = tiny_vocabulary(2)
    p = joint_distribution(model, PROMPT, 1.0, 1.0)
    small = tiny_vocabulary(0) if name == "model" else drafter(name, 0.0, 0)
    assert deviation(sampled(model, PROMPT, 1.0, 1.0, verifier, drafter=small), p) > 8


def test_rounds_without_drafts_leave_the_distribution_alone():
    model = tiny_vocabulary(1)
    p = joint_distribution(model, PROMPT, 1.0, 1.0)
    assert abs(deviation(sampled(model, PROMPT, 1.0, 1.0, draft_tokens=Schedule([1, 0, 3])), p)) < 4


# ---- one of your own, and bad input -----------------------------------------------------------------------


class Constant:
    """Guesses the same token each time: the least that a drafter can be."""

    def __init__(self, token):
        self.token = token

    def drafts_a_round(self, model):
        return 2

    def begin(self, model, request, hidden, most):
        return self

    def draft(self, text, n, sizes):
        tokens = torch.full((len(n), int(sizes.max())), self.token)
        return Drafts(tokens, None, sizes)

    def confirm(self, before, n, hidden):
        pass


def test_a_drafter_of_your_own_may_be_as_bad_as_it_likes():
    model, ids = chain_model(0), prompts(3, 4)
    out = model.generate(ids, 9, speculative=True, stop_tokens=NEVER, drafter=Constant(5))
    assert torch.equal(out, model.generate(ids, 9, stop_tokens=NEVER))


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: "ngram", 'drafter: \'ngram\', expected "mtp", "lookup", a DeepSeekV3'),
        (lambda: 3, "drafter: 3, expected"),
        (lambda: chain_model(0, vocab_size=SMALL, bos_token_id=None, eos_token_id=None, pad_token_id=None),
         "vocabulary has 4 tokens, the model's 24"),
    ],
)  # fmt: skip
def test_what_cannot_draft_is_refused(make, says):
    with pytest.raises(InputError, match=says):
        chain_model(1).generate(prompts(1, 3), 4, speculative=True, drafter=make())


def test_a_draft_model_with_too_short_a_context_is_refused():
    small = chain_model(0, max_position_embeddings=8)
    with pytest.raises(ContextLengthError, match="reads at most 8 tokens.*may have 12"):
        chain_model(0).generate(prompts(1, 3), 10, speculative=True, drafter=small)


def test_a_drafter_without_speculation_is_refused():
    with pytest.raises(InputError, match="drafter: 'lookup' given without speculation"):
        chain_model(1).generate(prompts(1, 3), 4, drafter="lookup")


@pytest.mark.parametrize("longest, shortest", [(2, 3), (4, 0)])
def test_n_grams_of_no_length_are_refused(longest, shortest):
    with pytest.raises(InputError, match="1 <= shortest <= longest"):
        PromptLookup(longest, shortest)


def test_a_draft_model_may_be_given_as_such():
    model = chain_model(1)
    out = model.generate(prompts(1, 3), 4, speculative=True, drafter=DraftModel(model), stop_tokens=NEVER)
    assert torch.equal(out, model.generate(prompts(1, 3), 4, stop_tokens=NEVER))
