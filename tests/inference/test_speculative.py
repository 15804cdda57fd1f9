"""Speculative decoding: the text is what it would have been, the counts are right, a wrong verifier is seen."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from speculating import (
    NEVER,
    VOCAB,
    chain_model,
    deviation,
    forgets_the_residual,
    joint_distribution,
    prompts,
    sampled,
    tiny_vocabulary,
)

from dsv3lib import LatentCache
from dsv3lib.errors import InputError
from dsv3lib.inference.acceptance import Round, SpeculationStatistics, expected_tokens_per_pass
from dsv3lib.inference.drafters.mtp_chain import ChainDrafting
from dsv3lib.inference.request import Request, prefill
from dsv3lib.inference.sampling import Sampler
from dsv3lib.inference.speculative import Speculation, Verdict, speculate, verify
from dsv3lib.rope_settings import YarnScaling


@given(seed=st.integers(0, 2**31), temperature=st.sampled_from([0.0, 0.7, 1.0]), rows=st.integers(1, 3))
def test_a_round_without_drafts_picks_as_one_whose_drafts_are_none(seed, temperature, rows) -> None:
    logits = torch.randn(rows, 2, VOCAB, generator=torch.Generator().manual_seed(seed))
    none, sizes = torch.full((rows, 1), -1), torch.zeros(rows, dtype=torch.int64)

    def verdict(drafts):
        draws = tuple(torch.Generator().manual_seed(seed + b) for b in range(rows))
        sampler = Sampler(temperature, generators=draws)
        m = drafts.shape[1]
        q = None if sampler.greedy else torch.full((rows, m, VOCAB), 1 / VOCAB)
        return verify(drafts, q, logits[:, : m + 1], sizes, sampler)

    for part, expected in zip(verdict(none[:, :0]), verdict(none), strict=True):
        assert torch.equal(part, expected)


# ---- greedy ----------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**31),
    depth=st.integers(1, 3),
    draft_tokens=st.one_of(st.none(), st.integers(1, 6)),
    noise=st.sampled_from([0.0, 0.05, 0.2, 1.0]),
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    new=st.integers(1, 8),
    stops=st.lists(st.integers(0, VOCAB - 1), max_size=2),
    changes=st.sampled_from([
        {}, {"q_lora_rank": None}, {"first_k_dense_replace": 0}, {"first_k_dense_replace": 2},
        {"rope_scaling": YarnScaling(40.0, 64, mscale_all_dim=1.0)}, {"max_position_embeddings": 22},
    ]),
)  # fmt: skip
def test_greedy_text_is_that_of_plain_generation(
    seed, depth, draft_tokens, noise, lengths, new, stops, changes
):
    model = chain_model(depth, noise, seed % 1000, **changes)
    settings = {"stop_tokens": stops, "lengths": torch.tensor(lengths)}
    ids = prompts(len(lengths), max(lengths), seed)
    plain = model.generate(ids, new, **settings)
    drafted = model.generate(ids, new, speculative=True, draft_tokens=draft_tokens, **settings)
    assert torch.equal(plain, drafted)


def test_rows_that_accept_differently_part_and_are_right():
    model = chain_model(depth=2, noise=0.2)
    ids = prompts(6, 5)
    request = Request.of(model, ids, 20, stop_tokens=NEVER)
    rounds = list(speculate(model, request))
    assert len({tuple(r.accepted) for r in rounds}) > 2 and any(len(set(r.accepted)) > 1 for r in rounds)
    joined = [sum((r.tokens[b] for r in rounds), []) for b in range(6)]
    assert joined == model.generate(ids, 20, stop_tokens=NEVER)[:, 5:].tolist()


@pytest.mark.parametrize("new", range(1, 9))
def test_no_token_more_than_asked_for(new):
    model = chain_model(depth=2, noise=0.0)
    out = model.generate(prompts(2, 3), new, speculative=True, stop_tokens=NEVER, draft_tokens=3)
    assert out.shape == (2, 3 + new)


@pytest.mark.parametrize("place", range(7))
def test_a_stop_token_ends_the_row_wherever_it_stands(place):
    """Among accepted drafts, behind them, or as the very first token."""
    model = chain_model(depth=3, noise=0.05)
    ids = prompts(3, 4)
    free = model.generate(ids, 7, stop_tokens=NEVER)
    settings = {"stop_tokens": [int(free[0, 4 + place])]}
    statistics = SpeculationStatistics()
    drafted = model.generate(ids, 7, speculative=True, statistics=statistics, **settings)
    assert torch.equal(drafted, model.generate(ids, 7, **settings))
    assert sum(statistics.accepted) <= statistics.tokens <= sum(statistics.accepted) + statistics.passes


def test_drafts_may_not_pass_the_last_position():
    model = chain_model(depth=1, noise=0.0, max_position_embeddings=12)
    ids, lengths = prompts(2, 6), torch.tensor([6, 2])
    for draft_tokens in (1, 4, 9):
        out = model.generate(
            ids, 7, speculative=True, draft_tokens=draft_tokens, lengths=lengths, stop_tokens=NEVER
        )
        assert torch.equal(out, model.generate(ids, 7, lengths=lengths, stop_tokens=NEVER))


# ---- what stands between two rounds ----------------------------------------------------------------------


def latents(cache, layers, row, length):
    return [cache._buffers[layer][row, :length] for layer in layers]


@pytest.mark.parametrize("depth, draft_tokens", [(1, 4), (2, 2), (3, 5)])
def test_after_each_round_the_caches_hold_the_confirmed_tokens_and_no_draft(depth, draft_tokens):
    model = chain_model(depth, noise=0.15)
    lengths = torch.tensor([4, 1])
    request = Request.of(model, prompts(2, 4), 9, stop_tokens=NEVER, lengths=lengths)
    state = Speculation(model, request, draft_tokens, verify)
    state.begin()
    used = min(depth, draft_tokens)
    main, chain = range(2), range(2, 2 + used)
    while not bool(state.ended.all()):
        drafting = [b for b in range(2) if int(state.n[b] - lengths[b]) < 8 and not state.ended[b]]
        before, held = state.n.clone(), state.drafting.cache.lengths.clone()
        state.step()
        assert torch.equal(state.cache.lengths, state.n - 1)
        for b in range(2):
            n = int(state.n[b])
            alone = Request.of(model, state.text[b : b + 1, : n - 1], 1)
            fresh = LatentCache(model.config)
            _, hidden = prefill(model, alone, fresh)
            for got, expected in zip(
                latents(state.cache, main, b, n - 1), latents(fresh, main, 0, n - 1), strict=True
            ):
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
            length = int(state.drafting.cache.lengths[b])
            sure = min(int(before[b]) - 1, max(n - 1 - used, 0))
            assert length == (sure if b in drafting else int(held[b]))
            again = ChainDrafting(model, request.sampler, hidden, draft_tokens, 64)
            again.draft(state.text[b : b + 1], state.n[b : b + 1], torch.tensor([draft_tokens]))
            for got, expected in zip(
                latents(state.drafting.cache, chain, b, length), latents(again.cache, chain, 0, length),
                strict=True,
            ):  # fmt: skip
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
            window = state.drafting.hidden[b, : n - 1 - length]
            if b in drafting:
                torch.testing.assert_close(window, hidden[0, length:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("depth", [1, 3])
def test_drafts_are_what_the_training_time_chain_predicts(depth):
    """Cached and row by row in drafting; whole and uncached in training (`return_mtp`): the same tokens."""
    model = chain_model(depth, noise=0.15)
    request = Request.of(model, prompts(2, 4), 12, stop_tokens=NEVER, lengths=torch.tensor([4, 2]))
    seen = []

    def watching(drafts, q, logits, sizes, sampler):
        seen.append((state.text.clone(), state.n.clone(), drafts, sizes))
        return verify(drafts, q, logits, sizes, sampler)

    state = Speculation(model, request, depth, watching)
    state.begin()
    while not bool(state.ended.all()):
        state.step()
    compared = 0
    for text, n, drafts, sizes in seen:
        for b in range(2):
            for k in range(int(sizes[b])):
                row = torch.cat([text[b, : n[b]], drafts[b]])[None]
                logits = model(row, return_mtp=True).mtp_logits[k][0, int(n[b]) - 2]
                assert int(drafts[b, k]) == int(logits.argmax())
                compared += 1
    assert compared > 10


# ---- sampling --------------------------------------------------------------------------------------------

def always_accept(drafts, q, logits, sizes, sampler):
    """Wrong: what the drafter says is taken for what the model says."""
    p = sampler.probabilities(logits)[torch.arange(len(drafts)), sizes]
    return Verdict(sizes, sampler.draw(p))


@pytest.mark.parametrize(
    "depth, draft_tokens, temperature, top_p",
    [(2, None, 1.0, 1.0), (1, 3, 0.8, 0.9)],
)
def test_the_distribution_of_the_text_does_not_change(depth, draft_tokens, temperature, top_p):
    model, prompt = tiny_vocabulary(depth), torch.tensor([[1, 2, 0]])
    p = joint_distribution(model, prompt, temperature, top_p)
    assert abs(float(p.sum()) - 1) < 1e-6 and int((p > 0.005).sum()) > 12  # there is something to get wrong
    statistics = SpeculationStatistics()
    counts = sampled(model, prompt, temperature, top_p, verify, draft_tokens, statistics)
    assert 0.2 < statistics.acceptance < 0.95  # drafts stand and fall
    assert abs(deviation(counts, p)) < 4


@pytest.mark.parametrize("verifier", [always_accept, forgets_the_residual])
def test_a_wrong_verifier_changes_the_distribution_and_is_seen(verifier):
    model, prompt = tiny_vocabulary(2), torch.tensor([[1, 2, 0]])
    p = joint_distribution(model, prompt, 1.0, 1.0)
    assert deviation(sampled(model, prompt, 1.0, 1.0, verifier), p) > 8


@given(
    p=st.lists(st.floats(-4, 4), min_size=5, max_size=5),
    q=st.lists(st.floats(-4, 4), min_size=5, max_size=5),
)
def test_one_draft_comes_out_as_p_whatever_q_was(p, q):
    """Σ over the drafts of q · P(out | draft), each measured with its own uniform numbers, is p."""
    logits, q = torch.tensor([p, p]), torch.tensor(q).softmax(-1)
    sampler = Sampler(1.0, 1.0, torch.Generator().manual_seed(0))
    p, n = logits[0].softmax(-1), 20_000
    drafts = sampler.draw(q.expand(n, 5))[:, None]
    verdict = verify(drafts, q.expand(n, 1, 5), logits.expand(n, 2, 5), torch.ones(n).long(), sampler)
    out = torch.where(verdict.accepted == 1, drafts[:, 0], verdict.token)
    assert abs(float((verdict.accepted == 1).float().mean()) - float(torch.minimum(p, q).sum())) < 0.02
    torch.testing.assert_close(torch.bincount(out, minlength=5) / n, p, rtol=0, atol=0.02)


def test_equal_seeds_give_equal_text():
    model = tiny_vocabulary(1)
    one, two = (
        model.generate(
            torch.tensor([[1, 2], [3, 0]]), 20, 1.0, speculative=True,
            generator=torch.Generator().manual_seed(5),
        )
        for _ in range(2)
    )  # fmt: skip
    assert torch.equal(one, two)


# ---- acceptance and its counts ---------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("depth, draft_tokens", [(1, 1), (2, 2), (1, 4), (3, 2)])
def test_a_drafter_that_knows_what_the_model_knows_is_always_right(depth, draft_tokens, temperature):
    model = chain_model(depth, noise=0.0)
    statistics = SpeculationStatistics()
    model.generate(
        prompts(8, 3), 1 + 3 * (draft_tokens + 1), temperature, speculative=True, stop_tokens=NEVER,
        draft_tokens=draft_tokens, statistics=statistics, generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    assert statistics.acceptance == 1.0 and statistics.passes == 3 * 8
    assert statistics.tokens_per_pass == draft_tokens + 1 == expected_tokens_per_pass(1.0, draft_tokens)


def test_a_drafter_that_knows_nothing_is_right_by_chance():
    model = chain_model(depth=1, noise=1.0, spread=1.0)
    statistics = SpeculationStatistics()
    model.generate(prompts(32, 4), 12, speculative=True, stop_tokens=NEVER, statistics=statistics)
    assert statistics.acceptance < 4 / VOCAB  # chance is 1 / VOCAB
    assert statistics.tokens_per_pass < 1.2


def test_the_counts_of_a_written_down_story():
    statistics = SpeculationStatistics()
    assert math.isnan(statistics.acceptance) and math.isnan(statistics.tokens_per_pass)
    statistics.add(Round([[5, 6], [7, 8]], [2, 0], [[5, 6, 1], [9]]))
    statistics.add(Round([[4, 3], []], [1, 0], [[4, 2], []]))  # the second row has ended
    statistics.add(Round([[], []], [0, 0], [[6], []]))  # the last token of a row is not drafted
    assert (statistics.passes, statistics.tokens) == (4, 7)
    assert (statistics.drafted, statistics.accepted) == ([3, 3], [2, 1])
    assert statistics.acceptance == 0.5 and statistics.acceptance_by_depth == [2 / 3, 1 / 3]
    assert statistics.tokens_per_pass == 7 / 4


@given(st.floats(0, 0.99), st.integers(0, 8))
def test_expected_tokens_have_their_closed_form(acceptance, draft_tokens):
    expected = (1 - acceptance ** (draft_tokens + 1)) / (1 - acceptance)
    assert math.isclose(expected_tokens_per_pass(acceptance, draft_tokens), expected, rel_tol=1e-9)


# ---- bad input -------------------------------------------------------------------------------------------


def test_without_mtp_modules_there_is_no_speculation():
    model = chain_model(depth=0)
    with pytest.raises(InputError, match="no MTP module.*num_nextn_predict_layers is 0"):
        model.generate(prompts(1, 3), 4, speculative=True)


@pytest.mark.parametrize("draft_tokens", [0, -2])
def test_a_number_of_drafts_below_one_is_refused(draft_tokens):
    with pytest.raises(InputError, match=f"draft_tokens: {draft_tokens}"):
        chain_model().generate(prompts(1, 3), 4, speculative=True, draft_tokens=draft_tokens)


@given(
    rows=st.lists(st.lists(st.integers(-1, 4), min_size=3, max_size=3), min_size=1, max_size=3), greedy=st.booleans(),
    seed=st.integers(0, 2**31 - 1), sizes=st.integers(0, 3),
)  # fmt: skip
def test_a_draft_of_minus_one_is_none_and_ends_its_row_s(rows, greedy, seed, sizes):
    """A row judges as if it had been given only the drafts before."""
    drafts = torch.tensor(rows)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(rows), 4, 5, generator=generator)
    q = None if greedy else torch.rand(len(rows), 3, 5, generator=generator).softmax(-1)
    given_sizes = torch.full((len(rows),), sizes)
    until = torch.tensor([min(sizes, row.index(-1) if -1 in row else 3) for row in rows])

    def judged(drafts, sizes):
        sampler = Sampler(0.0 if greedy else 1.0, generator=torch.Generator().manual_seed(seed))
        return verify(drafts, q, logits, sizes, sampler)

    with_none, without = judged(drafts, given_sizes), judged(drafts.clamp(min=0), until)
    assert torch.equal(with_none.accepted, without.accepted) and torch.equal(with_none.token, without.token)
    assert bool((with_none.accepted <= until).all())
