"""Few tokens of one row: the engine in NumPy against the plain layers."""

import copy
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, assert_rejects, build, configs

from dsv3lib import DeepSeekV3, LatentCache, ModelConfig
from dsv3lib.backends import few_attention, few_blocks, few_routing, token_weights
from dsv3lib.backends.choice import Choice
from dsv3lib.backends.engine import MOST_TOKENS, is_few_tokens
from dsv3lib.backends.few_tokens import FewTokens
from dsv3lib.layers.step import Step
from dsv3lib.model.outputs import ModelOutput
from dsv3lib.rope_settings import YarnScaling

NANO = ModelConfig.preset("nano")
YARN = YarnScaling(factor=4.0, original_max_position_embeddings=64, mscale_all_dim=1.0)
CONFIGS = {
    "nano": NANO,
    "without q_lora": NANO.replace(q_lora_rank=None),
    "biases": NANO.replace(attention_bias=True),
    "yarn": NANO.replace(rope_scaling=YARN, max_position_embeddings=256),
    "one group, plain weights": NANO.replace(n_group=1, topk_group=1, norm_topk_prob=False),
    "all dense": NANO.replace(first_k_dense_replace=NANO.num_hidden_layers),
    "two shared experts": NANO.replace(n_shared_experts=2),
}
PIECES = st.lists(st.sampled_from([1, 1, 1, 2, 2, 3, 4, 5, 7, 8, 13]), min_size=1, max_size=6)


def awake(config: ModelConfig, dtype: torch.dtype) -> DeepSeekV3:
    """A model in which nothing is zero or one: routing biases, linear biases and norms drawn at random."""
    generator = torch.Generator().manual_seed(1)
    model = DeepSeekV3(config, generator=generator).to(dtype)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("norm.weight", "bias")):
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
            elif tensor.ndim > 1:
                tensor.mul_(5.0)  # the initialiser's deviation leaves small logits
    return model


@torch.inference_mode()
def read(
    model: DeepSeekV3, ids: torch.Tensor, pieces: Sequence[int], cache: LatentCache
) -> list[ModelOutput]:
    """A text, read in pieces of so many tokens."""
    assert sum(pieces) == ids.shape[1]
    return [model(part, cache=cache) for part in ids.split(list(pieces), 1)]


@contextmanager
def plain_layers() -> Iterator[None]:
    """The model without its engine."""
    with mock.patch.object(Choice, "few_tokens", lambda *_: None):
        yield


def check(model: DeepSeekV3, ids: torch.Tensor, pieces: Sequence[int], tolerance: float) -> None:
    """All that a pass gives, and the cache that it leaves, as the plain layers have it."""
    cache, plain_cache = (LatentCache(model.config, capacity=4) for _ in range(2))
    fast = read(model, ids, pieces, cache)
    with plain_layers():
        plain = read(model, ids, pieces, plain_cache)
    for a, b in zip(fast, plain, strict=True):
        assert a.logits.shape == b.logits.shape and a.hidden.shape == b.hidden.shape
        assert a.logits.dtype == b.logits.dtype and a.hidden.dtype == b.hidden.dtype
        assert float((a.logits - b.logits).abs().max()) <= tolerance
        assert float((a.hidden - b.hidden).abs().max()) <= tolerance
        for mine, theirs in zip(a.expert_indices, b.expert_indices, strict=True):
            assert (mine is None) == (theirs is None)
            assert mine is None or torch.equal(mine, theirs)
        assert torch.equal(a.expert_load, b.expert_load)
    assert len(cache) == len(plain_cache) and torch.equal(cache.lengths, plain_cache.lengths)
    for a, b in zip(cache._buffers, plain_cache._buffers, strict=True):
        assert float((a[:, : len(cache)] - b[:, : len(cache)]).abs().max()) <= tolerance


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-11)])
def test_equals_the_plain_layers(name, dtype, tolerance) -> None:
    model = awake(CONFIGS[name], dtype)
    ids = torch.randint(model.config.vocab_size, (1, 40))
    check(model, ids, [5, 1, 2, 1, 3, 4, 6, 16, 1, 1], tolerance)


