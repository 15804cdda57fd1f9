"""One transformer block, in the four stages in which a pipeline overlaps it: attention, dispatch, experts, combine.

Between two stages a micro-batch waits either for arithmetic (attention, experts) or for the wires (dispatch and combine
are all-to-alls where experts lie on other devices), so that two micro-batches can take turns (paper §3.2.1, Figure 4).
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from ..config import ModelConfig
from ..recompute import run
from .attention import MultiHeadLatentAttention
from .experts import MLP, MixtureOfExperts, Routing
from .norm import RMSNorm
from .operations import Dispatched
from .step import Step


class Attended(NamedTuple):
    """What the stage ``attention`` gives.

    Args:
        residual: x + MLA(norm x).
        h: its norm, which the feed-forward network reads.
        indices: chosen experts, ``None`` where there is nothing to choose.
        weights: their gate values.
        scores: affinities of all experts.
    """

    residual: Float[Tensor, "B T D"]
    h: Float[Tensor, "B T D"]
    indices: Tensor | None = None
    weights: Tensor | None = None
    scores: Tensor | None = None


class Sent(NamedTuple):
    """What the stage ``dispatch`` gives: what was attended to, and the tokens that lie with their experts."""

    attended: Attended
    dispatched: Dispatched | None


class Answered(NamedTuple):
    """What the stage ``experts`` gives.

    Args:
        sent: what was dispatched.
        shared: the shared expert's output, or that of a network without routed experts.
        answers: the routed experts', a row a visit.
        routing: of a mixture that was called whole.
    """

    sent: Sent
    shared: Float[Tensor, "B T D"]
    answers: Float[Tensor, "rows D"] | None = None
    routing: Routing | None = None


class Block(nn.Module):
    """x + MLA(norm x), then x + FFN(norm x) (paper §2.1, Figure 2).

    Args:
        config: sizes.
        layer: its index; the first ``first_k_dense_replace`` are dense, MTP modules count on from the last layer.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MultiHeadLatentAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        dense = layer < config.first_k_dense_replace
        self.mlp = MLP(config.hidden_size, config.intermediate_size) if dense else MixtureOfExperts(config)

    def forward(self, x: Float[Tensor, "B T D"], step: Step) -> tuple[Float[Tensor, "B T D"], Routing | None]:
        """The four stages in a row: the block's output and, for a mixture, how its tokens were routed."""
        return self.combine(self.experts(self.dispatch(self.attention(x, step), step), step), step)

    def attention(self, x: Float[Tensor, "B T D"], step: Step) -> Attended:
        """Stage 1: attention, the norm behind it and, for a mixture, the choice of experts."""
        compute = step.backend
        attended = self.self_attn(run(step.recompute, compute.norm, self.input_layernorm, x), step)
        if step.recompute is None:
            h, x = compute.add_norm(self.post_attention_layernorm, attended, x)
        else:  # the sum is kept, and only its norm is made again
            x = x + attended
            h = run(step.recompute, compute.norm, self.post_attention_layernorm, x)
        if not compute.intact(self.mlp, MixtureOfExperts):
            return Attended(x, h)
        return Attended(x, h, *compute.route(self.mlp.gate, h.flatten(0, 1)))

    def dispatch(self, attended: Attended, step: Step) -> Sent:
        """Stage 2: tokens to their experts (an all-to-all where those lie on other devices)."""
        if attended.indices is None:
            return Sent(attended, None)
        tokens = attended.h.flatten(0, 1)
        sent = step.backend.dispatch(self.mlp.experts, tokens, attended.indices, attended.weights)
        return Sent(attended, sent)

    def experts(self, sent: Sent, step: Step) -> Answered:
        """Stage 3: the routed and the shared experts, or a dense network."""
        compute, h = step.backend, sent.attended.h
        if sent.dispatched is not None:
            answers = compute.experts(self.mlp.experts, sent.dispatched)
            return Answered(sent, compute.feed_forward(self.mlp.shared_experts, h), answers)
        y = compute.feed_forward(self.mlp, h) if compute.intact(self.mlp, MLP) else self.mlp(h)
        return Answered(sent, y) if isinstance(y, Tensor) else Answered(sent, y[0], None, y[1])

    def combine(self, answered: Answered, step: Step) -> tuple[Float[Tensor, "B T D"], Routing | None]:
        """Stage 4: answers home (the all-to-all back), summed by gate value and added to the residual."""
        (attended, dispatched), y, answers, routing = answered
        if dispatched is not None:
            y = step.backend.combine(answers, dispatched).view_as(y) + y
            shape = y.shape[:2]
            routing = Routing(attended.indices.view(*shape, -1), attended.scores.view(*shape, -1))
        return attended.residual + y, routing
