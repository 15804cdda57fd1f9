"""Order and split: a real permutation, sides that never change or overlap, always some training text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3lib.errors import DataError
from dsv3lib.training.text.domains import ArithmeticDomain, ListedDomain
from dsv3lib.training.text.order import DocumentOrder, Split, derive_seed, name_fraction, permuted


def domain_of(names):
    return ListedDomain("made", {name: 1 for name in names}, lambda name: name)


@given(count=st.integers(1, 700), key=st.integers(0, 2**64 - 1))
def test_permuted_is_a_permutation(count, key):
    assert sorted(permuted(i, count, key) for i in range(count)) == list(range(count))


def test_permutations_differ_by_key_and_do_shuffle():
    first, second = ([permuted(i, 1000, key) for i in range(1000)] for key in (1, 2))
    assert first != second
    # A random permutation has one fixed point on average and rises at half of its steps.
    for order in (first, second):
        assert sum(i == value for i, value in enumerate(order)) < 10
        assert 400 < sum(a < b for a, b in zip(order, order[1:], strict=False)) < 600


def test_permuted_is_computed_place_by_place():
    count = 10**12  # a list of these would not fit
    places = {permuted(i, count, 3) for i in range(100)}
    assert len(places) == 100 and all(0 <= place < count for place in places)


def test_seeds_and_hashes_are_pinned():
    # They decide order and validation on every machine: a change would mix training into validation.
    assert derive_seed(0, "order", "code", 1) == 0x32434E89519197BA
    assert derive_seed(0, "order", "code", 2) != derive_seed(0, "order", "code", 1)
    assert [round(name_fraction(name), 6) for name in ("a.txt", "json/decoder.py")] == [0.785385, 0.11394]


@given(
    names=st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=60, unique=True),
    share=st.floats(0.0, 0.9),
    epoch=st.integers(0, 5),
)
def test_sides_are_disjoint_whole_and_usable(names, share, epoch):
    domain = domain_of(names)
    split = Split(domain, share)
    train = list(DocumentOrder(domain, split, "train", 0).epoch(epoch))
    assert train and len(set(train)) == len(train)
    assert split.has_validation() == (share > 0 and len(names) > 1)
    if split.has_validation():
        validation = list(DocumentOrder(domain, split, "validation", 7).epoch(epoch))
        assert validation and not set(train) & set(validation)
        assert sorted(train + validation) == list(range(len(names)))
    else:
        assert sorted(train) == list(range(len(names)))


def test_a_documents_side_does_not_depend_on_the_others():
    names = [f"{i}.txt" for i in range(500)]
    whole, half = domain_of(names), domain_of(names[::2])
    split, split_half = Split(whole, 0.1), Split(half, 0.1)
    assert [split.part(i) for i in range(0, 500, 2)] == [split_half.part(i) for i in range(250)]
    assert 25 < sum(split.part(i) == "validation" for i in range(500)) < 75


def test_epochs_are_shuffled_apart_and_the_endless_domain_goes_on():
    domain = domain_of([f"{i}" for i in range(50)])
    order = DocumentOrder(domain, Split(domain, 0.1), "train", 0)
    assert list(order.epoch(0)) != list(order.epoch(1))
    assert order.next_place(0, 50)[0] == 1
    endless = ArithmeticDomain(0)
    order = DocumentOrder(endless, Split(endless, 0.1), "train", 0)
    assert order.next_place(0, 10**9)[1] >= 10**9


@pytest.mark.parametrize("share", [-0.1, 1.0, 2.0, float("nan")])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(DataError, match="validation share"):
        Split(ArithmeticDomain(0), share)


def test_a_side_without_documents_is_an_error_not_a_hang():
    domain = domain_of(["only"])
    with pytest.raises(DataError, match="no document for validation"):
        DocumentOrder(domain, Split(domain, 0.1), "validation", 0).next_place(0, 0)
