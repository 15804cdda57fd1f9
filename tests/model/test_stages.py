"""Stages one by one, and interleaved for two micro-batches: the numbers of ``forward`` and ``backward``, to the bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, build, configs, small, tokens

from dsv3lib import DeepSeekV3, ModelConfig
from dsv3lib.errors import InputError
from dsv3lib.layers.router import balance_loss
from dsv3lib.linear import PLAIN, DeferredWeightGradients, set_recipe
from dsv3lib.model.stages import STAGES, StagedBlock, embed, head

DOUBLE = torch.float64


def balance(config: ModelConfig, routings: list) -> torch.Tensor:
    scores = [r.scores for r in routings if r is not None]
    return sum((balance_loss(s, config.num_experts_per_tok, 0.3, "sequence") for s in scores), torch.zeros(()))


def whole(model: DeepSeekV3, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    """Each micro-batch forward and backward through the whole graph; returns the embeddings' gradients."""
    grads = []
    for ids in batches:
        x = embed(model, ids).detach().requires_grad_()
        hidden, routings = model.model(x, model.begin(ids))
        (model.lm_head(hidden).sin().sum() + balance(model.config, routings)).backward()
        grads.append(x.grad)
    return grads


class Pass:
    """One micro-batch through all blocks in stages; ``forward`` and ``backward`` yield after each stage."""

    def __init__(self, model: DeepSeekV3, ids: torch.Tensor) -> None:
        self.model, self.step = model, model.begin(ids)
        self.x = embed(model, ids).detach()
        self.blocks: list[StagedBlock] = []

    def forward(self):
        x = self.x
        for block in self.model.model.layers[: self.model.config.num_hidden_layers]:
            self.blocks.append(StagedBlock(block, x, self.step))
            for stage in STAGES:
                assert self.blocks[-1].forward() == stage
                yield
            x, _ = self.blocks[-1].output

    def backward(self):
        last, _ = self.blocks[-1].output
        loss = head(self.model, last, self.step)[1].sin().sum()
        (loss + balance(self.model.config, [b.output[1] for b in self.blocks])).backward()
        grad = None
        for block in reversed(self.blocks):
            for stage in reversed(STAGES):
                assert block.backward(grad) == stage
                yield
            grad = block.grad_input
        self.grad = grad


def take_turns(*passes) -> None:
    """A stage of the one, a stage of the other."""
    waiting = list(passes)
    while waiting:
        one = waiting.pop(0)
        if next(one, StopIteration) is not StopIteration:
            waiting.append(one)


def in_stages(model: DeepSeekV3, batches: list[torch.Tensor], interleaved: bool) -> list[torch.Tensor]:
    passes = [Pass(model, ids) for ids in batches]
    if interleaved:
        take_turns(*(p.forward() for p in passes))
        take_turns(*(p.backward() for p in passes))
    else:
        for p in passes:
            take_turns(p.forward())
            take_turns(p.backward())
    return [p.grad for p in passes]


def gradients(model: DeepSeekV3) -> dict[str, torch.Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def equal(a: dict, b: dict) -> None:
    for name, gradient in a.items():
        other = b[name]
        assert (gradient is None) == (other is None), name
        assert gradient is None or torch.equal(gradient, other), name


@pytest.mark.parametrize("interleaved", [False, True], ids=["one by one", "interleaved"])
@settings(max_examples=12)
@given(
    config=configs(mtp=0), seed=SEEDS, length=st.integers(2, 7), recompute=st.booleans(), split=st.booleans()
)
def test_stages_equal_the_whole_to_the_bit(
    interleaved: bool, config: ModelConfig, seed: int, length: int, recompute: bool, split: bool
) -> None:
    batches = [tokens(config, 2, length, seed), tokens(config, 1, length + 1, seed + 1)]
    plain = build(config, seed, DOUBLE)
    expected = whole(plain, batches)
    model = build(config, seed, DOUBLE, recompute=recompute)
    deferred = DeferredWeightGradients(model.recipe)
    if split:
        set_recipe(model, deferred)
    got = in_stages(model, batches, interleaved)
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a, b)
    if split:
        assert model.model.layers[0].self_attn.o_proj.weight.grad is None, "the weights' part has not run"
        assert model.model.layers[0].input_layernorm.weight.grad is not None
        deferred.take().run()
    equal(gradients(plain), gradients(model))


@settings(max_examples=8)
@given(config=configs(mtp=(0, 1)), seed=SEEDS)
def test_a_split_backward_of_the_whole_model(config: ModelConfig, seed: int) -> None:
    """Inputs first, weights later: together the whole backward pass, of the head, gates and MTP modules too.

    Where the head is the embedding, which is no product, sums over two micro-batches are made in another order.
    """
    ids = tokens(config, 2, 6, seed)
    plain, model = build(config, seed, DOUBLE), build(config, seed, DOUBLE)
    deferred = DeferredWeightGradients()
    set_recipe(model, deferred)
    for _ in range(1 if config.tie_word_embeddings else 2):
        plain(ids, labels=ids).loss.backward()
        model(ids, labels=ids).loss.backward()
        weights = deferred.take()
        assert not deferred.take(), "taken once"
        weights.run()
    equal(gradients(plain), gradients(model))


def test_a_stage_left_out_would_show() -> None:
    config = small()
    model = build(config, dtype=DOUBLE)
    ids = tokens(config, 2, 5)
    x = embed(model, ids).detach()
    step = model.begin(ids)
    expected, _ = model.model.layers[1](x, step)
    run = StagedBlock(model.model.layers[1], x, step)
    for _ in STAGES:
        run.forward()
    assert torch.equal(run.output[0], expected)
    block = model.model.layers[1]
    block.dispatch = lambda attended, step: type(block).dispatch(block, attended._replace(h=attended.h * 1.001), step)
    run = StagedBlock(block, x, step)
    for _ in STAGES:
        run.forward()
    assert not torch.equal(run.output[0], expected)


def test_out_of_order_is_refused() -> None:
    config = small()
    model = build(config, dtype=DOUBLE)
    ids = tokens(config, 1, 4)
    run = StagedBlock(model.model.layers[1], embed(model, ids), model.begin(ids))
    with pytest.raises(InputError, match="backward: comes four times"):
        run.backward()
    run.forward()
    with pytest.raises(InputError, match="output: the stage dispatch has not run yet"):
        run.output  # noqa: B018
    for _ in STAGES[1:]:
        run.forward()
    with pytest.raises(InputError, match="forward: all four stages"):
        run.forward()
    with pytest.raises(InputError, match="grad: None"):
        run.backward()
    run.backward(torch.ones_like(run.output[0]))
    with pytest.raises(InputError, match="grad_input: the backward of experts has not run"):
        run.grad_input  # noqa: B018


def test_a_frozen_weight_waits_for_nothing() -> None:
    config = small(num_nextn_predict_layers=0)
    model = build(config, dtype=DOUBLE)
    deferred = DeferredWeightGradients(PLAIN)
    set_recipe(model, deferred)
    model.requires_grad_(False)
    model.model.layers[1].self_attn.o_proj.weight.requires_grad_(True)
    ids = tokens(config, 1, 4)
    model(ids, labels=ids).loss.backward()
    weights = deferred.take()
    assert len(weights) == 1
    weights.run()
    with_gradient = [n for n, p in model.named_parameters() if p.grad is not None]
    assert with_gradient == ["model.layers.1.self_attn.o_proj.weight"]
