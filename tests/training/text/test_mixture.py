"""The cap on passes: never broken where it can be kept, and the shares of the others keep their proportion."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3lib.errors import DataError
from dsv3lib.training.text.data import PackedStream
from dsv3lib.training.text.domains import ArithmeticDomain, held_in_memory
from dsv3lib.training.text.mixture import cap_passes, capped_weights, training_tokens
from dsv3lib.training.text.order import DocumentOrder, Split
from dsv3lib.training.text.tokenizer import default_tokenizer

TOKENIZER = default_tokenizer()
names = st.sampled_from("abcdefg")


@given(st.dictionaries(names, st.floats(0.01, 10), min_size=1), st.data())
def test_no_domain_is_read_more_than_allowed_and_the_free_ones_keep_their_proportion(weights, data):
    available = {n: data.draw(st.one_of(st.none(), st.integers(1, 10_000))) for n in weights}
    budget, most = data.draw(st.integers(1, 50_000)), data.draw(st.floats(0.5, 8))
    used = capped_weights(weights, available, budget, most)
    assert sum(used.values()) == pytest.approx(1) and min(used.values()) >= 0
    passes = {n: used[n] * budget / size for n, size in available.items() if size}
    if None in available.values() or sum(available.values()) * most >= budget:
        assert all(p <= most * (1 + 1e-9) for p in passes.values())
        free = [n for n in weights if n not in passes or passes[n] < most * (1 - 1e-9)]
        ratios = [used[n] / weights[n] for n in free]
        assert ratios == pytest.approx([max(ratios, default=0)] * len(ratios))
        total = sum(weights.values())
        assert all(used[n] >= weights[n] / total * (1 - 1e-9) for n in free)
    else:  # all are capped: the passes are the same for all
        assert list(passes.values()) == pytest.approx([max(passes.values())] * len(passes))


def test_a_domain_without_a_share_gets_none_and_bad_numbers_are_refused():
    assert capped_weights({"a": 1.0, "b": 0.0}, {"a": 10, "b": 10}, 1000) == {"a": 1.0, "b": 0.0}
    for weights, budget, most in (
        ({"a": 1.0}, 0, 4),
        ({"a": 1.0}, 10, 0),
        ({"a": -1.0}, 10, 4),
        ({"a": 0.0}, 10, 4),
    ):
        with pytest.raises(DataError, match="above 0"):
            capped_weights(weights, {"a": 5}, budget, most)


def little_and_endless() -> PackedStream:
    little = held_in_memory("little", {f"{i}": f"document {i} of a small domain. " * 9 for i in range(40)})
    return PackedStream(
        [little, ArithmeticDomain()], TOKENIZER, 64, weights={"little": 1.0, "arithmetic": 1.0}
    )


def test_a_stream_with_its_shares_cut_reads_a_small_domain_as_often_as_allowed():
    stream = little_and_endless()
    budget = 40_000
    (note,) = cap_passes(stream, budget, max_passes=2)
    assert "little 50.0% ->" in note and "at most 2 passes" in note
    for _ in range(budget // 64 // 8):
        stream.next_batch(8)
    assert set(stream.passes()) == {"little"} and 1.6 < stream.passes()["little"] < 2.2
    with pytest.raises(DataError, match="has begun"):
        stream.reweigh({"little": 1.0})


def test_what_fits_is_left_alone():
    stream = little_and_endless()
    assert cap_passes(stream, 2_000) == [] and cap_passes(stream, None) == []
    assert stream.weights == [0.5, 0.5]


def test_the_estimate_of_a_domains_tokens_is_near_the_count():
    texts = {f"{i}": f"line {i}: " + "some words and 12 numbers, " * (i % 7 + 1) for i in range(300)}
    domain = held_in_memory("d", texts)
    split = Split(domain)
    order = DocumentOrder(domain, split, "train", 0)
    counted = sum(len(TOKENIZER.encode(domain.read(i).text, bos=True, eos=True)) for i in order.epoch(0))
    assert training_tokens(domain, split, TOKENIZER) == pytest.approx(counted, rel=0.1)
    assert training_tokens(ArithmeticDomain(), Split(ArithmeticDomain()), TOKENIZER) is None
