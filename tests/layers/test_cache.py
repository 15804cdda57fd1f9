"""The latent cache: whatever way tokens came in, the answer is that of the whole sequence at once."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, build, configs, small, tokens

from dsv3lib import DeepSeekV3, LatentCache, ModelConfig
from dsv3lib.errors import CacheError, ContextLengthError, InputError
from dsv3lib.layers.wide_copy import WideCopy

EXACT = {"rtol": 0, "atol": 1e-11}  # fp64, logits of the order of one


@st.composite
def chunks(draw: st.DrawFn, total: int) -> list[int]:
    """A random split of ``total`` tokens."""
    sizes = []
    while sum(sizes) < total:
        sizes.append(draw(st.integers(1, total - sum(sizes))))
    return sizes


def feed(model: DeepSeekV3, cache: LatentCache, input_ids: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    parts = [model(piece, cache=cache).logits for piece in input_ids.split(sizes, 1)]
    return torch.cat(parts, 1)


# ---- equal to the whole -----------------------------------------------------------------------------------


@settings(max_examples=30)
@given(config=configs(mtp=0), seed=SEEDS, batch=st.integers(1, 3), length=st.integers(1, 14), data=st.data())
@torch.no_grad()
def test_any_split_gives_the_logits_of_the_whole(
    config: ModelConfig, seed: int, batch: int, length: int, data: st.DataObject
) -> None:
    model = build(config, seed, torch.float64)
    input_ids = tokens(config, batch, length, seed)
    cache = LatentCache(config, capacity=data.draw(st.integers(1, 8)))
    got = feed(model, cache, input_ids, data.draw(chunks(length)))
    torch.testing.assert_close(got, model(input_ids).logits, **EXACT)
    assert cache.lengths.tolist() == [length] * batch and len(cache) == length


@torch.no_grad()
def test_a_cache_that_forgot_a_token_is_noticed() -> None:
    model = build(small(), dtype=torch.float64)
    input_ids = tokens(model.config, 2, 8)
    cache = LatentCache(model.config)
    feed(model, cache, input_ids[:, :3], [3])
    got = feed(model, cache, input_ids[:, 4:], [4])
    with pytest.raises(AssertionError):
        torch.testing.assert_close(got, model(input_ids).logits[:, 4:], **EXACT)


@settings(max_examples=25)
@given(config=configs(mtp=0), seed=SEEDS, lengths=st.lists(st.integers(1, 7), min_size=2, max_size=4),
       more=st.integers(1, 4))  # fmt: skip
@torch.no_grad()
def test_unequal_rows_are_as_if_alone(config: ModelConfig, seed: int, lengths: list[int], more: int) -> None:
    """Prompts of different lengths in one batch, then a chunk, then token by token."""
    model = build(config, seed, torch.float64)
    rows = len(lengths)
    prompts = tokens(config, rows, max(lengths), seed)
    after = tokens(config, rows, more + 2, seed + 1)
    cache = LatentCache(config, capacity=4)
    first = model(prompts, cache=cache, lengths=torch.tensor(lengths)).logits
    rest = feed(model, cache, after, [2] + [1] * more)
    assert cache.lengths.tolist() == [n + more + 2 for n in lengths]
    for b, n in enumerate(lengths):
        alone = model(torch.cat([prompts[b : b + 1, :n], after[b : b + 1]], 1)).logits[0]
        torch.testing.assert_close(first[b, :n], alone[:n], **EXACT)
        torch.testing.assert_close(rest[b], alone[n:], **EXACT)


@torch.no_grad()
def test_later_chunks_may_be_unequal_too() -> None:
    model = build(small(), dtype=torch.float64)
    rows = [tokens(model.config, 1, 12, seed=b) for b in range(3)]
    taken = torch.zeros(3, dtype=torch.int64)
    cache = LatentCache(model.config)
    for counts in ([2, 3, 1], [0, 2, 3], [4, 0, 1], [1, 1, 1]):
        chunk = torch.zeros(3, max(counts), dtype=torch.int64)
        for b, n in enumerate(counts):
            chunk[b, :n] = rows[b][0, taken[b] : taken[b] + n]
        logits = model(chunk, cache=cache, lengths=torch.tensor(counts)).logits
        for b, n in enumerate(counts):
            whole = model(rows[b][:, : taken[b] + n]).logits if taken[b] + n else None
            if n:
                torch.testing.assert_close(logits[b, :n], whole[0, -n:], **EXACT)
        taken += torch.tensor(counts)
        assert torch.equal(cache.lengths, taken)


# ---- crop -------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(config=configs(mtp=0), seed=SEEDS, batch=st.integers(1, 3), data=st.data())
@torch.no_grad()
def test_cropped_tokens_were_never_seen(
    config: ModelConfig, seed: int, batch: int, data: st.DataObject
) -> None:
    model = build(config, seed, torch.float64)
    kept, wrong, right = (data.draw(st.integers(low, 6)) for low in (0, 1, 1))
    input_ids, others = tokens(config, batch, kept + right, seed), tokens(config, batch, wrong, seed + 1)
    cache = LatentCache(config, capacity=2)
    if kept:
        feed(model, cache, input_ids[:, :kept], [kept])
    feed(model, cache, others, [1] * wrong)
    cache.crop(kept)
    got = feed(model, cache, input_ids[:, kept:], data.draw(chunks(right)))
    torch.testing.assert_close(got, model(input_ids).logits[:, kept:], **EXACT)


@settings(max_examples=20)
@given(config=configs(mtp=0), seed=SEEDS, kept=st.lists(st.integers(0, 6), min_size=2, max_size=4))
@torch.no_grad()
def test_rows_may_be_cropped_each_to_its_own_length(config: ModelConfig, seed: int, kept: list[int]) -> None:
    model = build(config, seed, torch.float64)
    rows = len(kept)
    seen, after = tokens(config, rows, 6, seed), tokens(config, rows, 3, seed + 1)
    cache = LatentCache(config)
    feed(model, cache, seen, [6])
    cache.crop(torch.tensor(kept))
    assert cache.ragged == (len(set(kept)) > 1) and len(cache) == max(kept)
    got = feed(model, cache, after, [1, 2])
    for b, n in enumerate(kept):
        whole = torch.cat([seen[b : b + 1, :n], after[b : b + 1]], 1)
        torch.testing.assert_close(got[b], model(whole).logits[0, n:], **EXACT)


@torch.no_grad()
def test_rows_that_meet_again_are_equal_rows() -> None:
    model = build(small())
    cache = LatentCache(model.config)
    model(tokens(model.config, 2, 5), cache=cache, lengths=torch.tensor([3, 5]))
    assert cache.ragged
    cache.crop(3)
    assert not cache.ragged and len(cache) == 3


@pytest.mark.parametrize("length", [-1, 5, torch.tensor([4, 5]), torch.tensor([0, -1])])
@torch.no_grad()
def test_a_crop_to_what_is_not_there_is_refused(length: int | torch.Tensor) -> None:
    model = build(small())
    cache = LatentCache(model.config)
    model(tokens(model.config, 2, 4), cache=cache)
    with pytest.raises(CacheError, match=r"\[4, 4\]"):
        cache.crop(length)
    assert cache.lengths.tolist() == [4, 4]


# ---- what is unused is never read -------------------------------------------------------------------------


def poison(cache: LatentCache) -> int:
    """Fill all that no row holds with NaN; returns how many tokens' places that was."""
    places = 0
    for buffer in cache._buffers:
        for row, held in zip(buffer, cache.lengths.tolist(), strict=True):
            row[held:] = float("nan")
            places += row.shape[0] - held
    return places


