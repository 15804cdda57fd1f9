"""Models in 16 bits on a CPU: FP32 copies of the weights, as right as the plain form, never older than the weights."""

import copy
import gc
import weakref
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, build, configs, small, tokens
from torch import Tensor

from dsv3lib import DeepSeekV3, LatentCache
from dsv3lib.backends import engine, weight_copies
from dsv3lib.backends.choice import Choice
from dsv3lib.backends.few_tokens import FewChain, FewTokens
from dsv3lib.backends.weight_copies import WeightReader
from dsv3lib.training.loop.optimizer import AdamW

SIZE = small(num_nextn_predict_layers=1)
IN_16_BITS = [torch.bfloat16, torch.float16]


@torch.inference_mode()
def read(model: DeepSeekV3, ids: Tensor, pieces: list[int]) -> tuple[Tensor, Tensor, LatentCache]:
    """Logits and hidden states of a text that is read in pieces, and the cache behind it."""
    cache = LatentCache(model.config, capacity=4)
    outs = [model(part, cache=cache) for part in ids.split(pieces, 1)]
    return torch.cat([o.logits for o in outs], 1), torch.cat([o.hidden for o in outs], 1), cache


def plain(model: DeepSeekV3, ids: Tensor, pieces: list[int]) -> tuple[Tensor, Tensor, LatentCache]:
    """The same by the plain layers."""
    with mock.patch.object(Choice, "few_tokens", lambda *_: None):
        return read(model, ids, pieces)


def errors(config, seed: int, dtype: torch.dtype) -> tuple[float, float]:
    """How far the engine and the plain layers are from FP64 on the same weights: root mean squares."""
    model = build(config, seed, dtype)
    ids = tokens(config, 1, 12, seed)
    exact = read(copy.deepcopy(model).double(), ids, [12])[0]
    found = (form(model, ids, [3, 1, 2, 6])[0] for form in (read, plain))
    fast, slow = (float((logits.double() - exact).square().mean().sqrt()) for logits in found)
    return fast, slow


@pytest.mark.parametrize("dtype", IN_16_BITS)
def test_is_no_further_from_fp64_than_the_plain_form(dtype) -> None:
    """In sum without a mixture; in the middle of models with one, where a rounding may send a token elsewhere."""
    dense = [errors(SIZE.replace(first_k_dense_replace=2), seed, dtype) for seed in range(8)]
    assert sum(fast for fast, _ in dense) < 0.8 * sum(slow for _, slow in dense)
    mixed = np.array([errors(SIZE, seed, dtype) for seed in range(8)])
    assert np.median(mixed[:, 0]) < np.median(mixed[:, 1])


@settings(max_examples=15)
@given(
    config=configs(mtp=0), seed=SEEDS, dtype=st.sampled_from(IN_16_BITS),
    pieces=st.lists(st.integers(1, 6), min_size=1, max_size=5),
)  # fmt: skip
def test_any_model_stays_near_fp64(config, seed, dtype, pieces) -> None:
    """Of the same weights: all but rounding at the cache and where results leave is FP32."""
    model = build(config.replace(first_k_dense_replace=config.num_hidden_layers), seed, dtype)
    ids = tokens(config, 1, sum(pieces), seed)
    logits, hidden, cache = read(model, ids, pieces)
    exact, exact_hidden, _ = read(copy.deepcopy(model).double(), ids, pieces)
    assert logits.dtype == hidden.dtype == cache._buffers[0].dtype == dtype
    tolerance = 40 * torch.finfo(dtype).eps
    assert float((logits - exact).abs().max()) <= tolerance * max(1.0, float(exact.abs().max()))
    assert float((hidden - exact_hidden).abs().max()) <= tolerance * max(1.0, float(exact_hidden.abs().max()))


