"""Modified Kneser-Ney: sums to one, equals the formula written with dictionaries, learns what there is to learn."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3lib.errors import DataError
from dsv3lib.training.baselines.ngram import KneserNey, unigram

V = 6
sequences = st.lists(
    st.lists(st.integers(1, V - 1), max_size=25).map(lambda s: [0, *s]), min_size=1, max_size=12
)


class Plain:
    """The same model from dictionaries, one n-gram at a time."""

    def __init__(self, texts, order):
        raw = {
            n: Counter(tuple(t[i : i + n]) for t in texts for i in range(len(t) - n + 1))
            for n in range(1, order + 1)
        }
        self.order, self.count, self.discount = order, {}, {}
        for n in range(1, order + 1):
            count = dict(raw[n])
            if n < order:
                follows = Counter(gram[1:] for gram in raw[n + 1])
                count = {g: c if g[0] == 0 else follows[g] for g, c in count.items()}
            t = [sum(c == k for c in count.values()) for k in range(5)]
            if min(t[1:]) == 0:
                d = [0, 0.75, 0.75, 0.75]
            else:
                y = t[1] / (t[1] + 2 * t[2])
                d = [0] + [min(max(k - (k + 1) * y * t[k + 1] / t[k], 0.05), k) for k in (1, 2, 3)]
            self.count[n], self.discount[n] = count, d

    def p(self, context, w, n=None):
        n = min(len(context) + 1, self.order) if n is None else n
        if n == 0:
            return 1 / V
        h = tuple(context[len(context) - n + 1 :])
        follow = [self.count[n].get((*h, v), 0) for v in range(V)]
        if sum(follow) == 0:
            return self.p(context, w, n - 1)
        d = self.discount[n]
        back = sum(min(d[min(c, 3)], c) for c in follow) / sum(follow)
        return max(follow[w] - d[min(follow[w], 3)], 0) / sum(follow) + back * self.p(context, w, n - 1)


@settings(max_examples=30)
@given(sequences, st.integers(1, 5), st.lists(st.integers(0, V - 1), max_size=6))
def test_it_sums_to_one_and_equals_the_plain_form(texts, order, context):
    model, plain = KneserNey(map(np.array, texts), V, order, bos_id=0), Plain(texts, order)
    p = model.distribution(context)
    assert p.sum() == pytest.approx(1, abs=1e-12) and p.min() > 0
    last = context[-(order - 1) :] if order > 1 else []
    assert p == pytest.approx([plain.p(last, w) for w in range(V)], rel=1e-9)


@given(sequences)
def test_a_sequence_is_scored_as_its_tokens_one_by_one(texts):
    model = KneserNey(map(np.array, texts), V, 3, bos_id=0)
    text = texts[0]
    apart = [model.distribution(text[:i])[w] for i, w in enumerate(text)]
    assert model.probabilities(np.array(text)) == pytest.approx(apart, rel=1e-9)


def test_more_context_pays_where_there_is_structure_and_not_where_there_is_none():
    rng = np.random.default_rng(0)
    cycle = np.tile([1, 2, 3, 1, 4, 5], 400)  # what follows 1 depends on what came before it
    noise = rng.integers(1, V, 2400)

    def bits(text, order):
        model = KneserNey([text[:2000]], V, order)
        return -np.log2(model.probabilities(text[2000:])[order:]).mean()

    assert bits(cycle, 5) < 0.05 < 0.3 < bits(cycle, 2) < bits(cycle, 1)
    assert bits(noise, 5) == pytest.approx(np.log2(5), rel=0.1)


def test_no_ngram_crosses_from_one_sequence_to_the_next():
    apart = KneserNey([np.array([1, 2]), np.array([3, 4])], V, 2)
    joined = KneserNey([np.array([1, 2, 3, 4])], V, 2)
    assert apart.distribution([2])[3] < joined.distribution([2])[3]


def test_what_cannot_be_counted_is_refused():
    for texts, order, told in (
        ([], 2, "no token"),
        ([np.array([V])], 2, "another tokenizer"),
        ([np.array([1])], 0, "order"),
    ):
        with pytest.raises(DataError, match=told):
            KneserNey(texts, V, order)
    assert unigram(np.array([1, 1, 2]), 4) == pytest.approx(np.array([1, 3, 2, 1]) / 7)
