"""The packed stream: nothing lost or repeated, borders right, weights kept, any state resumes bit for bit."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3lib.errors import DataError
from dsv3lib.training.text.data import PackedStream
from dsv3lib.training.text.domains import ArithmeticDomain, ListedDomain, builtin_domains
from dsv3lib.training.text.fim import from_psm
from dsv3lib.training.text.folder import folder_domains
from dsv3lib.training.text.order import Split
from dsv3lib.training.text.tokenizer import default_tokenizer

TOKENIZER = default_tokenizer()
FIELDS = ("input_ids", "labels", "document_ids", "domain_ids")


def made(name: str, texts: dict[str, str]) -> ListedDomain:
    return ListedDomain(name, {key: len(text.encode()) for key, text in texts.items()}, texts.__getitem__)


def domains_of_lengths(*lengths: int) -> list[ListedDomain]:
    """One domain for each number, with so many documents of growing length, each text unlike any other."""
    return [
        made(f"d{d}", {f"{i}": f"[{d}.{i}] " + "word " * (i * 3 % 17) for i in range(count)})
        for d, count in enumerate(lengths)
    ]


def equal(a, b) -> bool:
    return all(torch.equal(getattr(a, field), getattr(b, field)) for field in FIELDS)


def lines_of(stream: PackedStream, batches) -> dict[str, list[tuple[int, int]]]:
    """For each domain its rows laid end to end, as (document id, token)."""
    lines = {name: [] for name in stream.domain_names}
    for batch in batches:
        for ids, documents, domains in zip(
            batch.input_ids, batch.document_ids, batch.domain_ids, strict=True
        ):
            assert domains.unique().numel() == 1  # a row is of one domain
            lines[stream.domain_names[domains[0]]] += zip(documents.tolist(), ids.tolist(), strict=True)
    return lines


def documents_of(line: list[tuple[int, int]]) -> list[tuple[int, list[int]]]:
    """The line cut where the document id changes; the last one may be unfinished and is left out."""
    documents: list[tuple[int, list[int]]] = []
    for number, token in line:
        if not documents or documents[-1][0] != number:
            documents.append((number, []))
        documents[-1][1].append(token)
    return documents[:-1]


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    seq_len=st.integers(2, 40),
    batch_sizes=st.lists(st.integers(1, 9), min_size=1, max_size=30),
    fim_rate=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_packing_loses_nothing_repeats_nothing_and_keeps_borders(
    lengths, seq_len, batch_sizes, fim_rate, seed
):
    domains = domains_of_lengths(*lengths)
    stream = PackedStream(
        domains, TOKENIZER, seq_len, weights={d.name: 1.0 for d in domains}, seed=seed, fim_rate=fim_rate
    )
    batches = [stream.next_batch(size) for size in batch_sizes]
    numbers = set()
    for line, domain in zip(lines_of(stream, batches).values(), domains, strict=True):
        documents = documents_of(line)
        assert not numbers & {number for number, _ in documents}
        numbers |= {number for number, _ in documents}
        assert [number for number, _ in documents] == sorted(number for number, _ in documents)
        split = Split(domain)
        train = {domain.read(i).text for i in range(domain.count) if split.part(i) == "train"}
        read = []
        for _, ids in documents:
            assert ids[0] == TOKENIZER.bos_id and ids[-1] == TOKENIZER.eos_id
            assert TOKENIZER.bos_id not in ids[1:] and TOKENIZER.eos_id not in ids[:-1]
            assert (TOKENIZER.fim_begin_id in ids) == (fim_rate == 1.0) or fim_rate == 0.5
            read.append(from_psm(TOKENIZER, ids[1:-1]))
        # Every epoch is the whole training side, each document once.
        for start in range(0, len(read), len(train)):
            epoch = read[start : start + len(train)]
            assert len(set(epoch)) == len(epoch) and set(epoch) <= train
            assert len(epoch) < len(train) or set(epoch) == train


@given(batch_sizes=st.lists(st.integers(1, 7), min_size=1, max_size=12), seq_len=st.integers(2, 33))
def test_rows_do_not_depend_on_how_they_are_grouped(batch_sizes, seq_len):
    one, other = (PackedStream(domains_of_lengths(5, 9), TOKENIZER, seq_len) for _ in range(2))
    parts = [one.next_batch(size) for size in batch_sizes]
    whole = other.next_batch(sum(batch_sizes))
    for field in FIELDS:
        assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(whole, field))


def test_a_batch_has_the_promised_shape_and_labels():
    stream = PackedStream(domains_of_lengths(6), TOKENIZER, 32, batch_size=3)
    batch = next(stream)
    assert all(
        getattr(batch, field).shape == (3, 32) and getattr(batch, field).dtype == torch.int64
        for field in FIELDS
    )
    assert torch.equal(batch.labels, batch.input_ids) and batch.labels is not batch.input_ids
    assert next(iter(stream)).input_ids.shape == (3, 32)
    assert (batch.document_ids.diff(dim=1) >= 0).all() and batch.document_ids.unique().numel() > 1


@given(
    before=st.integers(0, 25),
    after=st.integers(1, 10),
    seed=st.integers(0, 2**31),
    seq_len=st.integers(2, 50),
)
def test_any_state_resumes_bit_for_bit_through_json(before, after, seed, seq_len):
    def fresh():
        return PackedStream(
            [*domains_of_lengths(3, 8), ArithmeticDomain(1)], TOKENIZER, seq_len, seed=seed, fim_rate=0.5
        )

    stream = fresh()
    for i in range(before):
        stream.next_batch(1 + i % 4)
    saved = json.dumps(stream.state_dict())
    resumed = fresh()
    resumed.next_batch(3)  # wherever it stands, the state decides
    resumed.load_state_dict(json.loads(saved))
    assert json.dumps(resumed.state_dict()) == saved
    assert all(equal(stream.next_batch(2), resumed.next_batch(2)) for _ in range(after))
    assert stream.state_dict() == resumed.state_dict()


def test_the_state_is_small_and_resumes_on_the_real_text():
    def fresh():
        return PackedStream(builtin_domains(), TOKENIZER, 256, seed=5)

    stream = fresh()
    for _ in range(20):
        stream.next_batch(8)
    state = stream.state_dict()
    assert len(json.dumps(state)) < 4000
    resumed = fresh()
    resumed.load_state_dict(state)
    assert equal(stream.next_batch(8), resumed.next_batch(8))
    assert not equal(
        fresh().next_batch(8), PackedStream(builtin_domains(), TOKENIZER, 256, seed=6).next_batch(8)
    )


@given(weights=st.lists(st.floats(0.05, 10), min_size=2, max_size=4), rows=st.integers(1, 200))
def test_weights_hold_to_within_a_row_or_two_at_any_moment(weights, rows):
    domains = domains_of_lengths(*[3] * len(weights))
    stream = PackedStream(
        domains, TOKENIZER, 4, weights={d.name: w for d, w in zip(domains, weights, strict=True)}
    )
    counts = np.bincount(stream.next_batch(rows).domain_ids[:, 0], minlength=len(weights))
    wanted = rows * np.array(weights) / sum(weights)
    assert np.abs(counts - wanted).max() < len(weights)


def test_weights_left_out_and_default_ones():
    domains = domains_of_lengths(3, 3)
    only = PackedStream(domains, TOKENIZER, 4, weights={"d1": 2.0})
    assert only.weights == [0.0, 1.0] and (only.next_batch(9).domain_ids == 1).all()
    assert PackedStream(domains, TOKENIZER, 4).weights == pytest.approx([0.5, 0.5], abs=0.1)
    builtin = PackedStream(builtin_domains(["arithmetic", "german"]), TOKENIZER, 4)
    assert builtin.weights == pytest.approx([0.18 / 0.23, 0.05 / 0.23])


def test_fim_is_applied_at_its_rate():
    stream = PackedStream([ArithmeticDomain(0)], TOKENIZER, 512, seed=3)
    batches = [stream.next_batch(32) for _ in range(6)]
    documents = [ids for _, ids in documents_of(lines_of(stream, batches)["arithmetic"])]
    share = sum(TOKENIZER.fim_begin_id in ids for ids in documents) / len(documents)
    assert len(documents) > 800
    assert abs(share - 0.1) < 4 * (0.1 * 0.9 / len(documents)) ** 0.5


def test_validation_is_fixed_disjoint_and_plain():
    domains = builtin_domains(["german", "docs", "arithmetic"])
    streams = [PackedStream(domains, TOKENIZER, 64, seed=seed, fim_rate=1.0) for seed in (0, 1)]
    streams[1].next_batch(4)  # neither the seed nor how far training is matters
    for which, name in enumerate(streams[0].domain_names):
        first, second = (stream.validation_batches(name, 3, 4) for stream in streams)
        assert first and len(first) == len(second) and all(map(equal, first, second))
        assert all((batch.domain_ids == which).all() for batch in first)
        ids = torch.cat([batch.input_ids for batch in first]).flatten().tolist()
        assert TOKENIZER.fim_begin_id not in ids
        split = Split(domains[which])
        count = domains[which].count or 400
        held = [domains[which].read(i).text for i in range(count) if split.part(i) == "validation"]
        for document in TOKENIZER.decode(ids, skip_special=False).split("<|begin_of_sentence|>")[1:-1]:
            plain = document.removesuffix("<|end_of_sentence|>")
            assert any(text.startswith(plain) for text in held)


def test_validation_that_runs_out_is_padded_and_shorter():
    texts = {f"{i}": f"text number {i}" for i in range(40)}
    domain = made("few", texts)
    stream = PackedStream([domain], TOKENIZER, 16, validation_share=0.3)
    batches = stream.validation_batches("few", 100, 4)
    assert 1 <= len(batches) < 10
    last = batches[-1]
    padding = last.input_ids == TOKENIZER.pad_id
    assert torch.equal(last.labels == -100, padding) and padding[:-1].sum() == 0
    assert torch.equal(last.labels[~padding], last.input_ids[~padding])
    assert (last.document_ids.diff(dim=1) >= 0).all()
    split = Split(domain, 0.3)
    held = [
        TOKENIZER.encode(texts[f"{i}"], bos=True, eos=True)
        for i in range(40)
        if split.part(i) == "validation"
    ]
    tokens = sum(int((batch.labels != -100).sum()) for batch in batches)
    assert tokens == sum(map(len, held))  # each document once
    assert PackedStream([made("one", {"a": "text"})], TOKENIZER, 8).validation_batches("one", 1, 1) == []


def test_a_stream_that_is_interrupted_stands_where_it_stood():
    class Interrupted(Exception):
        pass

    texts = {f"{i}": f"text number {i} " * 5 for i in range(20)}
    fail_at = {"left": 10**9}

    def reader(name):
        fail_at["left"] -= 1
        if fail_at["left"] == 0:
            raise Interrupted
        return texts[name]

    domains = [ListedDomain("d", {key: len(text) for key, text in texts.items()}, reader)]
    stream = PackedStream(domains, TOKENIZER, 16)
    stream.next_batch(3)
    before = stream.state_dict()
    fail_at["left"] = 3
    with pytest.raises(Interrupted):
        stream.next_batch(20)
    assert stream.state_dict() == before
    undisturbed = PackedStream([made("d", texts)], TOKENIZER, 16)
    undisturbed.next_batch(3)
    assert equal(stream.next_batch(20), undisturbed.next_batch(20))


def test_a_state_of_another_stream_is_refused_and_changes_nothing():
    stream = PackedStream(domains_of_lengths(4), TOKENIZER, 16)
    stream.next_batch(2)
    state = stream.state_dict()
    others = {
        "seq_len": PackedStream(domains_of_lengths(4), TOKENIZER, 17),
        "seed": PackedStream(domains_of_lengths(4), TOKENIZER, 16, seed=1),
        "fim_rate": PackedStream(domains_of_lengths(4), TOKENIZER, 16, fim_rate=0.2),
        "validation_share": PackedStream(domains_of_lengths(4), TOKENIZER, 16, validation_share=0.2),
        "domains": PackedStream(domains_of_lengths(5), TOKENIZER, 16),
    }
    for field, other in others.items():
        before = other.state_dict()
        with pytest.raises(DataError, match=f"taken with {field}="):
            other.load_state_dict(state)
        assert other.state_dict() == before
    with pytest.raises(DataError, match="version None"):
        stream.load_state_dict({})


def test_a_document_that_changed_since_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("one two three " * 50)

    def fresh():
        return PackedStream(folder_domains(tmp_path)[0], TOKENIZER, 16)

    stream = fresh()
    stream.next_batch(1)
    (tmp_path / "a.txt").write_text("one two threw " * 50)  # the same length
    with pytest.raises(DataError, match="'a.txt' of domain .* has changed"):
        fresh().load_state_dict(stream.state_dict())


def test_blank_documents_are_passed_over_and_only_blank_ones_are_an_error():
    mixed = PackedStream([made("d", {"a": "", "b": " \n", "c": "text"})], TOKENIZER, 4, validation_share=0.0)
    line = lines_of(mixed, [mixed.next_batch(40)])["d"]
    assert {
        TOKENIZER.decode(ids) if TOKENIZER.fim_begin_id not in ids else from_psm(TOKENIZER, ids)
        for _, ids in documents_of(line)
    } == {"text"}
    blank = PackedStream([made("d", {"a": "", "b": " \n"})], TOKENIZER, 4, validation_share=0.0)
    with pytest.raises(DataError, match="all training documents are blank"):
        blank.next_batch(1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seq_len": 1}, "seq_len is 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"fim_rate": 1.1}, "fim_rate is 1.1"),
        ({"fim_rate": float("nan")}, "fim_rate is nan"),
        ({"validation_share": 1.0}, "validation share is 1.0"),
        ({"weights": {"d9": 1.0}}, "weights name .'d9'."),
        ({"weights": {"d0": -1.0}}, "weights are"),
        ({"weights": {"d0": float("inf")}}, "weights are"),
        ({"weights": {}}, "weights are"),
        ({"domains": []}, "at least one"),
        ({"domains": domains_of_lengths(2) * 2}, "names must differ"),
    ],
)
def test_arguments_out_of_range_are_refused(change, message):
    arguments = {"domains": domains_of_lengths(2), "seq_len": 8} | change
    with pytest.raises(DataError, match=message):
        PackedStream(arguments.pop("domains"), TOKENIZER, arguments.pop("seq_len"), **arguments)


def test_calls_out_of_range_are_refused():
    stream = PackedStream(domains_of_lengths(2), TOKENIZER, 8)
    with pytest.raises(DataError, match="batch_size is 0"):
        stream.next_batch(0)
    with pytest.raises(DataError, match="unknown domain 'x'.*d0"):
        stream.validation_batches("x", 1, 1)
    for numbers in ((0, 1, 8), (1, 0, 8), (1, 1, 1)):
        with pytest.raises(DataError, match="must be at least"):
            stream.validation_batches("d0", *numbers)
