"""The MTP chain: sequential, causal at every depth, and sharing the main model's ends."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, assert_rejects, build, configs, small, tokens

from dsv3lib import DeepSeekV3, ModelConfig
from dsv3lib.layers.mtp import MTPModule
from dsv3lib.model import next_token_loss

CHAIN = {"config": configs(mtp=(1, 3)), "seed": SEEDS, "length": st.integers(5, 9)}


# ---- causality --------------------------------------------------------------------------------------------


@torch.no_grad()
def check_causal(config: ModelConfig, seed: int, length: int) -> None:
    """At depth k, position i knows the tokens up to i + k, the last of them included, and none after."""
    model = build(config, seed, torch.float64)
    input_ids = tokens(config, 1, length, seed)
    before = model(input_ids, return_mtp=True).mtp_logits
    assert len(before) == config.num_nextn_predict_layers
    for changed_at in range(length):
        other = input_ids.clone()
        other[0, changed_at] = (other[0, changed_at] + 1) % config.vocab_size
        after = model(other, return_mtp=True).mtp_logits
        for k, (a, b) in enumerate(zip(before, after, strict=True), start=1):
            assert a.shape == (1, length - k, config.vocab_size)
            moved = (a - b).abs().amax(-1)[0]
            blind = max(changed_at - k, 0)  # positions before this one have not seen the token
            assert not (moved[:blind] > 1e-12).any(), f"depth {k} looks ahead"
            if changed_at >= k:
                assert moved[changed_at - k] > 1e-9, f"depth {k} does not see the token {k} places on"


@settings(max_examples=10)
@given(**CHAIN)
def test_every_depth_sees_its_own_token_and_none_after(config: ModelConfig, seed: int, length: int) -> None:
    check_causal(config, seed, length)


@pytest.mark.parametrize("shift", [-1, 1], ids=["peeks at its target", "one token behind"])
def test_the_causality_check_rejects_a_wrong_shift(shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    right = MTPModule.advance
    monkeypatch.setattr(MTPModule, "advance", lambda self, h, e, step: right(self, h, e.roll(shift, 1), step))
    assert_rejects(check_causal, examples=5, **CHAIN)


def test_the_chain_is_sequential() -> None:
    """Depth 2 starts from what depth 1 knew: without module 1 its answer is another."""
    config = small(num_nextn_predict_layers=2)
    model = build(config)
    input_ids = tokens(config, 1, 8)
    before = model(input_ids, return_mtp=True)
    with torch.no_grad():
        model.model.layers[2].eh_proj.weight.mul_(-1)
    after = model(input_ids, return_mtp=True)
    assert torch.equal(before.logits, after.logits)
    assert (before.mtp_logits[1] - after.mtp_logits[1]).abs().max() > 1e-3


# ---- the loss ---------------------------------------------------------------------------------------------


def loss_by_loop(logits: torch.Tensor, labels: torch.Tensor, ahead: int, documents: torch.Tensor | None):
    """Equation 24, target by target."""
    losses = []
    for b in range(labels.shape[0]):
        for i in range(labels.shape[1] - ahead):
            target = int(labels[b, i + ahead])
            crosses = documents is not None and documents[b, i] != documents[b, i + ahead]
            if target != -100 and not crosses:
                losses.append(-logits[b, i].log_softmax(-1)[target])
    return torch.stack(losses).mean() if losses else logits.new_zeros(())


Loss = Callable[[torch.Tensor, torch.Tensor, int, torch.Tensor | None], torch.Tensor]
LOSSES = {"seed": SEEDS, "length": st.integers(1, 7), "ahead": st.integers(1, 4), "packed": st.booleans()}


def check_loss(loss: Loss, seed: int, length: int, ahead: int, packed: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, max(length - ahead + 1, 1), 9, dtype=torch.float64, generator=generator)
    labels = torch.randint(9, (2, length), generator=generator)
    labels[torch.rand(2, length, generator=generator) < 0.2] = -100
    starts = torch.rand(2, length, generator=generator) < 0.3
    documents = starts.cumsum(-1) if packed else None
    got, expected = loss(logits, labels, ahead, documents), loss_by_loop(logits, labels, ahead, documents)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@given(**LOSSES)
def test_the_loss_is_the_mean_over_its_targets(seed: int, length: int, ahead: int, packed: bool) -> None:
    check_loss(next_token_loss, seed, length, ahead, packed)


def crosses_borders(logits, labels, ahead, documents):
    return next_token_loss(logits, labels, ahead, None)


def one_place_off(logits, labels, ahead, documents):
    return next_token_loss(logits, labels, ahead + 1, documents)


def counts_ignored(logits, labels, ahead, documents):
    n = max(labels.shape[1] - ahead, 1)
    return next_token_loss(logits, labels, ahead, documents) * (labels[:, ahead:] != -100).sum() / (2 * n)


@pytest.mark.parametrize("wrong", [crosses_borders, one_place_off, counts_ignored])
def test_the_loss_check_rejects(wrong: Loss) -> None:
    assert_rejects(lambda **case: check_loss(wrong, **case), **LOSSES)


def test_a_border_costs_k_plus_one_targets_at_depth_k() -> None:
    """Two documents of four tokens: at each depth the targets over the border and past the end are gone."""
    labels = torch.arange(8)[None]
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    for ahead, targets in ((1, 6), (2, 4), (3, 2), (4, 0)):
        logits = torch.zeros(1, 8 - ahead + 1, 9)
        hot = logits.clone().requires_grad_()
        loss = next_token_loss(hot, labels, ahead, documents)
        assert loss.item() == pytest.approx(targets and torch.tensor(9.0).log().item())
        (gradient,) = torch.autograd.grad(loss, hot)
        assert int(gradient.abs().sum(-1).gt(0).sum()) == targets


@settings(max_examples=15)
@given(config=configs(mtp=(0, 3)), seed=SEEDS, length=st.integers(1, 7), packed=st.booleans())
def test_the_model_s_loss_is_the_sum_of_its_parts(
    config: ModelConfig, seed: int, length: int, packed: bool
) -> None:
    model = build(config, seed, torch.float64)
    model.mtp_loss_weight = 0.7
    input_ids = tokens(config, 2, length, seed)
    documents = (torch.arange(length) // 3).expand(2, -1) if packed else None
    out = model(input_ids, labels=input_ids, document_ids=documents)
    ran = min(config.num_nextn_predict_layers, length - 1)
    names = ["main", *(f"mtp_{k}" for k in range(1, ran + 1))]
    assert [n for n in out.losses if n != "balance"] == names
    for ahead, (name, logits) in enumerate(zip(names, [out.logits, *out.mtp_logits], strict=True), start=1):
        expected = loss_by_loop(logits, input_ids, ahead, documents)
        torch.testing.assert_close(out.losses[name], expected, rtol=0, atol=1e-11)
    total = out.losses["main"] + out.losses.get("balance", 0.0)
    total = total + sum(0.7 / ran * out.losses[f"mtp_{k}"] for k in range(1, ran + 1))
    torch.testing.assert_close(out.loss, total, rtol=0, atol=1e-12)


@pytest.mark.parametrize("depths", [0, 1, 3])
def test_any_depth(depths: int) -> None:
    config = small(num_nextn_predict_layers=depths)
    model = build(config)
    out = model(tokens(config, 2, 8), return_mtp=True)
    assert [logits.shape for logits in out.mtp_logits] == [(2, 8 - k, 50) for k in range(1, depths + 1)]
    assert not model(tokens(config, 2, 8)).mtp_logits, "the chain runs only when asked for"


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_sequence_shorter_than_the_chain(length: int) -> None:
    config = small(num_nextn_predict_layers=3)
    model = build(config)
    input_ids = tokens(config, 1, length)
    out = model(input_ids, labels=input_ids)
    out.loss.backward()
    assert torch.isfinite(out.loss) and len(out.mtp_logits) == length - 1
    assert out.expert_load.shape == (4, 8)


# ---- sharing ----------------------------------------------------------------------------------------------


def test_modules_own_no_embedding_and_no_head() -> None:
    config = small(num_nextn_predict_layers=2)
    vocab_sized = [n for n, p in DeepSeekV3(config).named_parameters() if config.vocab_size in p.shape]
    assert vocab_sized == ["model.embed_tokens.weight", "lm_head.weight"]


def test_the_mtp_loss_trains_embedding_head_and_all_before() -> None:
    config = small()
    model = build(config)
    input_ids = tokens(config, 2, 8)
    model(input_ids, labels=input_ids).losses["mtp_1"].backward()
    for name, parameter in model.named_parameters():
        if ".experts." not in name:  # not every expert need be visited
            assert parameter.grad is not None and parameter.grad.any(), name


def test_the_weight_of_the_mtp_loss_may_change_while_training() -> None:
    config = small()
    model = build(config)
    input_ids = tokens(config, 2, 8)
    losses = []
    for weight in (0.3, 0.1, 0.0):
        model.mtp_loss_weight = weight
        out = model(input_ids, labels=input_ids)
        losses.append(out.loss - weight * out.losses["mtp_1"])
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[1], losses[2])


def test_the_head_s_input_is_normalised_at_every_depth() -> None:
    """What one module hands on is what the head reads, as the released inference code has it."""
    config = small(num_nextn_predict_layers=2)
    model = build(config, dtype=torch.float64)
    handed = []
    for module in model.model.layers[2:]:
        module.shared_head.norm.register_forward_hook(lambda m, a, y: handed.append(y))
    out = model(tokens(config, 1, 6), return_mtp=True)
    for hidden, logits in zip(handed, out.mtp_logits, strict=True):
        torch.testing.assert_close(F.linear(hidden, model.lm_head.weight), logits)
