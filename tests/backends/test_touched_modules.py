"""Modules that are not ours any more: whatever was done to them, generation gives the model's own forward's tokens."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, build, small, tokens
from torch import nn
from torch.nn.utils import parametrize, prune

from dsv3lib.backends.survey import Snapshot
from dsv3lib.errors import InputError
from dsv3lib.inference.request import Request
from dsv3lib.inference.speculative import speculate

SIZE = small(vocab_size=30, num_nextn_predict_layers=1)
LAYERS = ("model.layers.0.", "model.layers.1.")
LINEARS = [layer + "self_attn." + name for layer in LAYERS
           for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")]  # fmt: skip
LINEARS += ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.shared_experts.gate_proj", "lm_head"]
NORMS = [layer + name for layer in LAYERS for name in ("input_layernorm", "self_attn.kv_a_layernorm")] + [
    "model.norm"
]
OTHERS = ["model.layers.0.self_attn", "model.layers.1.mlp", "model.layers.1.mlp.gate", "model.layers.1.mlp.experts",
          "model.layers.0", "model.embed_tokens"]  # fmt: skip


class LoRALinear(nn.Linear):
    """A subclass that adds a low-rank update."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
        self.weight, self.bias = base.weight, base.bias
        self.a = nn.Parameter(torch.randn(2, base.in_features))
        self.b = nn.Parameter(torch.randn(base.out_features, 2))

    def forward(self, x):
        return super().forward(x) + x @ self.a.T.to(x.dtype) @ self.b.T.to(x.dtype)


class Wrapped(nn.Module):
    """A wrapper that has no weight of its own."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x):
        return 2 * self.base(x)


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return 2 * weight


def replace(model: nn.Module, name: str, make) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, make(model.get_submodule(name)))


def changed(out):
    """An output of any of the modules, changed by so much that every token after it may be another."""
    if isinstance(out, tuple):
        return (changed(out[0]), *out[1:])
    return out * 1.5 + 0.25 if out.is_floating_point() else (out + 1) % SIZE.n_routed_experts


def patch(model: nn.Module, name: str) -> None:
    module = model.get_submodule(name)
    original = module.forward
    module.forward = lambda *args, **named: changed(original(*args, **named))


TOUCHES = {
    "a LoRA subclass": (LINEARS, lambda m, n: replace(m, n, LoRALinear)),
    "a wrapper": (LINEARS + NORMS, lambda m, n: replace(m, n, Wrapped)),
    "a parametrization": (
        LINEARS, lambda m, n: parametrize.register_parametrization(m.get_submodule(n), "weight", Doubled()),
    ),
    "pruning": (LINEARS + NORMS, lambda m, n: prune.random_unstructured(m.get_submodule(n), "weight", 0.6)),
    "a patched forward": (LINEARS + NORMS + OTHERS, patch),
    "a forward hook": (
        LINEARS + NORMS + OTHERS,
        lambda m, n: m.get_submodule(n).register_forward_hook(lambda _m, _i, out: changed(out)),
    ),
    "a pre-hook": (
        LINEARS + NORMS, lambda m, n: m.get_submodule(n).register_forward_pre_hook(lambda _m, x: (x[0] * 1.5 + 0.25,)),
    ),
    "no bias where there was none": (LINEARS, lambda m, n: setattr(
        m.get_submodule(n), "bias", nn.Parameter(torch.randn(m.get_submodule(n).out_features, dtype=torch.float64)))),
}  # fmt: skip


@settings(max_examples=12)
@given(data=st.data(), seed=SEEDS, count=st.integers(1, 2), late=st.booleans(), rows=st.integers(1, 2))
def test_generation_is_the_forward_of_the_model_as_it_is(data, seed, count, late, rows) -> None:
    """One row (where tokens have a form of their own) or two; touched before the first token or between two texts."""
    model = build(SIZE, seed, torch.float64)
    ids = tokens(SIZE, rows, 4, seed)
    untouched = model.generate(ids, 6, stop_tokens=()) if late else None
    for _ in range(count):
        touch = data.draw(st.sampled_from(sorted(TOUCHES)))
        places, apply = TOUCHES[touch]
        name = data.draw(st.sampled_from(places))
        if not isinstance(model.get_submodule(name), nn.Linear) and places is LINEARS:
            continue  # wrapped already
        try:
            apply(model, name)
        except (AttributeError, ValueError, KeyError):
            assert count == 2  # the second touch does not fit what the first has made
    model.double()
    expected = ids
    with torch.no_grad():
        for _ in range(6):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(ids, 6, stop_tokens=()), expected)
    assert torch.equal(model.generate(ids, 6, stop_tokens=(), speculative=True), expected)
    assert untouched is None or untouched.shape == expected.shape


def test_the_touches_do_change_the_model() -> None:
    """Else the check above would prove nothing."""
    ids = tokens(SIZE, 1, 4)
    for name, (places, apply) in TOUCHES.items():
        model = build(SIZE, 0, torch.float64)
        before = model(ids).logits
        apply(model, places[0])
        assert not torch.equal(before, model.double()(ids).logits), name


@pytest.mark.parametrize("speculative", [False, True])
def test_generation_looks_at_the_modules_once_and_the_next_one_anew(speculative) -> None:
    model, prompt = build(SIZE, 0, torch.float64), tokens(SIZE, 1, 4)
    before = model.generate(prompt, 6, stop_tokens=(), speculative=speculative)
    with mock.patch.object(Snapshot, "unchanged", autospec=True, side_effect=Snapshot.unchanged) as looks:
        assert torch.equal(model.generate(prompt, 6, stop_tokens=(), speculative=speculative), before)
    assert looks.call_count == 2  # the main layers, and the MTP modules
    patch(model, "model.norm")
    expected = prompt
    with torch.inference_mode():
        for _ in range(6):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(prompt, 6, stop_tokens=(), speculative=speculative), expected)
    with pytest.raises(InputError):
        model.generate(prompt, 6, speculative=speculative, draft_tokens=0)
    assert model.choice.survey(model).touched
    del model.model.norm.forward
    assert not model.choice.survey(model).touched  # an error leaves nothing settled


def test_what_is_done_between_two_rounds_counts_from_the_next_on() -> None:
    """A round looks at the modules once, and then no longer until it ends."""
    model = build(SIZE, 0, torch.float64)
    with torch.inference_mode():
        request = Request.of(model, tokens(SIZE, 1, 4), 9, stop_tokens=())
        rounds = speculate(model, request, 1)
        text = [*tokens(SIZE, 1, 4)[0].tolist(), *next(rounds).tokens[0], *next(rounds).tokens[0]]
        model.lm_head.weight.data = model.lm_head.weight.data.flip(0)  # at another address: the engine is made anew
        with model.choice.settled(model):
            patch(model, "model.norm")
            assert not model.choice.survey(model).touched
            with model.choice.settled(model):
                pass
            assert not model.choice.survey(model).touched
        assert model.choice.survey(model).touched
        gained = next(rounds).tokens[0]
        expected = list(text)
        for _ in gained:
            expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
    assert expected == text + gained