@settings(max_examples=15)
@given(config=configs(mtp=0), seed=SEEDS, kept=st.lists(st.integers(0, 5), min_size=1, max_size=3))
@torch.no_grad()
def test_unused_cache_filled_with_nan_changes_nothing(
    config: ModelConfig, seed: int, kept: list[int]
) -> None:
    model = build(config, seed, torch.float64)
    rows = len(kept)
    seen, after = tokens(config, rows, 5, seed), tokens(config, rows, 3, seed + 1)
    answers = []
    for poisoned in (False, True):
        cache = LatentCache(config, capacity=20)
        feed(model, cache, seen, [5])
        cache.crop(torch.tensor(kept))
        parts = []
        for piece in after.split([2, 1], 1):
            if poisoned:
                assert poison(cache) > 0
            parts.append(model(piece, cache=cache).logits)
        answers.append(torch.cat(parts, 1))
    assert torch.isfinite(answers[1]).all()
    assert torch.equal(answers[0], answers[1])


class Leaky(LatentCache):
    """A twin that leaves in its buffer what earlier tokens left there."""

    def append(self, layer: int, latent: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        held = super().append(layer, latent, lengths)
        for row, before in zip(held, self.lengths.tolist(), strict=True):
            row[before + latent.shape[1] :] = float("nan")
        return held


@torch.no_grad()
def test_the_poison_is_seen_where_a_cache_leaks() -> None:
    model = build(small())
    cache = Leaky(model.config)
    feed(model, cache, tokens(model.config, 2, 5), [5])
    cache.crop(torch.tensor([2, 4]))
    with pytest.raises(InputError, match="NaN"):
        model(tokens(model.config, 2, 1), cache=cache)


# ---- bytes and growth -------------------------------------------------------------------------------------


def test_v3_caches_70272_bytes_a_token() -> None:
    config = ModelConfig.preset("v3-671b")
    cache = LatentCache(config)
    cache.plan(1, 2)
    for layer in range(config.num_hidden_layers):
        cache.append(layer, torch.zeros(1, 2, config.latent_dim, dtype=torch.bfloat16))
    cache.advance(2)
    assert cache.nbytes == 2 * 70272 == 2 * 61 * (512 + 64) * 2
    full_keys_and_values = 61 * 128 * (192 + 128) * 2
    assert full_keys_and_values / 70272 == pytest.approx(71.1, abs=0.05)


@torch.no_grad()
def test_nbytes_counts_the_tokens_held() -> None:
    model = build(small())
    per_token = 2 * (12 + 4) * 4  # layers, latent and key, FP32
    cache = LatentCache(model.config)
    assert cache.nbytes == cache.allocated_nbytes == 0
    model(tokens(model.config, 2, 5), cache=cache, lengths=torch.tensor([3, 5]))
    assert cache.nbytes == 8 * per_token
    assert cache.allocated_nbytes == 2 * 64 * per_token
    cache.crop(2)
    assert cache.nbytes == 4 * per_token


@torch.no_grad()
def test_growth_copies_each_token_a_bounded_number_of_times() -> None:
    config = small(num_hidden_layers=1, max_position_embeddings=4096)
    cache = LatentCache(config, capacity=1)
    sizes, copied = [0], 0
    for t in range(1000):
        cache.plan(1, 1)
        held = cache.append(0, torch.full((1, 1, config.latent_dim), float(t)))
        cache.advance(1)
        if cache.allocated_nbytes != sizes[-1]:
            sizes.append(cache.allocated_nbytes)
            copied += t
    assert len(sizes) <= 12 and copied < 2 * 1000
    assert torch.equal(held[0, :, 0], torch.arange(1000.0))


@torch.no_grad()
def test_the_reserve_stops_at_the_longest_context() -> None:
    config = small(num_hidden_layers=1, max_position_embeddings=40)
    cache = LatentCache(config, capacity=30)
    for _ in range(40):
        cache.plan(1, 1)
        cache.append(0, torch.zeros(1, 1, config.latent_dim))
        cache.advance(1)
    assert cache.allocated_nbytes == cache.nbytes


# ---- how it may be used -----------------------------------------------------------------------------------


def test_a_cache_may_pass_from_inference_mode_to_training_code() -> None:
    model = build(small(), dtype=torch.float64)
    input_ids = tokens(model.config, 2, 6)
    cache = LatentCache(model.config)
    with torch.inference_mode():
        model(input_ids[:, :3], cache=cache)
    with torch.no_grad():
        model(input_ids[:, 3:5], cache=cache)
    last = model(input_ids[:, 5:], cache=cache).logits
    torch.testing.assert_close(last[:, 0], model(input_ids).logits[:, -1], **EXACT)


def test_a_cache_keeps_no_graph() -> None:
    """With gradients on, every step would otherwise hold on to all steps before it."""
    model = build(small())
    cache = LatentCache(model.config)
    for _ in range(2):
        model(tokens(model.config, 1, 2), cache=cache)
    assert all(not buffer.requires_grad and buffer.grad_fn is None for buffer in cache._buffers)


@torch.no_grad()
def test_another_batch_is_refused_and_nothing_is_written() -> None:
    model = build(small())
    cache = LatentCache(model.config)
    model(tokens(model.config, 2, 4), cache=cache)
    with pytest.raises(CacheError, match=r"2 sequences.*batch of 3"):
        model(tokens(model.config, 3, 1), cache=cache)
    assert cache.lengths.tolist() == [4, 4]


@torch.no_grad()
def test_another_dtype_is_refused() -> None:
    model = build(small())
    cache = LatentCache(model.config, capacity=1)
    model(tokens(model.config, 1, 2), cache=cache)
    with pytest.raises(CacheError, match="float64"):
        model.double()(tokens(model.config, 1, 2), cache=cache)


@pytest.mark.parametrize("other", [{"kv_lora_rank": 8}, {"num_hidden_layers": 1}])
def test_a_cache_for_another_model_is_refused(other: dict) -> None:
    model = build(small())
    with pytest.raises(CacheError, match="cache"):
        model(tokens(model.config, 1, 2), cache=LatentCache(small(**other)))


@torch.no_grad()
def test_a_context_past_the_limit_is_refused_before_anything_is_written() -> None:
    model = build(small(max_position_embeddings=6), dtype=torch.float64)
    input_ids = tokens(model.config, 2, 6)
    fresh = LatentCache(model.config)
    with pytest.raises(ContextLengthError, match="7"):
        fresh.plan(1, 7)
    cache = LatentCache(model.config)
    model(input_ids[:, :4], cache=cache)
    with pytest.raises(ContextLengthError, match=r"7.*max_position_embeddings is 6"):
        model(input_ids[:, :3], cache=cache)
    assert cache.lengths.tolist() == [4, 4]
    got = model(input_ids[:, 4:], cache=cache).logits
    torch.testing.assert_close(got, model(input_ids).logits[:, 4:], **EXACT)
    assert model(input_ids[:, :3], cache=fresh).logits.shape[0] == 2, "a refused plan bound the batch"


@torch.no_grad()
def test_a_short_row_may_go_on_while_a_long_one_is_full() -> None:
    model = build(small(max_position_embeddings=6), dtype=torch.float64)
    input_ids = tokens(model.config, 2, 6)
    cache = LatentCache(model.config)
    model(input_ids, cache=cache, lengths=torch.tensor([3, 6]))
    with pytest.raises(ContextLengthError):
        model(input_ids[:, :1], cache=cache)
    got = model(input_ids[:, 3:5], cache=cache, lengths=torch.tensor([2, 0])).logits
    torch.testing.assert_close(got[0], model(input_ids[:1, :5]).logits[0, 3:], **EXACT)


def test_an_mtp_cache_has_room_for_the_modules() -> None:
    config = small(num_nextn_predict_layers=2)
    assert LatentCache(config).n_layers == 2 and LatentCache(config, mtp=True).n_layers == 4


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6), data=st.data())
def test_rows_of_an_array_are_kept_as_a_tensor_s(sizes: list[int], data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    of_array = np.float64 if dtype == torch.float64 else np.float32
    config = small()
    caches = [LatentCache(config, capacity=2) for _ in range(2)]
    for n_new in sizes:
        rows = np.random.default_rng(n_new).standard_normal((n_new, config.latent_dim)).astype(of_array)
        for cache in caches:
            cache.plan(1, n_new)
        expected = caches[0].append(1, torch.from_numpy(rows)[None].to(dtype))
        found = caches[1].append_rows(1, rows, dtype)
        assert found.dtype == of_array and caches[1]._buffers[1].dtype == dtype
        assert torch.equal(torch.from_numpy(found), expected[0].to(torch.from_numpy(rows).dtype))
        kept = data.draw(st.integers(0, len(caches[0]) + n_new))
        for cache in caches:
            cache.advance(n_new)
            cache.crop(kept)
        done = data.draw(st.sampled_from(["nothing", "another's rows", "a write", "a copy"]))
        for i, cache in enumerate(caches):
            if done == "another's rows":  # through the layers, then forgotten again: what lies there is theirs
                cache.append(1, torch.full((1, 3, config.latent_dim), 7.0, dtype=dtype))
            elif done == "a write":
                cache._buffers[1].mul_(2)
            elif done == "a copy":
                caches[i] = copy.deepcopy(cache)
    assert torch.equal(caches[0]._buffers[1][:, : len(caches[0])], caches[1]._buffers[1][:, : len(caches[0])])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_copies_in_fp32_are_made_of_16_bits_alone_and_counted(dtype: torch.dtype) -> None:
    config = small()
    cache, rows = LatentCache(config, capacity=16), np.zeros((3, config.latent_dim), np.float32)
    cache.plan(1, 3)
    for layer in (0, 1):
        cache.append_rows(layer, rows, dtype)
    cache.advance(3)
    buffers = 2 * 16 * config.latent_dim * dtype.itemsize
    copies = 2 * 16 * config.latent_dim * 4 if dtype == torch.bfloat16 else 0
    assert cache.copies_nbytes == copies and cache.allocated_nbytes == buffers + copies
    assert cache.nbytes == 2 * 3 * config.latent_dim * dtype.itemsize
    assert copy.deepcopy(cache).copies_nbytes == 0


def test_an_fp32_copy_that_did_not_look_would_be_seen(monkeypatch) -> None:
    config = small()
    cache, rows = LatentCache(config), np.ones((1, config.latent_dim), np.float32)
    monkeypatch.setattr(WideCopy, "holds", lambda self, buffer, start: True)
    cache.plan(1, 1)
    cache.append_rows(0, rows, torch.bfloat16)
    cache.advance(1)
    cache._buffers[0].mul_(2)
    assert not np.array_equal(cache.append_rows(0, rows, torch.bfloat16)[0], 2 * rows[0])