def check_drawn(config: ModelConfig, seed: int, pieces: list[int], of_numpy: int, together: int) -> None:
    model = build(config, seed, torch.float64)
    ids = torch.randint(config.vocab_size, (1, sum(pieces)), generator=torch.Generator().manual_seed(seed))
    with mock.patch.multiple(few_attention, ONE_THREAD=of_numpy, TOGETHER=together):
        check(model, ids, pieces, 1e-9)


DRAWN = {
    "config": configs(mtp=0), "seed": SEEDS, "pieces": PIECES, "of_numpy": st.sampled_from([0, 300, 2**18]),
    "together": st.integers(1, 8),
}  # fmt: skip


@settings(max_examples=40)
@given(**DRAWN)
def test_any_model_in_any_pieces_equals_the_plain_layers(**drawn) -> None:
    check_drawn(**drawn)


HIDE = few_attention.hide_what_comes_later


def sees_one_more(scores: np.ndarray) -> None:
    """A mask that is off by one: each query sees the token after its own."""
    for t in range(len(scores) - 2):
        scores[t, :, t + 2 - len(scores) :] = -np.inf


def hides_its_own(scores: np.ndarray) -> None:
    """A mask that is off by one the other way."""
    HIDE(scores)
    for t in range(1, len(scores)):
        scores[t, :, scores.shape[-1] - len(scores) + t] = -np.inf


