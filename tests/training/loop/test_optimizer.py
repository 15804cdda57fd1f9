"""AdamW and the average of weights: against torch, and what BF16 would lose."""

import pytest
import torch

from dsv3lib.errors import CheckpointError, TrainingError
from dsv3lib.training.loop.average import WeightAverage
from dsv3lib.training.loop.optimizer import AdamW


def toy(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7), torch.nn.Linear(7, 3)).to(dtype)


def train_toy(model, optimizer, steps, learning_rate=1e-2):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(16, 5, generator=generator).to(model[0].weight.dtype)
        model.zero_grad()
        model(x).pow(2).sum().backward()
        optimizer(learning_rate)


def test_adamw_agrees_with_torchs():
    ours, theirs = toy(), toy()
    adam = AdamW(ours.named_parameters())
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    train_toy(ours, adam.step, 20)
    train_toy(theirs, lambda _: reference.step(), 20)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_decay_pulls_matrices_and_leaves_norms_and_biases():
    model = toy()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    AdamW(model.named_parameters(), weight_decay=0.5).step(0.1)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if p.ndim >= 2 else 1.0))


def test_master_weights_keep_what_bf16_would_lose():
    """Steps of 1e-5 on weights near 1 vanish in BF16, one by one; the FP32 masters add them up."""
    weight = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    adam = AdamW([("weight", weight)], weight_decay=0.0, moment_dtype=torch.bfloat16)
    for _ in range(1000):
        weight.grad = torch.ones_like(weight)
        adam.step(1e-5)
    torch.testing.assert_close(adam.masters["weight"], torch.full((2, 2), 0.99), rtol=0, atol=2e-4)
    assert weight.dtype == torch.bfloat16 and weight[0, 0].item() == pytest.approx(0.99, abs=4e-3)
    assert adam.first["weight"].dtype == torch.bfloat16
    assert (torch.ones(2, dtype=torch.bfloat16) - 1e-5 == 1).all()  # what would have happened without


def test_optimizer_state_goes_out_and_in_exactly():
    one, other = toy(), toy()
    first = AdamW(one.named_parameters())
    train_toy(one, first.step, 3)
    other.load_state_dict(one.state_dict())
    second = AdamW(other.named_parameters())
    second.load_state_tensors({k: v.clone() for k, v in first.state_tensors().items()}, first.count)
    for model, adam in ((one, first), (other, second)):
        train_toy(model, adam.step, 3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    broken = first.state_tensors() | {"first.0.weight": torch.zeros(2, 2)}
    with pytest.raises(CheckpointError, match=r"first.0.weight.*\(2, 2\), expected"):
        second.load_state_tensors(broken, 3)
    del broken["first.0.weight"]
    with pytest.raises(CheckpointError, match="first.0.weight' is missing"):
        second.load_state_tensors(broken, 3)


def test_average_follows_slowly_and_gives_the_weights_back():
    model = toy()
    average = WeightAverage(model, decay=0.5)
    start = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    average.update(model)  # the first decay is 2/11
    torch.testing.assert_close(average.tensors["0.weight"], start + 9 / 11)
    own = model[0].weight.detach().clone()
    with average.applied(model):
        assert torch.equal(model[0].weight, average.tensors["0.weight"])
    assert torch.equal(model[0].weight, own)
    share = WeightAverage(model, decay=0.5, leave_out={"0.bias"})  # which another rank keeps
    share.update(model)
    assert share.tensors.keys() == average.tensors.keys() - {"0.bias"}
    with pytest.raises(TrainingError, match="0.bias: another rank"), share.applied(model):
        pass
