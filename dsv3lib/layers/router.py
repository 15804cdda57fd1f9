"""The router: sigmoid affinities, a bias that steers the choice, and groups that bound the traffic.

The bias is the whole of auxiliary-loss-free balancing on the forward side: it is added to decide *which*
experts a token goes to and is absent from *how much* each counts. It gets no gradient; a rule outside the
graph moves it after each step (``training.balance.update_bias``).
"""

from __future__ import annotations

from types import MappingProxyType

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..config import ModelConfig
from ..errors import InputError
from ..linear import PLAIN, PlainRecipe, autocast_on, linear


def route(
    scores: Float[Tensor, "N E"], bias: Float[Tensor, " E"], config: ModelConfig
) -> tuple[Int[Tensor, "N A"], Float[Tensor, "N A"]]:
    """Choose each token's experts and their gate values (paper §2.1.2, Eqs. 13 and 16, and "Node-Limited Routing").

    1. s' = s + b, the biased affinity, decides every choice.
    2. A group's score is the sum of its two best s'; the M best groups stay, the others become −inf
       (not 0: a biased affinity may be negative, and a 0 would win).
    3. The K_r best s' are chosen.
    4. The gate value is g = s / Σ s over the chosen, *without* the bias, times ``routed_scaling_factor``.

    Equal affinities are settled for the lower index, on every device.

    Differs from the paper: a group is scored by its two best affinities, as in the released code, where the paper has
    the K_r/M best. At V3's sizes (and ``tiny``'s) K_r/M is 2 and they agree; at ``nano`` and ``tiny-v3`` it is not,
    and a good part of the tokens (one in four at ``nano``) would choose otherwise.

    Differs from the released code: s is FP32 whatever the model's dtype. The released gate rounds it to BF16, after
    which some tokens in a hundred meet other experts than the exact affinities give.

    Args:
        scores: s = sigmoid(u · e), FP32, one row a token.
        bias: b, FP32.
        config: sizes and switches.

    Returns:
        indices, Int64, best first; and weights, FP32, in the same order.

    Raises:
        InputError: a score is NaN, which would be chosen first by every sort (seen on the CPU alone; to ask
            a GPU would stall it).
    """
    return choose(
        scores, bias, top_k=config.num_experts_per_tok, n_group=config.n_group, topk_group=config.topk_group,
        norm=config.norm_topk_prob, scale=config.routed_scaling_factor,
    )  # fmt: skip


def choose(
    scores: Float[Tensor, "N E"],
    bias: Float[Tensor, " E"],
    *,
    top_k: int,
    n_group: int,
    topk_group: int,
    norm: bool,
    scale: float,
) -> tuple[Int[Tensor, "N A"], Float[Tensor, "N A"]]:
    """The rule of ``route`` by its numbers, for whoever has no configuration.

    Args:
        scores: s.
        bias: b.
        top_k: K_r, experts a token visits.
        n_group: groups of experts.
        topk_group: M, how many of them one token may use.
        norm: divide by the sum over the chosen.
        scale: ``routed_scaling_factor``.
    """
    if scores.device.type == "cpu" and torch.isnan(scores.sum()):
        raise InputError(
            f"scores: {int(scores.isnan().sum())} of {scores.numel()} are NaN, expected affinities in [0, 1]; "
            "the hidden state or the router's weight is spoilt"
        )
    chosen_by = scores + bias  # 1
    if n_group > 1:  # 2
        grouped = chosen_by.unflatten(-1, (n_group, -1))
        group_scores = grouped.topk(2, dim=-1, sorted=False).values.sum(-1)
        dropped = torch.ones_like(group_scores, dtype=torch.bool)
        dropped.scatter_(-1, best(group_scores, topk_group), False)
        chosen_by = grouped.masked_fill(dropped[..., None], float("-inf")).flatten(-2)
    indices = best(chosen_by, top_k)  # 3
    weights = scores.gather(-1, indices)  # 4
    if norm:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return indices, weights * scale


