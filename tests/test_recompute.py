"""Recomputation: less is kept for backward, nothing else runs twice, and the gradients are the same bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, build, configs, small, tokens
from torch.profiler import ProfilerActivity, profile

from dsv3lib import DeepSeekV3, ModelConfig
from dsv3lib.layers.attention import MultiHeadLatentAttention
from dsv3lib.layers.experts import MixtureOfExperts
from dsv3lib.layers.norm import RMSNorm
from dsv3lib.recompute import Recompute


def step(model: DeepSeekV3, input_ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    out = model(input_ids, labels=input_ids)
    return out.loss.detach(), list(torch.autograd.grad(out.loss, list(model.parameters()), allow_unused=True))


@settings(max_examples=15)
@given(config=configs(mtp=(0, 2)), seed=SEEDS, length=st.integers(2, 9), dtype=st.sampled_from(
    [torch.float32, torch.float64, torch.bfloat16]))  # fmt: skip
def test_gradients_are_the_same_to_the_bit(
    config: ModelConfig, seed: int, length: int, dtype: torch.dtype
) -> None:
    input_ids = tokens(config, 2, length, seed)
    loss, gradients = step(build(config, seed, dtype), input_ids)
    again_loss, again = step(build(config, seed, dtype, recompute=True), input_ids)
    assert torch.equal(loss, again_loss)
    for a, b in zip(gradients, again, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def kept_bytes(model: DeepSeekV3, input_ids: torch.Tensor) -> int:
    """What a forward pass has allocated and not given back when it ends: the output and what backward needs."""
    model(input_ids, labels=input_ids)  # the table of turns is made
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        out = model(input_ids, labels=input_ids)
    assert out.loss.requires_grad
    return sum(event.self_cpu_memory_usage for event in profiler.key_averages())


def test_far_fewer_bytes_are_kept() -> None:
    config = small(
        hidden_size=64, num_attention_heads=8, qk_nope_head_dim=16, v_head_dim=16, kv_lora_rank=16,
        q_lora_rank=16, num_hidden_layers=3, vocab_size=30, num_nextn_predict_layers=0,
    )  # fmt: skip
    input_ids = tokens(config, 2, 64)
    plain = kept_bytes(build(config), input_ids)
    frugal = kept_bytes(build(config, recompute=True), input_ids)
    n = input_ids.numel()
    keys_and_values = n * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * 4
    queries = n * config.num_attention_heads * config.qk_head_dim * 4
    norms = 2 * n * config.hidden_size * 4
    expected = config.num_hidden_layers * (keys_and_values + queries + norms)
    assert frugal < plain - 0.9 * expected
    assert frugal > 0


def calls_of(
    kind: type, model: DeepSeekV3, input_ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """How often a kind of layer ran in forward, and how often in backward."""
    count, forward = [0], kind.forward

    def counted(self, *args):
        count[0] += 1
        return forward(self, *args)

    monkeypatch.setattr(kind, "forward", counted)
    loss = model(input_ids, labels=input_ids).loss
    ran = count[0]
    loss.backward()
    monkeypatch.undo()
    return [ran, count[0] - ran]


def test_only_the_cheap_parts_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small()
    input_ids = tokens(config, 2, 8)
    model = build(config, recompute=True)
    assert calls_of(MultiHeadLatentAttention, model, input_ids, monkeypatch) == [3, 0]
    assert calls_of(MixtureOfExperts, model, input_ids, monkeypatch) == [2, 0]
    forward, backward = calls_of(RMSNorm, model, input_ids, monkeypatch)
    assert backward > 0 and forward > 0
    assert calls_of(RMSNorm, build(config), input_ids, monkeypatch) == [forward, 0]


def test_the_load_is_counted_once() -> None:
    config = small()
    input_ids = tokens(config, 2, 8)
    loads = []
    for recompute in (False, True):
        out = build(config, recompute=recompute)(input_ids, labels=input_ids)
        out.loss.backward()
        loads.append(out.expert_load)
    assert torch.equal(*loads)
    assert loads[1][0].sum() == 2 * 8 * 3 and loads[1][1].sum() == 2 * 7 * 3


def test_backward_may_run_twice() -> None:
    config = small()
    input_ids = tokens(config, 2, 8)
    model = build(config, recompute=True)
    loss = model(input_ids, labels=input_ids).loss
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    for parameter, gradient in zip(model.parameters(), once, strict=True):
        assert torch.equal(parameter.grad, 2 * gradient)


def test_gradients_accumulate_over_micro_batches() -> None:
    config = small()
    first, second = tokens(config, 2, 8), tokens(config, 2, 8, seed=1)
    plain, frugal = build(config), build(config, recompute=True)
    for model in (plain, frugal):
        losses = [model(ids, labels=ids).loss for ids in (first, second)]  # both graphs alive at once
        sum(losses).backward()
    for a, b in zip(plain.parameters(), frugal.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_evaluation_and_generation_take_the_plain_road() -> None:
    config = small()
    model = build(config, recompute=True)
    with torch.no_grad():
        assert torch.equal(model(tokens(config, 1, 6)).logits, build(config)(tokens(config, 1, 6)).logits)
        assert model.generate(tokens(config, 1, 3), max_new_tokens=2, stop_tokens=[]).shape == (1, 5)


def test_a_call_is_kept_instead_of_what_it_makes() -> None:
    """The smallest example: backward of a square needs h = sin(x), which is made again from x."""
    x = torch.linspace(0, 1, 5, requires_grad=True)
    made = []

    def sine(v: torch.Tensor) -> torch.Tensor:
        made.append(v)
        return v.sin()

    recompute = Recompute()
    with recompute.saving():
        h = recompute.run(sine, x)
        y = (h * h).sum()
    assert len(made) == 1
    y.backward()
    assert len(made) == 2
    torch.testing.assert_close(x.grad, (2 * x).sin().detach())
