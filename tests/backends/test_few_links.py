"""MTP modules over few tokens of one row: the engine in NumPy against the module itself."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, assert_rejects, build, configs, small, tokens
from torch import Tensor, nn

from dsv3lib import DeepSeekV3, LatentCache, ModelConfig
from dsv3lib.backends import few_attention, few_blocks, few_tokens
from dsv3lib.backends.choice import Choice
from dsv3lib.backends.few_tokens import FewLink
from dsv3lib.inference.request import Request
from dsv3lib.inference.speculative import speculate, verify
from dsv3lib.layers.mtp import MTPModule
from dsv3lib.layers.norm import RMSNorm
from dsv3lib.layers.operations import PLAIN_OPERATIONS
from dsv3lib.linear import PlainRecipe, set_recipe

SIZE = small(num_nextn_predict_layers=2)


@torch.inference_mode()
def chain(model: DeepSeekV3, ids: Tensor, pieces: list[int], plain: bool) -> tuple[list[Tensor], LatentCache]:
    """What each module makes of a text that it reads in pieces, and the cache of all."""
    cache, out = LatentCache(model.config, mtp=True, capacity=4), []
    generator = torch.Generator().manual_seed(1)
    dtype = model.lm_head.weight.dtype
    for part in ids.split(pieces, 1):
        hidden = torch.randn(*part.shape, model.config.hidden_size, generator=generator).to(dtype)
        step = model.begin(part, cache)
        step = replace(step, backend=PLAIN_OPERATIONS) if plain else step
        for module in model.model.layers[model.config.num_hidden_layers :]:
            hidden, routing = module.advance(hidden, model.model.embed_tokens(part), step)
            out += [hidden] if routing is None else [hidden, routing.indices, routing.scores]
        cache.advance(part.shape[1])
    return out, cache


def check(config: ModelConfig, seed: int, pieces: list[int]) -> None:
    model = build(config, seed, torch.float64)
    ids = tokens(config, 1, sum(pieces), seed)
    (found, cache), (expected, plain_cache) = (chain(model, ids, pieces, plain) for plain in (False, True))
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert float((a - b).abs().max()) <= 1e-9
    for a, b in zip(cache._buffers[-2:], plain_cache._buffers[-2:], strict=True):
        assert (a is None) == (b is None)
        assert a is None or float((a[:, : len(cache)] - b[:, : len(cache)]).abs().max()) <= 1e-9


DRAWN = {
    "config": configs(mtp=(1, 2)), "seed": SEEDS,
    "pieces": st.lists(st.sampled_from([1, 1, 2, 3, 5, 9]), min_size=1, max_size=4),
}  # fmt: skip


@given(**DRAWN)
def test_equals_the_module(**drawn) -> None:
    with mock.patch.object(FewLink, "advance", autospec=True, side_effect=FewLink.advance) as taken:
        check(**drawn)
    assert taken.call_count == len(drawn["pieces"]) * drawn["config"].num_nextn_predict_layers


WRONG = {
    "no RoPE": (few_blocks, "rotated", lambda x, rotations: x),
    "no mask": (few_attention, "hide_what_comes_later", lambda scores: None),
    "hidden before embedding": (few_tokens.np, "concatenate", lambda parts, axis: np.hstack(parts[::-1])),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_engine_is_seen(name) -> None:
    place, attribute, wrong = WRONG[name]
    with mock.patch.object(place, attribute, wrong):
        assert_rejects(check, **DRAWN)


class Halved(RMSNorm):
    """A norm of somebody's own."""

    def forward(self, x):
        return super().forward(x) / 2


class Other(PlainRecipe):
    """A recipe that rounds its inputs."""

    name, plain, absorbs = "other", False, False

    def forward(self, x, weight, bias=None, counts=None):
        return super().forward((4 * x).round() / 4, weight, bias, counts)


def changed(out):
    return (changed(out[0]), *out[1:]) if isinstance(out, tuple) else out * 1.5 + 0.25


def hook(name: str) -> Callable[[nn.Module], object]:
    return lambda m: m.get_submodule(name).register_forward_hook(lambda _m, _i, out: changed(out))


def patch(name: str) -> Callable[[nn.Module], None]:
    def apply(m: nn.Module) -> None:
        module = m.get_submodule(name)
        forward = module.forward
        module.forward = lambda *args, **named: changed(forward(*args, **named))

    return apply


