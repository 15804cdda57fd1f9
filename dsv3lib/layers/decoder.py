"""The decoder: embedding, all blocks with the MTP modules behind them, and the last norm."""

from __future__ import annotations

from itertools import islice

from jaxtyping import Float
from torch import Tensor, nn

from ..config import ModelConfig
from ..recompute import run
from .block import Block
from .experts import Routing
from .mtp import MTPModule
from .norm import RMSNorm
from .step import Step


class Decoder(nn.Module):
    """Everything under the checkpoint's prefix ``model.``.

    Args:
        config: sizes.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_main = config.num_hidden_layers
        # Differs from transformers: no padding row. A token of padding has an embedding like any other; what keeps it
        # out of the loss are labels and ``lengths``.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        main = [Block(config, i) for i in range(self.n_main)]
        depths = range(config.num_nextn_predict_layers)
        self.layers = nn.ModuleList(main + [MTPModule(config, self.n_main + k) for k in depths])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, embeddings: Float[Tensor, "B T D"], step: Step
    ) -> tuple[Float[Tensor, "B T D"], list[Routing]]:
        """The main blocks and the last norm.

        Args:
            embeddings: of the tokens.
            step: the facts of the call.

        Returns:
            The head's input, and how each mixture routed.
        """
        x, routings = embeddings, []
        for block in islice(self.layers, self.n_main):
            x, routing = block(x, step)
            routings += [] if routing is None else [routing]
        return run(step.recompute, step.backend.norm, self.norm, x), routings
