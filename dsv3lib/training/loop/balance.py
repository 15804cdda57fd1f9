"""Load balancing: the four ways to do it, the bias update of DeepSeek-V3, and the measures of imbalance.

The router picks experts by score *plus bias*. After each training step every expert's bias moves by a fixed
speed γ: down where the expert had more tokens than the mean, up where it had fewer (paper §2.1.2). Only the
sign of the violation counts, so one flooded expert cannot shake the whole layer. The bias never enters the
gate value and never sees a gradient: it is a thermostat beside the model, not a part of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...errors import ConfigError, InputError

WAYS: Mapping[str, str] = MappingProxyType(
    {
        "none": "nothing balances",
        "sequence": "auxiliary loss over each sequence",
        "batch": "auxiliary loss over the whole batch",
        "bias": "bias, no auxiliary loss",
    }
)
"""The ways to balance that the paper sets side by side (§4.5.2 and §4.5.3), in words."""

PAPER_SPEED = 1e-3
"""γ of the paper (§4.2), for some hundred thousand steps."""
DEFAULT_SPEED = 1e-2
"""γ for runs of hundreds of steps, ten times the paper's: in so few steps 0.001 cannot reach the spread of the
affinities (tiny, 100 steps: validation MaxVio 1.2 to 2.4 by layer with 0.001, 0.6 to 0.8 with 0.01)."""
DEFAULT_ALPHA = 1e-3
"""α where the loss alone must balance. V3's own 1e-4 only complements the bias; ten times that is still mild."""


def balance_settings(way: str, speed: float | None = None, alpha: float | None = None) -> dict[str, Any]:
    """The fields of ``TrainingConfig`` that make a run balance in one of the four ways and in no other.

    Args:
        way: one of ``WAYS``.
        speed: γ, for "bias" alone. alpha: α, for "sequence" and "batch"; beside "bias" it is V3's own
            recipe, a weak sequence-wise loss beside the bias.

    Raises:
        ConfigError: no such way, or a number that this way has no use for.
    """
    if way not in WAYS:
        raise ConfigError(f"balance: {way!r}, expected one of {', '.join(WAYS)}")
    for name, value, users in (
        ("bias_speed", speed, ("bias",)),
        ("aux_loss_alpha", alpha, ("sequence", "batch", "bias")),
    ):
        if value is not None and way not in users:
            raise ConfigError(f"{name}: {value!r} given, but balance is {way!r}, which has no use for it")
    by_loss = DEFAULT_ALPHA if way in ("sequence", "batch") else 0.0
    return {
        "bias_speed": (DEFAULT_SPEED if speed is None else speed) if way == "bias" else 0.0,
        "aux_loss_alpha": by_loss if alpha is None else alpha,
        "aux_loss_over": "batch" if way == "batch" else "sequence",
    }


@torch.no_grad()
def update_bias(
    router: nn.Module | Tensor, load: Int[Tensor, " E"], speed: float | int, centre: bool = False
) -> None:
    """Move one router's bias against the load that it produced, in place.

    b_i ← b_i + γ·sign(mean(load) − load_i)    (paper §2.1.2, «bias update speed» γ)

    The comparison is made in whole numbers (E·load_i against Σ load), so an expert that sits exactly at the
    mean stays where it is, whatever the rounding. A load of zero everywhere (a module that did not run)
    leaves the bias alone for the same reason.

    Steps of ±γ do not sum to zero, so the biases of a layer drift as a whole. No choice of experts depends on
    that: what is added to all affinities alike changes no order, of experts or of groups (as long as dropped
    groups are masked with −inf and not with 0). But a bias that has drifted far has fewer bits left for the
    differences.

    Differs from the paper where ``centre`` is on: the mean is subtracted after each update, as torchtitan and Ling's
    trainers do.

    Args:
        router: a Router (its buffer ``e_score_correction_bias`` is changed) or that tensor [E] itself, FP32 or
            FP64.
        load: tokens that each routed expert received in the step, over the whole batch.
        speed: γ ≥ 0 (V3: 0.001 for 14.3T tokens, then 0).
        centre: subtract the biases' mean afterwards, where there was a load.

    Raises:
        InputError: γ is negative or not finite, or bias and load differ in shape or are of the wrong dtype.
    """
    bias = router if isinstance(router, Tensor) else router.e_score_correction_bias
    if not math.isfinite(speed) or speed < 0:
        raise InputError(f"speed: {speed!r}, expected γ >= 0 (a negative γ would drive the load apart)")
    if bias.dtype not in (torch.float32, torch.float64):
        raise InputError(f"bias: dtype {bias.dtype}, expected torch.float32 (steps of γ vanish in less) or float64")
    _whole_numbers(load)
    if load.shape != bias.shape:
        raise InputError(f"load: shape {tuple(load.shape)}, expected {tuple(bias.shape)} as the bias has")
    direction = torch.sign(load.sum() - load * load.numel())
    bias.add_(direction.to(device=bias.device, dtype=bias.dtype), alpha=speed)
    if centre and bool(load.any()):
        bias.sub_(bias.mean())


