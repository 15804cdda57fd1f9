"""Steps along gradients: the language model's own step lowers its loss, the bias's update touches no weight."""

from __future__ import annotations

import torch

from dsv3lib.studies import balance_ways as small
from dsv3lib.studies.interference import flat, gradients, interference


def test_directions_are_what_they_are_called() -> None:
    model, text = small.small_model(1), small.stream(1)
    before = torch.nn.utils.parameters_to_vector(model.parameters()).clone()
    biases = [router.e_score_correction_bias.clone() for router in model.routers()]
    found = interference(model, text, 0.02, 0.01, repeats=1)
    assert float(found["language"].max()) < 0, "a step along its own gradient must lower the loss"
    assert float(found["language"].max()) < float(found["random"].min())
    assert 0 < float(found["reach"].min()) < 1
    assert torch.equal(torch.nn.utils.parameters_to_vector(model.parameters()), before)
    assert all(torch.equal(r.e_score_correction_bias, b) for r, b in zip(model.routers(), biases, strict=True))


def test_the_auxiliary_loss_does_not_reach_the_head() -> None:
    model, text = small.small_model(1), small.stream(1)
    grads = gradients(model, text.next_batch(2), 0.02)
    names = [name for name, _ in model.named_parameters()]
    assert grads["balance"][names.index("lm_head.weight")] is None
    assert grads["balance"][names.index("model.layers.1.mlp.gate.weight")].abs().max() > 0
    assert len(flat(grads["balance"], model)) == sum(p.numel() for p in model.parameters())