@pytest.mark.parametrize("dtype", IN_16_BITS)
def test_model_and_cache_keep_their_16_bits(dtype) -> None:
    model = build(SIZE, 0, dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = tokens(SIZE, 1, 9)
    _, _, cache = read(model, ids, [5, 1, 3])
    _, _, plain_cache = plain(model, ids, [5, 1, 3])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.dtype == (torch.float32 if "correction_bias" in name else dtype)
    assert cache.nbytes == plain_cache.nbytes
    assert cache.allocated_nbytes - cache.copies_nbytes == plain_cache.allocated_nbytes < cache.allocated_nbytes
    # The first layer's latents come from the embedding alone: a rounding apart at most.
    a, b = (c._buffers[0][0, :9].float() for c in (cache, plain_cache))
    assert float((a - b).abs().max()) <= 4 * torch.finfo(dtype).eps * float(b.abs().max())


def step_of_an_optimizer(model: DeepSeekV3) -> None:
    optimizer = AdamW(model.named_parameters())
    with torch.enable_grad():
        model(tokens(SIZE, 1, 6), labels=tokens(SIZE, 1, 6)).loss.backward()
    optimizer.step(0.1)


def one_row_of_the_head(model: DeepSeekV3) -> None:
    model.lm_head.weight[3] *= 2


def assign(model: DeepSeekV3) -> None:
    model.load_state_dict({k: v * 1.25 for k, v in model.state_dict().items()}, assign=True)


def load(model: DeepSeekV3) -> None:
    model.load_state_dict({k: v * 1.25 for k, v in model.state_dict().items()})


CHANGES = {
    "written in place": lambda m: m.model.layers[1].mlp.experts.down_proj.mul_(1.25),
    "one row written": one_row_of_the_head,
    "loaded": load,
    "assigned": assign,
    "an optimizer's step": step_of_an_optimizer,
    "written past torch's count": lambda m: [p.data.mul_(1.25) for p in m.parameters()],
    "one weight written past torch's count": lambda m: m.model.layers[0].mlp.up_proj.weight.data.fill_(0.5),
    "written in NumPy": lambda m: np.add(w := m.model.norm.weight.detach().view(torch.int16).numpy(), 64, out=w),
    "data replaced": lambda m: [setattr(p, "data", p.data * 1.25) for p in m.parameters()],
    "to FP32 and back, changed between": lambda m: (m.float(), m.lm_head.weight.mul_(2), m.bfloat16()),
    "a bias of the router": lambda m: m.routers()[0].e_score_correction_bias.add_(torch.linspace(-2, 2, 8)),
    "initialised anew": lambda m: m.initialize(torch.Generator().manual_seed(5)),
}  # fmt: skip


def changes_are_seen(name: str) -> None:
    """Logits after a change are those of a twin that was never read before."""
    model = build(SIZE, 0, torch.bfloat16)
    ids = tokens(SIZE, 1, 12)
    before = read(model, ids, [9, 1, 2])[0]
    with torch.no_grad():
        CHANGES[name](model)
    after = read(model, ids, [9, 1, 2])[0]
    twin = copy.deepcopy(model)
    assert torch.equal(after, read(twin, ids, [9, 1, 2])[0])
    assert not torch.equal(after, before)


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_weight_is_copied_anew(name) -> None:
    changes_are_seen(name)


def test_copies_that_are_never_made_anew_would_show() -> None:
    with mock.patch.object(WeightReader, "fresh", lambda self: True), pytest.raises(AssertionError):
        changes_are_seen("written in place")


def test_without_a_change_nothing_is_copied_twice() -> None:
    model = build(SIZE, 0, torch.bfloat16)
    with mock.patch.object(WeightReader, "_copy", autospec=True, side_effect=WeightReader._copy) as copies:
        read(model, tokens(SIZE, 1, 6), [3, 1, 2])
        once = copies.call_count
        read(model, tokens(SIZE, 1, 6), [3, 1, 2])
    assert once and copies.call_count == once


def test_the_table_says_what_the_copies_take() -> None:
    model = build(SIZE, 0, torch.bfloat16)
    engines = model.choice.few_token_engines(model)
    promised = {module: found.nbytes for module, found in engines.items()}
    with torch.inference_mode():
        made = {module: found.take(model.lm_head.weight).reader for module, found in engines.items()}
    assert {module: reader.nbytes for module, reader in made.items()} == promised
    for module, reader in made.items():
        parts = [module.model.layers[:2], module.model.norm, module.lm_head] if module is model else [module]
        count = sum(p.numel() for part in parts for p in part.parameters())
        padding = sum(1 for part in parts for _ in part.parameters()) * weight_copies.ALIGNMENT
        assert 4 * count <= reader.nbytes <= 4 * count + padding
        assert reader._used == reader.nbytes
    text = str(model.explain())
    assert f"in FP32, {promised[model] / 2**20:.1f} MiB" in text
    assert "in FP32" not in str(build(SIZE, 0).explain())


def test_fp32_is_read_where_it_lies() -> None:
    model = build(SIZE, 0)
    found = model.choice.few_token_engines(model)[model].take(model.lm_head.weight)
    assert isinstance(found, FewTokens) and found.reader.nbytes == 0
    assert np.shares_memory(found.weights.head, model.lm_head.weight.detach().numpy())


def test_a_weight_that_modules_share_is_copied_once() -> None:
    model = build(SIZE.replace(first_k_dense_replace=2), 0)
    model.model.layers[1].mlp.gate_proj.weight = model.model.layers[0].mlp.gate_proj.weight
    model.bfloat16()
    found = model.choice.few_token_engines(model)[model].take(model.lm_head.weight)
    first, second = (found.weights.blocks[i].ffn.gate for i in (0, 1))
    assert np.shares_memory(first, second) and found.reader._used == found.reader.nbytes


def gate_in_fp32(model: DeepSeekV3) -> None:
    model.routers()[0].weight.data = model.routers()[0].weight.data.float()


def inference_weights(model: DeepSeekV3) -> None:
    with torch.inference_mode():
        for name, parameter in list(model.named_parameters()):
            parent, _, child = name.rpartition(".")
            module = model.get_submodule(parent)
            module._parameters[child] = torch.nn.Parameter(parameter.clone(), requires_grad=False)


REFUSED = {
    "weights in two dtypes": (gate_in_fp32, "weights are in float32 beside bfloat16"),
    "made in inference mode": (inference_weights, "made in inference mode"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_copied_runs_as_it_is_and_says_why(name) -> None:
    model = build(SIZE, 0, torch.bfloat16)
    change, words = REFUSED[name]
    change(model)
    line = model.explain().lines[0]
    assert line.backend == "plain" and words in line.why
    with mock.patch.object(FewTokens, "forward") as forward:
        logits, _, _ = read(model, tokens(SIZE, 1, 4), [3, 1])
    assert not forward.called and torch.isfinite(logits).all()


def test_a_large_model_is_not_copied(monkeypatch) -> None:
    monkeypatch.setattr(engine, "MOST_COPIED", 1000)
    model = build(SIZE, 0, torch.bfloat16)
    assert "too many to copy" in model.explain().lines[0].why
    monkeypatch.setattr(WeightReader, "__init__", None)  # nothing is made
    read(model, tokens(SIZE, 1, 4), [3, 1])
    assert model.float().explain().lines[0].backend == "cpu"


def test_old_copies_are_freed_before_new_ones_are_made() -> None:
    model = build(SIZE, 0, torch.bfloat16)
    found = model.choice.few_token_engines(model)[model]
    old = weakref.ref(found.take(model.lm_head.weight).reader)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    gone = []
    make = found._make
    found._make = lambda reader: gone.append(gc.collect() is None or old() is None) or make(reader)
    assert found.take(model.lm_head.weight) is not None and gone == [True]


def test_mtp_modules_draft_in_16_bits_too() -> None:
    model = build(SIZE, 0, torch.bfloat16)
    ids = tokens(SIZE, 1, 5)
    with mock.patch.object(FewChain, "advance", autospec=True, side_effect=FewChain.advance) as taken:
        text = model.generate(ids, 8, stop_tokens=(), speculative=True)
    assert taken.call_count and text.shape == (1, 13)
    step = model.begin(ids, LatentCache(SIZE, mtp=True))
    module, hidden = model.model.layers[2], torch.randn(1, 5, SIZE.hidden_size).bfloat16()
    with torch.inference_mode():
        embedding = model.model.embed_tokens(ids)
        found = module.advance(hidden, embedding, step)[0]
        exact = copy.deepcopy(model).double()
        step = exact.begin(ids, LatentCache(SIZE, mtp=True))
        expected = exact.model.layers[2].advance(hidden.double(), embedding.double(), step)[0]
    assert found.dtype == torch.bfloat16
    assert float((found - expected).abs().max()) < 0.05