def max_violation(load: Int[Tensor, "*layers E"]) -> Float[Tensor, "*layers"]:
    """How far the fullest expert is over the mean: MaxVio = max_i load_i / mean(load) − 1.

    On one batch's load this is the batch-wise MaxVio (it decides the slowest device of that step); on loads
    summed over many batches it is the global one (it says whether some expert is hardly trained). 0 is
    perfect balance, E/K − 1 is the worst there can be with K experts a token.

    Args:
        load: tokens by expert, any leading dimensions.

    Returns:
        FP64 [*layers]; 0 for a layer that saw no token.
    """
    _whole_numbers(load)
    mean = load.double().mean(dim=-1)
    top = load.amax(dim=-1).double()
    return torch.where(mean > 0, top / mean.clamp(min=torch.finfo(mean.dtype).tiny) - 1.0, 0.0)


def load_entropy(load: Int[Tensor, "*layers E"]) -> Float[Tensor, "*layers"]:
    """How evenly the load is spread: −Σ p_i ln p_i / ln E with p_i the expert's share of the tokens.

    1 is perfect balance, 0 is one expert that takes all. Where MaxVio looks at the worst expert alone, the
    entropy looks at all of them.

    Args:
        load: tokens by expert, any leading dimensions.

    Returns:
        FP64 [*layers] in [0, 1]; 0 for a layer that saw no token, 1 for a layer with a single expert.
    """
    _whole_numbers(load)
    if load.shape[-1] == 1:
        return torch.where(load.sum(dim=-1) > 0, 1.0, 0.0).double()
    total = load.sum(dim=-1, keepdim=True).clamp(min=1)
    share = load.double() / total
    return torch.special.entr(share).sum(dim=-1) / math.log(load.shape[-1])


def domain_load(
    expert_indices: Sequence[Int[Tensor, "B _ A"] | None],
    domain_ids: Int[Tensor, "B T"],
    domains: int,
    experts: int,
) -> Int[Tensor, "{domains} _ {experts}"]:
    """How many visits each expert received from each text domain.

    Args:
        expert_indices: chosen experts by mixture layer, as the model gives them; T' may be shorter than T
            (depth k of the MTP chain sees the first T − k positions), ``None`` is a layer that did not run.
        domain_ids: the domain of each position. domains: how many there are. experts: E.

    Returns:
        Int64 counts; zeros for a layer that did not run.
    """
    loads = torch.zeros(domains, len(expert_indices), experts, dtype=torch.int64)
    for layer, indices in enumerate(expert_indices):
        if indices is not None:
            cells = domain_ids[:, : indices.shape[1], None].cpu() * experts + indices.cpu()
            counts = torch.bincount(cells.flatten(), minlength=domains * experts)
            loads[:, layer] = counts.view(domains, experts)
    return loads


def _whole_numbers(load: Tensor) -> None:
    if load.is_floating_point() or load.is_complex() or load.dtype == torch.bool:
        raise InputError(f"load: dtype {load.dtype}, expected whole numbers of tokens (int64)")
    if load.ndim == 0 or load.shape[-1] == 0:
        raise InputError(f"load: shape {tuple(load.shape)}, expected one count for each expert, at least one")
