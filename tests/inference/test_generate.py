"""Generation: greedy against a plain loop, sampling against its own distribution, every bad setting refused."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS

from dsv3lib import DeepSeekV3, ModelConfig
from dsv3lib.errors import ContextLengthError, InputError
from dsv3lib.inference.acceptance import SpeculationStatistics
from dsv3lib.inference.generate import generate, stream
from dsv3lib.inference.sampling import Sampler, probabilities

VOCAB = 40
NEVER = ()  # no stop tokens


def small_model(seed=0, vocab=VOCAB, spread=0.3, **changes):
    """A nano model in FP64 whose random weights are spread enough to prefer some tokens to others."""
    settings = {
        "vocab_size": vocab, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": spread,
        "num_nextn_predict_layers": 0, **changes,
    }  # fmt: skip
    config = ModelConfig.preset("nano").replace(**settings)
    return DeepSeekV3(config, generator=torch.Generator().manual_seed(seed)).double()


MODEL = small_model()


def prompts(batch, width, seed=0):
    return torch.randint(3, VOCAB, (batch, width), generator=torch.Generator().manual_seed(seed))


def plain_greedy(model, prompt, max_new_tokens, stops):
    """One row, one token at a time, the whole text read again for each: no cache, no batch, no padding."""
    row = list(prompt)
    with torch.no_grad():
        for _ in range(max_new_tokens):
            row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
            if row[-1] in stops:
                break
    return row


# ---- greedy ----------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    new=st.integers(1, 5),
    stops=st.lists(st.integers(0, VOCAB - 1), max_size=6),
)
def test_greedy_is_the_plain_loop_row_by_row(seed, lengths, new, stops):
    ids = prompts(len(lengths), max(lengths), seed)
    out = MODEL.generate(ids, new, stop_tokens=stops, lengths=torch.tensor(lengths))
    rows = [plain_greedy(MODEL, row[:n], new, stops) for row, n in zip(ids.tolist(), lengths, strict=True)]
    assert out.shape[1] == max(map(len, rows))
    for got, expected in zip(out.tolist(), rows, strict=True):
        assert got[: len(expected)] == expected
        assert set(got[len(expected) :]) <= {MODEL.config.pad_token_id}  # and what follows is padding


def test_a_row_ends_with_its_stop_token_and_the_others_go_on():
    ids = prompts(2, 4)
    free = MODEL.generate(ids, 10, stop_tokens=NEVER)
    stop = next(t for t in free[0, 4:].tolist() if t not in free[1].tolist())
    out = MODEL.generate(ids, 10, stop_tokens=[stop])
    end = free[0].tolist().index(stop, 4) + 1
    assert torch.equal(out[0, :end], free[0, :end]) and torch.equal(out[1], free[1])
    assert out[0, end:].tolist() == [MODEL.config.pad_token_id] * (14 - end)


def test_a_stop_token_in_the_prompt_ends_nothing():
    ids = prompts(1, 4)
    free = MODEL.generate(ids, 6, stop_tokens=NEVER)
    absent = next(t for t in range(VOCAB) if t not in free[0, 4:].tolist())
    ids[0, 3] = absent
    out = MODEL.generate(ids, 6, stop_tokens=[absent])
    assert out[0].tolist() == plain_greedy(MODEL, ids[0].tolist(), 6, [absent])


def test_the_end_token_of_the_configuration_stops_by_default():
    ids = prompts(1, 4)
    third = int(MODEL.generate(ids, 6, stop_tokens=NEVER)[0, 6])
    config = MODEL.config.replace(eos_token_id=third, pad_token_id=None)
    model = DeepSeekV3(config).double()
    model.load_state_dict(MODEL.state_dict())
    out = model.generate(torch.cat([ids, ids]), 6)
    assert out.shape[1] <= 7 and out[0, -1] == third


def test_what_fills_up_a_row_when_nothing_is_configured():
    model = small_model(eos_token_id=None, pad_token_id=None)
    ids = prompts(1, 4)
    free = model.generate(ids, 8)
    assert free.shape == (1, 12)  # without an end token nothing ends
    stop = int(free[0, 5])
    both = model.generate(torch.cat([ids, prompts(1, 4, seed=9)]), 8, stop_tokens=[stop])
    end = both[0].tolist().index(stop, 4) + 1
    assert both.shape[1] > end and set(both[0, end:].tolist()) == {0}


def test_generation_reaches_the_last_position_and_no_further():
    model = small_model(max_position_embeddings=12)
    ids = prompts(1, 5)
    assert model.generate(ids, 8, stop_tokens=NEVER).shape == (1, 13)
    with pytest.raises(ContextLengthError, match="max_new_tokens.*max_position_embeddings \\(12\\)"):
        model.generate(ids, 9, stop_tokens=NEVER)


# ---- sampling --------------------------------------------------------------------------------------------


def chi_square_z(counts, p):
    """How many standard deviations the statistic lies above its mean (Wilson and Hilferty's approximation)."""
    n = counts.sum()
    expected = n * p
    assert bool((counts[expected == 0] == 0).all()), "a token without probability was drawn"
    rare = (expected > 0) & (expected < 5)
    kept = expected >= 5
    observed = torch.cat([counts[kept], counts[rare].sum()[None]])
    expected = torch.cat([expected[kept], expected[rare].sum()[None]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    df = len(expected) - 1
    x = float(((observed - expected) ** 2 / expected).sum()) / df
    return (x ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.6, 1.0), (1.5, 0.8), (0.9, 0.6)])
def test_samples_follow_their_distribution(temperature, top_p):
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * 2
    sampler = Sampler(temperature, top_p, torch.Generator().manual_seed(4))
    counts = torch.bincount(sampler.choose(logits.expand(60_000, VOCAB)), minlength=VOCAB).double()
    p = sampler.probabilities(logits).double()
    assert abs(chi_square_z(counts, p)) < 4
    other = probabilities(logits, temperature * 1.1, min(1.0, top_p)).double()
    moved = torch.where(p > 0, other, 0.0)
    assert chi_square_z(counts, moved / moved.sum()) > 6, "the test would not see a wrong temperature"


@given(vocab=st.integers(1, 3000), rows=st.integers(1, 4), cut=st.floats(0, 0.99), scale=st.floats(0.01, 9), seed=SEEDS)
def test_a_draw_is_the_inverse_of_the_cumulated_sum(vocab, rows, cut, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    p = scale * torch.rand(rows, vocab, generator=generator).masked_fill(
        torch.rand(rows, vocab, generator=generator) < cut, 0.0
    )
    p[:, -1] += 0.5 * (p.sum(-1) == 0)
    tokens = Sampler(1.0, generator=torch.Generator().manual_seed(seed)).draw(p)
    uniform = torch.rand(rows, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for row, token, u in zip(p.double().numpy(), tokens.tolist(), uniform.tolist(), strict=True):
        total = np.cumsum(row)
        assert token == np.searchsorted(total, u[0] * total[-1], side="right") and row[token] > 0


@pytest.mark.parametrize("value", [math.nan, 0.0])
def test_nothing_is_drawn_from_what_is_no_distribution(value):
    p = torch.stack([torch.full((9,), 0.1), torch.full((9,), value)])
    with pytest.raises(InputError, match="nothing can be drawn"):
        Sampler(1.0).draw(p)


def test_a_long_tail_keeps_its_share():
    """Half of all probability on one token, half on a hundred thousand: sums in FP32 would lose of the tail."""
    p = torch.cat([torch.tensor([0.5]), torch.full((100_000,), 5e-6)])
    tokens = Sampler(1.0, generator=torch.Generator().manual_seed(0)).draw(p.expand(400, -1))
    tail = int((tokens > 0).sum())
    assert abs(tail - 200) < 4 * 10 and len(tokens[tokens > 0].unique()) > 0.97 * tail


def test_generated_tokens_follow_the_models_distribution():
    """The first two tokens of many rows, against the joint distribution computed from the logits."""
    model = small_model(vocab=6, spread=0.15, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    prompt, rows = torch.tensor([[3, 1, 4]]), 5000
    out = model.generate(
        prompt.expand(rows, 3), 2, 0.7, 0.95, generator=torch.Generator().manual_seed(5)
    )[:, 3:]  # fmt: skip
    first = probabilities(model(prompt).logits[0, -1], 0.7, 0.95)
    second = torch.stack([
        probabilities(model(torch.cat([prompt, torch.tensor([[t]])], 1)).logits[0, -1], 0.7, 0.95)
        for t in range(6)
    ])  # fmt: skip
    joint = (first[:, None] * second).detach().double().flatten()
    counts = torch.bincount(out[:, 0] * 6 + out[:, 1], minlength=36).double()
    assert abs(chi_square_z(counts, joint / joint.sum())) < 4


@given(
    logits=st.lists(st.floats(-30, 30), min_size=1, max_size=30),
    temperature=st.floats(0.05, 5),
    top_p=st.floats(0.01, 1.0),
)
def test_the_nucleus_is_the_smallest_set_of_likeliest_tokens(logits, temperature, top_p):
    logits = torch.tensor(logits)
    p = probabilities(logits, temperature, top_p)
    full = (logits / temperature).softmax(-1)
    inside = p > 0
    assert bool(inside.any()) and math.isclose(float(p.sum()), 1.0, abs_tol=1e-5)
    held = float(full[inside].sum())
    assert held >= top_p - 1e-5  # it holds enough …
    assert held - float(full[inside].min()) < top_p + 1e-5  # … and without its least likely token too little
    if bool((~inside).any()):
        assert full[inside].min() >= full[~inside].max()  # nobody outside is likelier than anybody inside
    torch.testing.assert_close(p[inside], full[inside] / held, rtol=1e-4, atol=1e-7)


def nucleus_of(logits, temperature, top_p):
    """The smallest set, by definition: ids by falling probability until ``top_p`` is held, in extended precision."""
    p = (logits.double() / temperature).softmax(-1).numpy()
    order = np.argsort(-p, kind="stable")
    held = np.cumsum(p[order].astype(np.longdouble))
    return set(order[: int(np.searchsorted(held, np.longdouble(top_p))) + 1].tolist())


@given(
    seed=SEEDS, vocab=st.sampled_from([40, 3000, 50_000]), spread=st.floats(0.01, 4), temperature=st.floats(0.3, 2),
    top_p=st.sampled_from([0.5, 0.9, 0.95, 0.99, 0.999]),
)  # fmt: skip
def test_the_nucleus_of_a_large_vocabulary_is_the_one_of_exact_sums(seed, vocab, spread, temperature, top_p):
    """A long tail of small numbers, where a sum in FP32 runs ahead of itself."""
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * spread
    p = probabilities(logits, temperature, top_p)
    assert set(torch.nonzero(p).flatten().tolist()) == nucleus_of(logits, temperature, top_p)


def test_that_check_rejects_sums_in_fp32():
    """The control: the same rule with a running sum in FP32 loses tokens of most rows at V3's vocabulary."""
    logits = torch.randn(8, 129_280, generator=torch.Generator().manual_seed(0))
    p = logits.softmax(-1)
    ranked, order = p.sort(dim=-1, descending=True, stable=True)
    outside = ranked.cumsum(-1) - ranked >= 0.99
    wrong = (~outside).sum(-1)
    right = (probabilities(logits, 1.0, 0.99) > 0).sum(-1)
    assert (wrong != right).sum() >= 4
    assert right.tolist() == [len(nucleus_of(row, 1.0, 0.99)) for row in logits]


def test_equally_likely_tokens_are_kept_from_the_lowest_id():
    assert (probabilities(torch.zeros(8), 1.0, 0.5) > 0).tolist() == [True] * 4 + [False] * 4


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300])
def test_a_temperature_near_zero_is_greedy_and_not_nan(temperature):
    logits = torch.tensor([[1000.0, 999.0, -1000.0], [-5.0, 3.0, 2.0]])
    assert probabilities(logits, temperature).tolist() == [[1, 0, 0], [0, 1, 0]]
    assert torch.equal(probabilities(logits, temperature), probabilities(logits, 0.0))


def test_a_tiny_nucleus_is_greedy():
    ids = prompts(3, 5)
    greedy = MODEL.generate(ids, 8)
    sampled = MODEL.generate(ids, 8, 1.0, 1e-6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(greedy, sampled)


def test_the_seed_decides_and_the_global_generator_is_left_alone():
    ids = prompts(2, 5)

    def sample(seed):
        return MODEL.generate(
            ids, 12, 1.0, generator=torch.Generator().manual_seed(seed), stop_tokens=NEVER
        )  # fmt: skip

    state = torch.get_rng_state()
    assert torch.equal(sample(1), sample(1)) and not torch.equal(sample(1), sample(2))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(7)
    by_global = MODEL.generate(ids, 12, 1.0, stop_tokens=NEVER)
    torch.manual_seed(7)
    assert torch.equal(by_global, MODEL.generate(ids, 12, 1.0, stop_tokens=NEVER))


# ---- the stream ------------------------------------------------------------------------------------------


def test_the_stream_gives_what_generate_returns():
    ids, lengths = prompts(3, 6), torch.tensor([6, 2, 4])
    tokens = torch.stack(list(stream(MODEL, ids, 7, stop_tokens=NEVER, lengths=lengths)), 1)
    out = MODEL.generate(ids, 7, stop_tokens=NEVER, lengths=lengths)
    for row, n, streamed in zip(out, lengths.tolist(), tokens, strict=True):
        assert torch.equal(row[n : n + 7], streamed)


def test_a_stream_may_be_abandoned_and_the_model_trained_on():
    model = small_model(seed=1)
    ids = prompts(2, 6)
    before = model.generate(ids, 5)
    running = stream(model, ids, 50, stop_tokens=NEVER)
    tokens = list(itertools.islice(running, 3))[-1]
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    model(torch.cat([ids, tokens[:, None]], 1), labels=torch.cat([ids, tokens[:, None]], 1)).loss.backward()
    assert model.lm_head.weight.grad is not None
    running.close()
    assert torch.equal(model.generate(ids, 5), before)


def test_a_stream_refuses_at_the_call():
    with pytest.raises(InputError, match="top_p"):
        stream(MODEL, prompts(1, 3), top_p=0.0)


def test_training_mode_and_gradients_are_left_as_they_were():
    model = small_model(seed=2).train()
    out = model.generate(prompts(1, 4), 3)
    assert model.training and not out.is_inference() and not out.requires_grad


# ---- bad input -------------------------------------------------------------------------------------------

GOOD = torch.tensor([[3, 4, 5], [6, 7, 8]])


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"max_new_tokens": 0}, "max_new_tokens: 0"),
        ({"max_new_tokens": -3}, "max_new_tokens: -3"),
        ({"temperature": -0.1}, "temperature: -0.1"),
        ({"temperature": math.nan}, "temperature: nan"),
        ({"temperature": math.inf}, "temperature: inf"),
        ({"top_p": 0.0}, "top_p: 0.0"),
        ({"top_p": 1.5}, "top_p: 1.5"),
        ({"top_p": math.nan}, "top_p: nan"),
        ({"stop_tokens": [VOCAB]}, f"stop_tokens: holds {VOCAB}"),
        ({"stop_tokens": [-1]}, "stop_tokens: holds -1"),
        ({"lengths": torch.tensor([3])}, "lengths: \\[3\\]"),
        ({"lengths": torch.tensor([3, 0])}, "lengths: \\[3, 0\\]"),
        ({"lengths": torch.tensor([4, 3])}, "lengths: \\[4, 3\\], expected a number in \\[1, 3\\]"),
        ({"max_new_tokens": 2100}, "max_new_tokens: a prompt of 3"),
        ({"draft_tokens": 2}, "draft_tokens: 2 given without speculation"),
        ({"statistics": SpeculationStatistics()}, "statistics: .* given without speculation"),
        ({"speculative": True}, "num_nextn_predict_layers is 0"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, words):
    with pytest.raises(InputError, match=words):
        generate(MODEL, GOOD, **settings)


@pytest.mark.parametrize(
    "ids, words",
    [
        (torch.tensor([3, 4]), "input_ids: shape \\(2,\\)"),
        (torch.zeros(0, 3, dtype=torch.int64), "input_ids: shape \\(0, 3\\)"),
        (torch.zeros(2, 0, dtype=torch.int64), "input_ids: shape \\(2, 0\\)"),
        (torch.tensor([[3, VOCAB]]), f"input_ids: holds {VOCAB}"),
        (torch.tensor([[3, -1]]), "input_ids: holds -1"),
        (torch.zeros(1, 3, dtype=torch.int64, device="meta"), "input_ids: on meta, expected cpu"),
    ],
)
def test_bad_prompts_are_refused(ids, words):
    with pytest.raises(InputError, match=words):
        generate(MODEL, ids)


def test_spoilt_weights_are_told_and_not_sampled():
    model = small_model(seed=3)
    with torch.no_grad():
        model.lm_head.weight[5, 0] = math.nan
    with pytest.raises(InputError, match="not finite"):
        model.generate(GOOD, 2)