def best(values: Float[Tensor, "*N E"], k: int) -> Int[Tensor, "*N k"]:
    """Indices of the ``k`` largest values, largest first, the lower index first among equals.

    ``torch.topk`` leaves the order of equals to the device; a stable sort does not.

    Args:
        values: one row a choice.
        k: how many of each.
    """
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def sequence_balance_loss(
    scores: Float[Tensor, "B T E"],
    experts_per_token: int,
    alpha: float,
    valid: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, ""]:
    """Complementary sequence-wise auxiliary loss, α Σ f_i P_i (paper §2.1.2, Eqs. 17 to 20).

    f_i is how often expert i is among the K_r best *unbiased* affinities of a sequence, as a multiple of its
    fair share; P_i is its mean normalised affinity. The gradient flows through P alone.

    Args:
        scores: s, sigmoid affinities.
        experts_per_token: K_r.
        alpha: α.
        valid: which positions are tokens and no padding; ``None`` means all.

    Returns:
        The mean over the sequences of a batch that hold a token.
    """
    n_tokens, n_experts = scores.shape[-2:]
    chosen = torch.zeros_like(scores).scatter_(-1, best(scores.detach(), experts_per_token), 1.0)
    share = scores / scores.sum(-1, keepdim=True)
    if valid is not None:
        chosen, share = (x.masked_fill(~valid[..., None], 0.0) for x in (chosen, share))
        n_tokens = valid.sum(-1, keepdim=True).clamp(min=1).to(scores.dtype)
    f_BE = chosen.sum(-2) * (n_experts / (experts_per_token * n_tokens))
    p_BE = share.sum(-2) / n_tokens
    loss_B = (f_BE * p_BE).sum(-1)
    return alpha * (loss_B.mean() if valid is None else loss_B.sum() / valid.any(-1).sum().clamp(min=1))


def balance_loss(
    scores: Float[Tensor, "B T E"],
    experts_per_token: int,
    alpha: float,
    over: str,
    valid: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, ""]:
    """The auxiliary loss over each sequence, or over the whole batch as if it were one (§4.5.3).

    The batch-wise form asks for less: one sequence may be all code, as long as the batch is mixed.

    Args:
        scores: as in ``sequence_balance_loss``.
        experts_per_token: the same.
        alpha: the same.
        over: "sequence" or "batch".
        valid: as in ``sequence_balance_loss``.
    """
    if over == "batch":
        scores = scores.flatten(0, 1)[None]
        valid = None if valid is None else valid.flatten()[None]
    return sequence_balance_loss(scores, experts_per_token, alpha, valid)


class Router(nn.Module):
    """The gate of one mixture layer: affinities in FP32 whatever the model's dtype, then ``route``.

    Attributes:
        weight: the experts' centroids e_i, [E, D].
        e_score_correction_bias: b, an FP32 buffer [E]; saved with the model, never trained by gradient.
    """

    e_score_correction_bias: Tensor
    recipe: PlainRecipe = PLAIN
    recipes = MappingProxyType({"recipe": ""})

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer(
            "e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32)
        )

    def logits(self, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N E"]:
        """u · e_i, at least in FP32, also under autocast: in BF16 one token in ten would choose other experts."""
        if autocast_on(x):
            with torch.autocast(x.device.type, enabled=False):
                return self.logits(x)
        if x.dtype in (torch.bfloat16, torch.float16):
            x = x.float()
        return linear(x, self.weight.to(x.dtype), None, self.recipe)

    def scores(self, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N E"]:
        """s = sigmoid(u · e_i) (Eq. 15), at least in FP32."""
        return self.logits(x).sigmoid()

    def forward(
        self, x: Float[Tensor, "N D"]
    ) -> tuple[Int[Tensor, "N A"], Float[Tensor, "N A"], Float[Tensor, "N E"]]:
        """Experts of each token, their gate values, and the affinities s (for the balance loss)."""
        scores = self.scores(x)
        return *route(scores, self.e_score_correction_bias, self.config), scores

    def _apply(self, fn, recurse=True):
        # ``model.bfloat16()`` must not round the bias: its steps of γ = 0.001 would vanish in BF16. torch leaves a
        # buffer no other way to stay in FP32.
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if moved.dtype not in (torch.float32, torch.float64) and moved.device.type != "meta":
            self.e_score_correction_bias = bias.to(moved.device)
        elif moved.dtype not in (torch.float32, torch.float64):
            self.e_score_correction_bias = moved.float()
        return self