WRONG = {
    "no RoPE": (few_blocks, "rotated", lambda x, rotations: x),
    "the rotation of another row": (
        few_blocks, "rotated", lambda x, rotations: few_attention.rotated(x, np.roll(rotations, 1, 0))),
    "every token with the first one's rotation": (
        few_blocks, "rotated", lambda x, rotations: few_attention.rotated(x, rotations[:1])),
    "no mask": (few_attention, "hide_what_comes_later", lambda scores: None),
    "a mask off by one": (few_attention, "hide_what_comes_later", sees_one_more),
    "a mask that hides the token itself": (few_attention, "hide_what_comes_later", hides_its_own),
    "answers to the wrong tokens": (
        few_blocks, "sort_visits",
        lambda chosen: (v := few_routing.sort_visits(chosen))._replace(inverse=v.inverse[::-1])),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_engine_is_seen(name) -> None:
    place, attribute, wrong = WRONG[name]
    with mock.patch.object(place, attribute, wrong):
        assert_rejects(check_drawn, **DRAWN)


@settings(max_examples=10)
@given(n_new=st.sampled_from([2, 3, 5, 31, 33, 70, 128]), past=st.integers(0, 140), seed=SEEDS)
def test_pieces_of_their_real_size(n_new, past, seed) -> None:
    model = build(NANO, seed, torch.float64)
    check(model, torch.randint(NANO.vocab_size, (1, past + n_new)), [past, n_new] if past else [n_new], 1e-9)


@settings(max_examples=12)
@given(pieces=PIECES, seed=SEEDS, data=st.data())
def test_goes_on_behind_a_crop(pieces, seed, data) -> None:
    """Rejected drafts are cropped away: what follows is as if they had never been read."""
    model = build(NANO, seed, torch.float64)
    ids = torch.randint(NANO.vocab_size, (1, sum(pieces) + 6))
    kept = data.draw(st.integers(0, sum(pieces)))
    cache, fresh = LatentCache(NANO, capacity=4), LatentCache(NANO)
    read(model, ids[:, : sum(pieces)], pieces, cache)
    cache.crop(kept)
    (after,) = read(model, ids[:, -6:], [6], cache)
    text = torch.cat([ids[:, :kept], ids[:, -6:]], 1)
    with plain_layers():
        (expected,) = read(model, text, [kept + 6], fresh)
    torch.testing.assert_close(after.logits, expected.logits[:, -6:], rtol=0, atol=1e-9)


def test_is_taken_for_few_cached_tokens_in_inference_only() -> None:
    cache = LatentCache(NANO)
    x = torch.zeros(1, 3, NANO.hidden_size)
    rotations = torch.zeros(3, NANO.qk_rope_head_dim // 2, dtype=torch.complex64)
    with torch.no_grad():
        cache.plan(1, 40)
        cache.advance(40)
        step = Step(rotations, cache=cache)
        assert is_few_tokens(x, step) and is_few_tokens(x[:, :1], step)
        assert is_few_tokens(x[:, :1].expand(1, MOST_TOKENS, -1), step)
        assert not is_few_tokens(x[:, :1].expand(1, MOST_TOKENS + 1, -1), step)
        assert is_few_tokens(x[:, :1].expand(1, MOST_TOKENS + 1, -1).bfloat16(), step)
        assert not is_few_tokens(x.expand(2, 3, -1), step)
        assert not is_few_tokens(x, Step(rotations))
        assert not is_few_tokens(x, Step(rotations, cache=LatentCache(NANO, format="fp8")))
        assert not is_few_tokens(x, Step(rotations, cache=cache, lengths=torch.tensor([1])))
    assert not is_few_tokens(x, step)  # gradients are wanted


@pytest.mark.parametrize(
    ("dtype", "taken"), [(torch.float32, [5, 1, 2]), (torch.float64, [5, 1, 2]), (torch.bfloat16, [5, 1, 2])]
)
def test_takes_prompt_and_tokens(dtype, taken, monkeypatch) -> None:
    model, found = awake(NANO, dtype), []
    forward = FewTokens.forward
    monkeypatch.setattr(FewTokens, "forward", lambda *call: found.append(call[1].shape[1]) or forward(*call))
    read(model, torch.randint(NANO.vocab_size, (1, 8)), [5, 1, 2], LatentCache(NANO))
    assert found == taken


LIMITS = {"ONE_THREAD": [0, 200, 2**18], "SMALL_WEIGHT": [0, 2**15], "NARROW": [0, 64], "BLOCK_WEIGHT": [1, 20, 2**17],
          "SMALL_RESULT": [1, 12, 1200], "IN_PLACE": [False, True]}  # fmt: skip


@given(
    n=st.integers(1, 19), shape=st.tuples(st.integers(1, 9), st.integers(1, 9)), seed=SEEDS, wide=st.booleans(),
    limits=st.fixed_dictionaries({name: st.sampled_from(values) for name, values in LIMITS.items()}),
)  # fmt: skip
def test_products_are_the_same_whoever_makes_them(n, shape, seed, wide, limits) -> None:
    generator = np.random.default_rng(seed)
    weight, x = generator.standard_normal(shape), generator.standard_normal((n, 2 * shape[1]))
    x = x[:, : shape[1]] if wide else np.ascontiguousarray(x[:, : shape[1]])
    out = np.full((n, shape[0]), np.nan)
    with mock.patch.multiple(token_weights, **limits):
        np.testing.assert_allclose(token_weights.product(weight, x), x @ weight.T, atol=1e-12)
        assert token_weights.product(weight, x, out) is out
    np.testing.assert_allclose(out, x @ weight.T, atol=1e-12)


@given(
    n=st.integers(1, 5), experts=st.integers(2, 6), sizes=st.tuples(st.integers(1, 9), st.integers(1, 7)), seed=SEEDS
)
def test_experts_give_the_same_visit_after_visit_as_each_with_all_its_tokens(n, experts, sizes, seed) -> None:
    generator, (width, inner) = np.random.default_rng(seed), sizes
    normal = generator.standard_normal
    weights = token_weights.MixtureWeights(
        gate=normal((experts, width)), bias=normal(experts),
        shared=token_weights.MLPWeights(*normal((3, inner, width))),
        gate_up=list(normal((experts, 2 * inner, width))), down=list(normal((experts, width, inner))),
    )  # fmt: skip
    chosen = np.array([generator.permutation(experts)[:2] for _ in range(n)])
    h, gates = normal((n, width)), normal((n, 2))
    found = few_blocks.one_by_one(weights, h, chosen, gates)
    np.testing.assert_allclose(found, few_blocks.by_expert(weights, h, chosen, gates), atol=1e-12)
    expected = np.zeros_like(h)
    for t, a in np.ndindex(n, 2):
        gate, up = np.split(weights.gate_up[chosen[t, a]] @ h[t], 2)
        expected[t] += gates[t, a] * weights.down[chosen[t, a]] @ (gate / (1 + np.exp(-gate)) * up)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_no_product_wakes_threads_of_numpy() -> None:
    """On a busy machine OpenBLAS's threads hold a pass up for seconds; torch's are the user's to choose."""
    model = build(ModelConfig.preset("tiny"), 0)
    sizes, of_rows = [], []

    def counted(product):
        def made(a: np.ndarray, b: np.ndarray, *out: np.ndarray) -> np.ndarray:
            if b.ndim == 1:
                of_rows.append(a.size)
            else:
                sizes.append(a.shape[-2] * a.shape[-1] * b.shape[-1])
            return product(a, b, *out)

        return made

    pieces = [64, 1, 2, 32, 1, 3, 4, 5, 16]
    with mock.patch.object(np, "matmul", counted(np.matmul)), mock.patch.object(np, "dot", counted(np.dot)):
        for in_place in (False, True):
            ids = torch.randint(model.config.vocab_size, (1, sum(pieces)))
            with mock.patch.object(token_weights, "IN_PLACE", in_place):
                read(model, ids, pieces, LatentCache(model.config))
            assert token_weights.row_product(np.ones((144, 64)), np.ones(64), np.empty(144))[0] == 64
    assert sizes and max(sizes) <= token_weights.ONE_THREAD == 2**18
    assert of_rows and max(of_rows) <= 9216  # from where on OpenBLAS makes a matrix-vector product in several threads


def one_more(model: DeepSeekV3, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the last two tokens, which go through together."""
    n = ids.shape[1]
    return read(model, ids, [n - 3, 1, 2], LatentCache(model.config))[-1].logits


MOVES = {
    "cast": lambda model: model.double().float(),
    "changed in place": lambda model: [p.data.mul_(1.01) for p in model.parameters()],
    "data replaced": lambda model: [setattr(p, "data", p.data * 1.01) for p in model.parameters()],
    "assigned": lambda model: model.load_state_dict(
        {k: v * 1.01 for k, v in model.state_dict().items()}, assign=True
    ),
    "a layer replaced": lambda model: setattr(
        model.model.layers[0], "mlp", copy.deepcopy(model.model.layers[1].mlp)
    ),
    "the head replaced": lambda model: setattr(
        model, "lm_head", torch.nn.Linear(NANO.hidden_size, NANO.vocab_size, bias=False)
    ),
    "a bias moved": lambda model: model.routers()[0].e_score_correction_bias.add_(torch.linspace(-1, 1, 8)),
}


@pytest.mark.parametrize("name", MOVES)
def test_sees_weights_that_change(name) -> None:
    model = awake(NANO, torch.float32)
    assert NANO.n_routed_experts == 8
    ids = torch.randint(model.config.vocab_size, (1, 40))
    before = one_more(model, ids)
    with torch.no_grad():
        MOVES[name](model)
    after = one_more(model, ids)
    with plain_layers():
        torch.testing.assert_close(after, one_more(model, ids), rtol=0, atol=1e-4)
    if name != "cast":
        assert not torch.equal(before, after)


def test_a_copy_has_its_own_weights() -> None:
    model = awake(NANO, torch.float32)
    ids = torch.randint(model.config.vocab_size, (1, 40))
    expected = one_more(model, ids)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            model.lm_head.weight.zero_()
        assert torch.equal(one_more(twin, ids), expected)


def test_the_same_bits_every_time() -> None:
    model = awake(NANO, torch.float32)
    ids = torch.randint(model.config.vocab_size, (1, 40))
    for pieces in ([39, 1], [36, 4], [30, 10], [40]):
        first, second = (read(model, ids, pieces, LatentCache(NANO))[-1].logits for _ in range(2))
        assert torch.equal(first, second)


class Seen(LatentCache):
    """Keeps what each layer hands over, as a notebook's own cache does."""

    def append(self, layer: int, latent: torch.Tensor, *rest: object, **more: object) -> torch.Tensor:
        self.seen = {**getattr(self, "seen", {}), layer: latent}
        return super().append(layer, latent, *rest, **more)


def test_a_cache_with_methods_of_its_own_is_handed_every_latent() -> None:
    model, ids = awake(NANO, torch.float64), torch.arange(6)[None]
    own, patched, handed = Seen(NANO), LatentCache(NANO), []
    plain = patched.append
    patched.append = lambda layer, *rest: handed.append(layer) or plain(layer, *rest)
    with torch.no_grad():
        expected = model(ids, cache=LatentCache(NANO)).logits
        for cache in (own, patched):
            torch.testing.assert_close(model(ids, cache=cache).logits, expected)
    assert sorted(own.seen) == sorted(handed) == list(range(NANO.num_hidden_layers))
