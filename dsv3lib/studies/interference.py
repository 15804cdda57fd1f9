"""What a step for balance alone does to the language model's loss, beside steps of the same length elsewhere."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..model import DeepSeekV3
from ..training.loop.balance import update_bias
from ..training.text.data import Batch, PackedStream


def gradients(model: DeepSeekV3, batch: Batch, alpha: float) -> dict[str, list[Tensor | None]]:
    """Gradients of the language-model loss ("language") and of the auxiliary loss ("balance"), parameter by parameter.

    ``None`` stands where a loss does not depend on a parameter.

    Args:
        model: its ``aux_loss_over`` says which auxiliary loss. batch: text. alpha: α.
    """
    before, model.aux_loss_alpha = model.aux_loss_alpha, alpha
    device = model.lm_head.weight.device
    losses = model(batch.input_ids.to(device), labels=batch.labels.to(device)).losses
    model.aux_loss_alpha = before
    parameters = list(model.parameters())
    return {
        name: list(torch.autograd.grad(losses[key], parameters, retain_graph=True, allow_unused=True))
        for name, key in (("language", "main"), ("balance", "balance"))
    }


def flat(grads: list[Tensor | None], like: nn.Module) -> Tensor:
    """All gradients in one vector; zeros where there is none."""
    pairs = zip(grads, like.parameters(), strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


@torch.no_grad()
def loss_after(model: DeepSeekV3, direction: Tensor, length: float, batches: list[Batch]) -> float:
    """Mean loss after a step of this length along a direction; the model itself is not changed.

    Args:
        model: where the step begins. direction: as long as all parameters; only its direction counts.
        length: of the step. batches: what the loss is measured on.
    """
    moved = copy.deepcopy(model)
    step = direction * (length / direction.norm())
    vector = nn.utils.parameters_to_vector(moved.parameters())
    nn.utils.vector_to_parameters(vector + step, moved.parameters())
    return _loss(moved, batches)


@torch.no_grad()
def _loss(model: DeepSeekV3, batches: list[Batch]) -> float:
    device = model.lm_head.weight.device
    found = [model(b.input_ids.to(device), labels=b.labels.to(device)).losses["main"] for b in batches]
    return float(torch.stack(found).mean())


def interference(
    model: DeepSeekV3, text: PackedStream, alpha: float, gamma: float, repeats: int = 8, share: float = 0.002
) -> dict[str, Tensor]:
    """How one step changes the loss on other text: along −gradient of each loss, at random, and by the bias.

    Args:
        model: where the steps begin. text: gives the batches. alpha: α. gamma: γ of the bias's one update.
        repeats: batches that steps are taken on. share: length of a step, as a share of the parameters' length.

    Returns:
        Name → FP64 [repeats]: "language", "balance", "random", "bias": change of the loss in nats; "cosine"
        between the two gradients; "reach": share of the parameters that the auxiliary gradient changes.
    """
    draw = torch.Generator().manual_seed(0)
    length = share * float(nn.utils.parameters_to_vector(model.parameters()).detach().norm())
    held = [text.next_batch(8) for _ in range(2)]
    start = _loss(model, held)
    rows = []
    for _ in range(repeats):
        batch = text.next_batch(8)
        grads = gradients(model, batch, alpha)
        main, balance = (flat(grads[name], model) for name in ("language", "balance"))
        random = torch.randn(main.shape, generator=draw).to(main)
        directions = {"language": -main, "balance": -balance, "random": random}
        row = {name: loss_after(model, d, length, held) - start for name, d in directions.items()}
        row["bias"] = _after_update(model, batch, gamma, held) - start
        row["cosine"] = float(torch.cosine_similarity(main, balance, dim=0))
        row["reach"] = float((balance != 0).double().mean())
        rows.append(row)
    return {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in rows[0]}


@torch.no_grad()
def _after_update(model: DeepSeekV3, batch: Batch, gamma: float, held: list[Batch]) -> float:
    moved = copy.deepcopy(model)
    load = moved(batch.input_ids.to(moved.lm_head.weight.device)).expert_load.cpu()
    for router, counts in zip(moved.routers(), load, strict=True):
        update_bias(router, counts, gamma)
    return _loss(moved, held)