def norm_of_ones_own(m: nn.Module) -> None:
    m.hnorm = Halved(SIZE.hidden_size, SIZE.rms_norm_eps).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_of_drafts_is_the_models_own(dtype) -> None:
    """Drafts come out of the engine's head, and out of the module where somebody touched it."""
    model, calls = build(SIZE, 0, dtype), []
    with torch.inference_mode():
        hidden = torch.randn(1, 1, SIZE.hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
        step = model.begin(tokens(SIZE, 1, 1), LatentCache(SIZE, mtp=True))
        engine = model.choice.few_tokens(hidden, step)
        found, expected = engine.head(hidden), model.lm_head(hidden)
        assert found.dtype == expected.dtype == dtype and found.shape == expected.shape
        bound = 1e-5 if dtype == torch.float32 else 2**-7 * float(expected.abs().max())
        assert float((found - expected).abs().max()) <= bound
    kind, name = few_tokens.FewChain, "advance"
    for touched in (False, True):
        if touched:
            model.lm_head.register_forward_hook(lambda *_: calls.append(1))
        with mock.patch.object(kind, name, autospec=True, side_effect=getattr(kind, name)) as taken:
            list(speculate(model, Request.of(model, tokens(SIZE, 1, 4), 6, stop_tokens=()), 1))
        assert bool(taken.call_count) is not touched and bool(calls) is touched


@pytest.mark.parametrize("drafts", [1, 2, 4])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_rows_drafts_in_one_engine_are_those_of_link_after_link(drafts: int, temperature: float) -> None:
    """The same guesses from the same distributions, round after round, with drafts that stand and that fall."""

    def drafted(fast: bool) -> list:
        model, found = build(SIZE, 3, torch.float64), []
        request = Request.of(
            model, tokens(SIZE, 1, 7, 3), 20, temperature, stop_tokens=(), generator=torch.Generator().manual_seed(5)
        )

        def watched(guesses, q, logits, sizes, sampler):
            found.append((guesses, q, sizes))
            return verify(guesses, q, logits, sizes, sampler)

        few_chain = Choice.few_chain if fast else lambda *_: None
        with mock.patch.object(Choice, "few_chain", autospec=True, side_effect=few_chain) as asked:
            list(speculate(model, request, drafts, verifier=watched))
        assert asked.call_count
        return found

    fast, plain = drafted(True), drafted(False)
    assert len(fast) == len(plain) > 3
    for (guesses, q, sizes), (theirs, their_q, their_sizes) in zip(fast, plain, strict=True):
        assert torch.equal(guesses, theirs) and torch.equal(sizes, their_sizes)
        assert (q is None) == (their_q is None) == (temperature == 0.0)
        assert q is None or float((q - their_q).abs().max()) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_chain_in_16_bits_is_nearer_to_fp64_than_its_modules(dtype: torch.dtype) -> None:
    """It reads 16 bits and keeps latents in them; between modules nothing is rounded."""
    model = build(SIZE, 0, dtype)
    exact = copy.deepcopy(model).double()
    ids, errors = tokens(SIZE, 1, 5), {"chain": 0.0, "modules": 0.0}
    with torch.inference_mode():
        hidden = torch.randn(1, 5, SIZE.hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)

        def module_after_module(of: DeepSeekV3) -> list[Tensor]:
            cache, rows = LatentCache(SIZE, mtp=True), hidden.to(of.lm_head.weight.dtype)
            step, found = of.begin(ids, cache), []
            for module in of.model.layers[SIZE.num_hidden_layers :]:
                rows, _ = module.advance(rows, of.model.embed_tokens(ids), step)
                found += [rows[0], of.lm_head(rows)[0, -1]]
            return found

        modules = list(model.model.layers[SIZE.num_hidden_layers :])
        one, cache = model.choice.few_chain(model, modules), LatentCache(SIZE, mtp=True)
        rows = hidden[0].float().numpy()
        cache.plan(1, 5)
        found = []
        for k in range(len(modules)):
            rows, logits = one.advance(k, rows, ids[0].numpy(), cache, model.rope.table(5, hidden).numpy())
            found += [torch.from_numpy(rows), torch.from_numpy(logits)]
        assert cache._buffers[-1].dtype == dtype and all(x.dtype == torch.float32 for x in found)
        for a, b, c in zip(found, module_after_module(model), module_after_module(exact), strict=True):
            scale = float(c.square().mean().sqrt())
            errors["chain"] += float((a - c).square().mean().sqrt()) / scale
            errors["modules"] += float((b - c).square().mean().sqrt()) / scale
    assert errors["chain"] <= errors["modules"] and errors["chain"] / len(found) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("touched", ["model.embed_tokens", "lm_head", "model.layers.2.mlp", "model.layers.3"])
def test_a_chain_with_a_module_that_somebody_touched_is_not_one_engine(touched: str) -> None:
    model = build(SIZE, 0, torch.float32)
    modules = list(model.model.layers[SIZE.num_hidden_layers :])
    assert SIZE.num_hidden_layers == 2 and model.choice.few_chain(model, modules) is not None
    model.get_submodule(touched).register_forward_hook(lambda *_: None)
    assert model.choice.few_chain(model, modules) is None


@pytest.mark.parametrize("of_class", [False, True])
def test_a_link_that_somebody_wrote_anew_drafts(of_class: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = build(SIZE, 0, torch.float32), []
    modules = list(model.model.layers[SIZE.num_hidden_layers :])
    assert model.choice.few_chain(model, modules) is not None
    advance = MTPModule.advance

    def watched(module, *of_call):
        calls.append(module)
        return advance(module, *of_call)

    if of_class:
        monkeypatch.setattr(MTPModule, "advance", watched)
    else:
        modules[1].advance = partial(watched, modules[1])
    list(speculate(model, Request.of(model, tokens(SIZE, 1, 4), 6, stop_tokens=()), 2))
    assert modules[1] in calls


TOUCHES = {
    **{f"hook at {name or 'the module'}": hook(name) for name in
       ("", "enorm", "hnorm", "eh_proj", "shared_head.norm", "self_attn.o_proj", "self_attn.kv_a_layernorm",
        "mlp.shared_experts", "mlp.experts", "input_layernorm")},
    **{f"patched {name}": patch(name) for name in ("eh_proj", "enorm", "mlp.shared_experts.down_proj")},
    "a norm of one's own": norm_of_ones_own,
    "another epsilon": lambda m: setattr(m.enorm, "eps", 0.5),
    "a recipe": lambda m: set_recipe(m, Other()),
    "a bias": lambda m: setattr(m.eh_proj, "bias", nn.Parameter(torch.ones(SIZE.hidden_size, dtype=torch.float64))),
}  # fmt: skip


@pytest.mark.parametrize("name", TOUCHES)
@pytest.mark.parametrize("late", [False, True])
def test_a_touched_module_runs_as_it_is_and_the_other_does_not(name, late) -> None:
    model = build(SIZE, 0, torch.float64)
    ids = tokens(SIZE, 1, 7)
    before, _ = chain(model, ids, [4, 1, 2], plain=True)
    if late:
        chain(model, ids, [4, 1, 2], plain=False)
    TOUCHES[name](model.model.layers[SIZE.num_hidden_layers + 1])
    with mock.patch.object(FewLink, "advance", autospec=True, side_effect=FewLink.advance) as taken:
        found, _ = chain(model, ids, [4, 1, 2], plain=False)
    assert taken.call_count == 3  # the first module, in each piece
    expected, _ = chain(model, ids, [4, 1, 2], plain=True)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-9) for a, b in zip(found, expected, strict=True))
    assert not all(torch.allclose(a, b, rtol=0, atol=1e-9) for a, b in zip(found, before, strict=True))
    lines = [line for line in model.explain().lines if line.operation == "MTP module over few tokens"]
    assert [(line.backend, line.modules) for line in lines] == [
        ("cpu", ("model.layers.2",)), ("plain", ("model.layers.3",)),
    ]  # fmt: skip


