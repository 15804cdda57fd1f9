"""Multi-token prediction: a chain of small modules, each of which sees one token further.

Module k takes, at position i, what module k−1 knew there (k = 1: what the main model knew) and the embedding
of the token k places ahead, and predicts the token k + 1 places ahead. The chain is sequential, and causal at
every depth. Embedding and output head are the main model's own (paper §2.2, Eqs. 21 to 23).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..config import ModelConfig
from ..linear import Linear
from ..recompute import run
from .block import Block
from .experts import Routing
from .norm import RMSNorm
from .step import Step


class SharedHead(nn.Module):
    """The module's own norm before the main model's output head; the head's matrix is not stored again."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MTPModule(Block):
    """One depth of the chain: h' = M [norm e(t_{i+k}); norm h_i^{k−1}], then a block.

    Differs from the paper: the released checkpoint's ``eh_proj`` takes [embedding; hidden], the reverse of
    Eq. 21, and the hidden state handed on is the normalised one, the head's own input, as released inference
    code has it.

    Args:
        config: sizes.
        layer: its index in the checkpoint, ``num_hidden_layers`` + k − 1.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = SharedHead(config)

    def advance(
        self, hidden: Float[Tensor, "B T D"], embedding: Float[Tensor, "B T D"], step: Step
    ) -> tuple[Float[Tensor, "B T D"], Routing | None]:
        """One link of the chain.

        Args:
            hidden: h^{k−1}, normalised.
            embedding: of the token k places ahead of each position.
            step: the facts of the call.

        Returns:
            h^k, normalised: the output head's input and the next module's ``hidden``; and the routing.
        """
        whole = step.backend.advance(self, hidden, embedding, step)
        if whole is not None:
            return whole
        x, routing = self(self.enter(hidden, embedding, step), step)
        return self.leave(x, step), routing

    def enter(
        self, hidden: Float[Tensor, "B T D"], embedding: Float[Tensor, "B T D"], step: Step
    ) -> Float[Tensor, "B T D"]:
        """The block's input, M [norm e; norm h]; arguments as for ``advance``."""
        return self.eh_proj(run(step.recompute, self._join, embedding, hidden, step))

    def leave(self, x: Float[Tensor, "B T D"], step: Step) -> Float[Tensor, "B T D"]:
        """The block's output, normalised: h^k."""
        return run(step.recompute, step.backend.norm, self.shared_head.norm, x)

    def _join(self, embedding: Tensor, hidden: Tensor, step: Step) -> Tensor:
        norm = step.backend.norm
        return torch.cat([norm(self.enorm, embedding), norm(self.hnorm, hidden)], -1)