@settings(max_examples=10)
@given(seed=SEEDS, drafts=st.integers(1, 4), rows=st.integers(1, 2))
def test_drafts_are_those_of_the_modules(seed, drafts, rows) -> None:
    """The whole of speculation: not only the text, which bad drafts would not change, but what was drafted."""
    model = build(SIZE, seed, torch.float64)
    ids = tokens(SIZE, rows, 5, seed)

    def rounds() -> list:
        return list(speculate(model, Request.of(model, ids, max_new_tokens=9, stop_tokens=()), drafts))

    with mock.patch.object(FewLink, "rows", autospec=True, side_effect=FewLink.rows) as taken:
        found = rounds()
    assert bool(taken.call_count) == (rows == 1)
    nothing = mock.Mock(return_value=None)
    with mock.patch.object(FewLink, "advance", nothing), mock.patch.object(Choice, "few_chain", nothing):
        assert rounds() == found


def test_a_prompt_too_long_goes_through_the_modules() -> None:
    model = build(SIZE.replace(max_position_embeddings=256), 0, torch.float64)
    with mock.patch.object(FewLink, "advance", autospec=True, side_effect=FewLink.advance) as taken:
        out, _ = chain(model, tokens(model.config, 1, 130), [129, 1], plain=False)
    assert taken.call_count == 2 and isinstance(out[0], Tensor)


def test_drafts_behind_a_prompt_too_long_begin_with_the_modules() -> None:
    model = build(SIZE.replace(max_position_embeddings=256), 0, torch.float64)
    request = Request.of(model, tokens(model.config, 1, 140), 12, stop_tokens=())
    widths = []

    def watched(link, hidden, *rest):
        widths.append(len(hidden))
        return rows(link, hidden, *rest)

    rows = FewLink.rows
    with mock.patch.object(FewLink, "rows", watched):
        list(speculate(model, request, 2))
    assert widths and max(widths) <= 128
